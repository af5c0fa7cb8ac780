"""Several files as one store: how names, genes and obs columns are joined, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from schelix_scale.errors import DataError, StoreError
from schelix_scale.stores import AnnDataStore, CellStore, MemoryStore, open_store
from schelix_scale.stores.checks import check_block
from schelix_scale.stores.joined import JoinedStore

from ..forwarding import ForwardingStore
from .truth import save


def cells(n: int, prefix: str = "cell", genes: int = 30, **obs: object) -> ad.AnnData:
    table = pd.DataFrame(obs, index=[f"{prefix}{i}" for i in range(n)])
    return ad.AnnData(
        np.ones((n, genes), np.float32), obs=table, var=pd.DataFrame(index=[f"g{i}" for i in range(genes)])
    )


def joined(*parts: ad.AnnData, names: tuple[str, ...] = ("a.h5ad", "b.h5ad", "c.h5ad")) -> JoinedStore:
    return JoinedStore([MemoryStore(part) for part in parts], names[: len(parts)])


def test_cell_names_get_their_file_only_if_they_clash() -> None:
    apart = joined(cells(2, "x"), cells(2, "y"))
    assert list(apart.cell_names) == ["x0", "x1", "y0", "y1"]
    clash = joined(cells(2), cells(1, "y"), cells(2))
    assert list(clash.cell_names) == ["cell0-a", "cell1-a", "y0-b", "cell0-c", "cell1-c"]
    assert list(clash.obs([]).index) == list(clash.cell_names)
    assert any("cell0-a" in note for note in clash.notes)
    assert not any("cell names" in note for note in apart.notes)
    twin = cells(2, "z")
    twin.obs_names = ["twin", "twin"]  # the file's own matter, which check_names reports
    assert list(joined(cells(1), twin).cell_names) == ["cell0", "twin", "twin"]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2], [3], pd.Series([1, 2, 3])),
        (np.array([1, 2], np.int8), np.array([300], np.int32), pd.Series(np.array([1, 2, 300], np.int32))),
        ([1, 2], [0.5], pd.Series([1.0, 2.0, 0.5])),
        ([1, 2], None, pd.Series([1, 2, pd.NA], dtype="Int64")),
        ([2**60 + 1, 2], None, pd.Series([2**60 + 1, 2, pd.NA], dtype="Int64")),
        ([0.5, 1.5], None, pd.Series([0.5, 1.5, np.nan])),
        ([True, False], [True], pd.Series([True, False, True])),
        ([True, False], None, pd.Series([True, False, pd.NA], dtype="boolean")),
        (["x", "y"], ["z"], pd.Series(["x", "y", "z"], dtype=object)),
        (["x", "y"], None, pd.Series(["x", "y", None], dtype=object)),
        (["x", "y"], [np.nan], pd.Series(["x", "y", None], dtype=object)),
        ([np.nan, np.nan], pd.Categorical([None], ["a"]), pd.Series([np.nan] * 3)),
        (pd.Categorical([None, None], ["a"]), [np.nan], pd.Series(pd.Categorical([None] * 3, ["a"]))),
        ([None, None], [np.nan], pd.Series([None] * 3, dtype=object)),
        ([1.5, 2.5], [np.nan], pd.Series([1.5, 2.5, np.nan])),
        ([1, 2], [np.nan], pd.Series([1, 2, pd.NA], dtype="Int64")),
        (["x", "y"], [7], pd.Series(["x", "y", "7"], dtype=object)),
        ([True, False], [7], pd.Series(["True", "False", "7"], dtype=object)),
        (pd.Categorical(["q", "p"]), pd.Categorical(["a"]), pd.Series(pd.Categorical(["q", "p", "a"]))),
        (pd.Categorical(["q", "p"]), None, pd.Series(pd.Categorical(["q", "p", None]))),
        (
            pd.Categorical(["low", "high"], ["low", "high"], ordered=True),
            pd.Categorical(["high"], ["low", "high"], ordered=True),
            pd.Series(pd.Categorical(["low", "high", "high"], ["low", "high"], ordered=True)),
        ),
        (
            pd.Categorical(["low", "high"], ["low", "high"], ordered=True),
            pd.Categorical(["mid"]),
            pd.Series(pd.Categorical(["low", "high", "mid"], ["high", "low", "mid"])),
        ),
        (pd.Categorical([1, 2]), pd.Categorical(["x"]), pd.Series(pd.Categorical(["1", "2", "x"]))),
        (pd.Categorical([1, 2]), pd.Categorical([1.0]), pd.Series(pd.Categorical(["1", "2", "1"]))),
        (np.array([1, "a"], object), [1.0], pd.Series(["1", "a", "1"], dtype=object)),
        (["1", "0.5"], [0.5], pd.Series(["1", "0.5", "0.5"], dtype=object)),
        (pd.Categorical([3, 1]), pd.Categorical([2]), pd.Series(pd.Categorical([3, 1, 2]))),
        (pd.Categorical(["q", "p"]), ["a"], pd.Series(["q", "p", "a"], dtype=object)),
        (
            pd.to_datetime(["2024-01-01", "2024-01-02"]),
            None,
            pd.Series(pd.to_datetime(["2024-01-01", "2024-01-02", None])),
        ),
    ],
)  # fmt: skip
def test_obs_columns_become_one_kind(first: object, second: object, expected: pd.Series) -> None:
    other = cells(1, "y") if second is None else cells(1, "y", value=second)
    found = joined(cells(2, value=first), other).obs(["value"])["value"]
    pd.testing.assert_series_equal(found.reset_index(drop=True), expected.rename("value"))


def test_obs_columns_are_those_of_all_files() -> None:
    store = joined(cells(1, x=[1], y=["p"]), cells(1, "k", z=[0.5], x=[2]))
    assert store.obs_columns == ["x", "y", "z", "file"]
    assert store.obs(["z", "x"]).columns.tolist() == ["z", "x"]
    assert store.obs(["file"])["file"].tolist() == ["a", "b"]
    with pytest.raises(DataError, match=r"2 files: a\.h5ad, b\.h5ad has no obs column 'nope'. It has: x, y, z, file"):
        store.obs(["nope"])


def test_the_column_of_file_names_takes_a_free_name() -> None:
    store = joined(cells(1, file=["mine"]), cells(1, "k", source_file=["yours"]))
    assert store.file_column == "schelix_file"
    assert store.obs(["file"])["file"].tolist() == ["mine", None]
    assert store.obs()["schelix_file"].tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["d/a.h5ad", "d/b.zarr"], ("a", "b")),
        (["d1/cells.h5ad", "d2/cells.h5ad"], ("d1/cells", "d2/cells")),
        (["d/a.h5ad", "d/a.zarr"], ("a.h5ad", "a.zarr")),
        (["d/donor.1", "d/donor.2"], ("donor.1", "donor.2")),
        (["s3://bucket/one/", "d/two.soma"], ("one", "two")),
    ],
)
def test_short_names(paths: list[str], labels: tuple[str, ...]) -> None:
    store = JoinedStore([MemoryStore(cells(1, "x")), MemoryStore(cells(1, "y"))], paths)
    assert store.labels == labels


def test_source_is_short() -> None:
    assert joined(cells(1, "x"), cells(1, "y"), cells(1, "z")).source == "3 files: a.h5ad, ..."


def test_patterns_sort_naturally_and_lists_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "donors"
    for i in (10, 2, 1):
        save(cells(i, f"d{i}-"), folder, f"donor{i}.h5ad")
    save(cells(3, "hidden"), folder, "._donor3.h5ad")
    store = open_store(str(folder / "*.h5ad"))
    assert isinstance(store, JoinedStore)
    assert store.labels == ("donor1", "donor2", "donor10")
    assert store.addresses == tuple(str(folder / f"donor{i}.h5ad") for i in (1, 2, 10))
    monkeypatch.chdir(tmp_path)
    listed = open_store(["donors/donor1*.h5ad", Path("donors/donor2.h5ad")])
    assert isinstance(listed, JoinedStore)
    assert listed.labels == ("donor1", "donor10", "donor2")
    monkeypatch.chdir("/")
    assert listed.read(np.arange(13)).shape == (13, 30)
    assert listed.addresses[2] == str(folder / "donor2.h5ad")
    assert isinstance(open_store([folder / "donor1.h5ad"]), AnnDataStore)


def write(change: Callable[[ad.AnnData], object]) -> Callable[[Path], list[str]]:
    def made(folder: Path) -> list[str]:
        first, second = cells(3, "x"), cells(3, "y")
        first.layers["counts"] = first.X
        change(second)
        return [save(first, folder, "a.h5ad"), save(second, folder, "b.h5ad")]

    return made


@pytest.mark.parametrize(
    ("paths", "layer", "error", "message"),
    [
        (write(lambda b: setattr(b, "var_names", ["g0"] * 30)), "X", DataError, r"b\.h5ad has 1 gene names that occur"),
        (
            write(lambda b: setattr(b, "var_names", [f"ENSG{i:011d}" for i in range(30)])),
            "X",
            DataError,
            r"b\.h5ad shares 0 of its 30 genes with .*a\.h5ad; 20 are needed. It has ENSG00000000000, ENSG00000000001, "
            r"ENSG00000000002, \.\.\.; .*a\.h5ad has g0, g1, g2, .*\(symbols and Ensembl ids\)",
        ),
        (
            write(lambda b: setattr(b, "var_names", [f"g{i}" for i in range(15, 45)])),
            "X",
            DataError,
            r"b\.h5ad shares 15 of its 30 genes",
        ),
        (write(lambda b: None), "counts", StoreError, r"b\.h5ad has no layer 'counts'. Available: X"),
        (lambda folder: [*write(lambda b: None)(folder), str(folder / "c.h5ad")], "X", StoreError, "c.h5ad does not"),
        (
            lambda folder: [*write(lambda b: None)(folder), str(folder / "sub" / ".." / "a.h5ad")],
            "X",
            StoreError,
            r"a\.h5ad is given twice \(first as .*a\.h5ad\)",
        ),
        (lambda folder: [write(lambda b: None)(folder)[0]] * 2, "X", StoreError, "is given twice"),
        (
            lambda folder: [str(folder / "sub" / "*.h5ad")],
            "X",
            StoreError,
            r"pattern .*\*\.h5ad matches nothing; .*sub is e",
        ),
        (lambda folder: [str(folder / "none" / "*.h5ad")], "X", StoreError, "there is no directory .*none"),
        (lambda folder: ["s3://bucket/*.h5ad"], "X", StoreError, "patterns match local files"),
        (lambda folder: [], "X", StoreError, "empty list of files"),
        (lambda folder: [np.zeros(3), "a"], "X", StoreError, "are given as paths; one is a ndarray"),
    ],
)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_what_cannot_be_joined(
    tmp_path: Path, paths: Callable[[Path], list[str]], layer: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(error, match=message):
        open_store(paths(tmp_path), layer)


class Known(ForwardingStore):
    """A store that knows more of its genes than their names; all else is what another store says."""

    def __init__(self, store: CellStore, table: pd.DataFrame) -> None:
        super().__init__(store)
        self._table = table

    def gene_table(self) -> pd.DataFrame:
        return self._table

    def provenance(self) -> dict[str, Any]:
        return {"release": "r1"}

    def notices(self) -> list[str]:
        return ["cells are there twice"]


def test_what_parts_know_of_genes_and_of_themselves() -> None:
    one, two, three = (MemoryStore(cells(1, name, genes)) for name, genes in (("x", 30), ("y", 28), ("z", 35)))
    names = [f"g{i}" for i in range(35)]
    early = pd.DataFrame({"symbol": [f"s{i}" for i in range(28)]}, index=names[:28])
    late = pd.DataFrame({"symbol": ["no"] * 35, "length": np.arange(35)}, index=names)
    store = JoinedStore([one, Known(two, early), Known(three, late)], ["a", "b", "c"], "union")
    table = store.gene_table()
    assert table is not None
    assert list(table.index) == list(store.gene_names) == names
    assert table["symbol"].tolist() == [f"s{i}" for i in range(28)] + ["no"] * 7
    assert table["length"].tolist() == list(range(35))
    assert joined(cells(1), cells(1)).gene_table() is None
    assert store.provenance()["parts"] == {"b": {"release": "r1"}, "c": {"release": "r1"}}
    assert store.notices() == ["b: cells are there twice", "c: cells are there twice"]


def test_bad_values_are_told_with_their_file(tmp_path: Path) -> None:
    bad = cells(3, "y")
    bad.X[1, 4] = np.nan
    store = open_store([save(cells(3, "x"), tmp_path, "a.h5ad"), save(bad, tmp_path, "b.h5ad")])
    rows = np.array([0, 4])
    with pytest.raises(DataError, match=r"1 NaN values .*first: cell y1 of .*b\.h5ad, gene g4"):
        check_block(store.read(rows), rows, store)
    bad.X[1] = 0
    store = open_store([str(tmp_path / "a.h5ad"), save(bad, tmp_path, "b.h5ad")])
    with pytest.raises(DataError, match=r"first: y1 of .*b\.h5ad\)"):
        check_block(store.read(rows), rows, store)


def test_a_union_needs_shared_genes_too() -> None:
    other = cells(2, "y")
    other.var_names = [f"h{i}" for i in range(30)]
    parts = [MemoryStore(cells(2)), MemoryStore(other)]
    with pytest.raises(DataError, match=r"shares 0 of its 30 genes.*Check that they are of one species"):
        JoinedStore(parts, ["a.h5ad", "b.h5ad"], "union")
