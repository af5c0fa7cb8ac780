"""Several files as one store: the contract, and how genes, cells and obs columns are joined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tiledbsoma
import tiledbsoma.io
from scipy import sparse

from schelix_scale.config import DataConfig
from schelix_scale.errors import DataError, StoreError
from schelix_scale.stores import AnnDataStore, CellStore, MemoryStore, open_recorded, open_store
from schelix_scale.stores.checks import check_block
from schelix_scale.stores.joined import JoinedStore

from ..forwarding import ForwardingStore
from .contract import CellStoreContract
from .truth import Truth, make_truth, to_anndata, write_zarr

BOUNDS = [0, 20, 47, 83]
LABELS = ["a", "b", "c"]


def part_of(truth: Truth, place: int, genes: list[int], extra: int = 0) -> ad.AnnData:
    """Return the cells of one file with its genes in its order, and genes of its own at odd places."""
    rows = slice(BOUNDS[place], BOUNDS[place + 1])
    x_ng, names = truth.x_ng[rows][:, genes], [truth.genes[gene] for gene in genes]
    for i in range(extra):
        x_ng = np.insert(x_ng, 3 * i, 7.0 + i, axis=1)
        names.insert(3 * i, f"only{place}-{i}")
    return to_anndata(Truth(x_ng, truth.obs[rows], names))


def save(adata: ad.AnnData, folder: Path, name: str) -> str:
    folder.mkdir(exist_ok=True)
    if name.endswith(".zarr"):
        return str(write_zarr(adata, folder / name, 3))
    adata.write_h5ad(folder / name)
    return str(folder / name)


def with_files(truth: Truth) -> Truth:
    files = pd.Categorical(np.repeat(LABELS, np.diff(BOUNDS)))
    return Truth(truth.x_ng, truth.obs.assign(file=files), truth.genes)


def shuffled(seed: int, genes: list[int]) -> list[int]:
    return [genes[i] for i in np.random.default_rng(seed).permutation(len(genes))]


def write_intersection(truth: Truth, folder: Path) -> CellStore:
    """The first file has the order that is expected; all but the second have genes of their own."""
    every = list(range(37))
    parts = [
        part_of(truth, 0, every, extra=3),
        part_of(truth, 1, every),
        part_of(truth, 2, shuffled(2, every), extra=5),
    ]
    names = ["a.h5ad", "b.zarr", "c.h5ad"]
    return open_store([save(part, folder, name) for part, name in zip(parts, names, strict=True)])


UNION = [list(range(30)), shuffled(3, list(range(5, 37))), shuffled(4, list(range(37)))]


def union_truth(seed: int = 0) -> Truth:
    """Genes in order of appearance, zero where a file does not have them."""
    truth = make_truth(seed=seed)
    order = list(dict.fromkeys(gene for genes in UNION for gene in genes))
    x_ng = truth.x_ng.copy()
    for place, genes in enumerate(UNION):
        absent = [gene for gene in range(37) if gene not in genes]
        x_ng[BOUNDS[place] : BOUNDS[place + 1], absent] = 0
    return Truth(x_ng[:, order], truth.obs, [truth.genes[gene] for gene in order])


def write_union(folder: Path, seed: int = 0) -> CellStore:
    truth = make_truth(seed=seed)
    parts = [part_of(truth, place, genes) for place, genes in enumerate(UNION)]
    paths = [save(part, folder, f"{label}.zarr") for part, label in zip(parts, LABELS, strict=True)]
    return open_store(paths, genes_join="union")


class TestIntersection(CellStoreContract):
    @pytest.fixture
    def truth(self) -> Truth:
        return with_files(make_truth())

    @pytest.fixture
    def store(self, tmp_path: Path) -> CellStore:
        return write_intersection(make_truth(), tmp_path)

    @pytest.fixture
    def changed(self, tmp_path: Path) -> CellStore:
        return write_intersection(make_truth(seed=1), tmp_path)


class TestUnion(CellStoreContract):
    @pytest.fixture
    def truth(self) -> Truth:
        return with_files(union_truth())

    @pytest.fixture
    def store(self, tmp_path: Path) -> CellStore:
        return write_union(tmp_path)

    @pytest.fixture
    def changed(self, tmp_path: Path) -> CellStore:
        return write_union(tmp_path, seed=1)


def test_where_a_union_was_measured(tmp_path: Path) -> None:
    measured = write_union(tmp_path).measured()
    assert measured is not None
    assert measured.names == ("a", "b", "c")
    np.testing.assert_array_equal(measured.group_n, np.repeat([0, 1, 2], np.diff(BOUNDS)))
    assert measured.group_n.dtype == np.int32
    order = [int(name.removeprefix("gene")) for name in union_truth().genes]
    np.testing.assert_array_equal(measured.measured_pg, [[gene in genes for gene in order] for genes in UNION])


def test_an_intersection_is_measured_everywhere(tmp_path: Path) -> None:
    store = write_intersection(make_truth(), tmp_path)
    assert store.measured() is None
    again = open_store([tmp_path / "a.h5ad", tmp_path / "c.h5ad"], genes_join="union")
    assert again.measured() is not None
    same = open_store([tmp_path / "b.zarr", save(part_of(make_truth(), 0, list(range(37))[::-1]), tmp_path, "d.h5ad")])
    assert same.measured() is None


def test_what_parts_know_of_themselves_is_combined(tmp_path: Path) -> None:
    inner = write_union(tmp_path)
    other = AnnDataStore(save(part_of(make_truth(prefix="gene"), 0, list(range(8, 36))), tmp_path, "other.h5ad"))
    store = JoinedStore([inner, other], ["inner.h5ad", "other.h5ad"])
    measured = store.measured()
    assert measured is not None
    assert measured.names == ("inner: a", "inner: b", "inner: c", "other")
    np.testing.assert_array_equal(measured.group_n, np.repeat([0, 1, 2, 3], [*np.diff(BOUNDS), 20]))
    genes = [int(name.removeprefix("gene")) for name in store.gene_names]
    assert sorted(genes) == list(range(8, 36))
    expected = [[gene in has for gene in genes] for has in (*UNION, range(8, 36))]
    np.testing.assert_array_equal(measured.measured_pg, expected)


def test_only_the_parts_with_asked_rows_are_read(tmp_path: Path) -> None:
    truth = make_truth()
    store = write_intersection(truth, tmp_path)
    (tmp_path / "c.h5ad").unlink()
    np.testing.assert_array_equal(store.read(np.array([46, 0, 25])).toarray(), truth.x_ng[[46, 0, 25]])
    with pytest.raises(StoreError, match=r"c\.h5ad does not exist"):
        store.read(np.array([0, 47]))


def test_a_scanned_part_makes_a_scanned_store(tmp_path: Path) -> None:
    adata = to_anndata(make_truth(prefix="gene"))
    fast = save(adata, tmp_path, "a.h5ad")
    adata.X = sparse.csc_matrix(adata.X)
    slow = save(adata, tmp_path, "b.h5ad")
    assert open_store([fast, slow]).row_access == "scan"
    adata.X = sparse.csr_matrix(adata.X)
    assert open_store([fast, save(adata, tmp_path, "c.h5ad")]).row_access == "fast"


def test_nonzeros_are_weighted_by_cells(tmp_path: Path) -> None:
    truth = make_truth()
    store = write_union(tmp_path)
    stored = sum((truth.x_ng[BOUNDS[p] : BOUNDS[p + 1]][:, genes] != 0).sum() for p, genes in enumerate(UNION))
    assert store.nonzeros_per_cell == pytest.approx(stored / 83)


def test_the_fingerprint_knows_order_and_join(tmp_path: Path) -> None:
    write_union(tmp_path)
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    stores = [open_store([a, b]), open_store([b, a]), open_store([a, b], genes_join="union")]
    assert len({store.fingerprint() for store in stores}) == 3
    assert open_store([a, b]).fingerprint() == stores[0].fingerprint()


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


def test_files_and_soma_experiments_mix(tmp_path: Path) -> None:
    truth = make_truth()
    first, second = part_of(truth, 0, list(range(37))), part_of(truth, 1, shuffled(5, list(range(37))))
    address = tmp_path / "b.soma"
    tiledbsoma.io.from_anndata(str(address), second, "RNA")
    paths = [save(first, tmp_path, "a.h5ad"), str(address)]
    store = open_store(paths)
    rows = np.array([40, 3, 21, 40])
    np.testing.assert_array_equal(store.read(rows).toarray(), truth.x_ng[rows])
    assert list(store.gene_names) == truth.genes
    assert list(store.cell_names) == list(truth.obs.index[:47])
    assert store.obs(["batch"])["batch"].astype(str).tolist() == truth.obs["batch"].iloc[:47].astype(str).tolist()
    assert (store.layer, store.available_layers[0]) == ("X", "X")
    assert store.obs(["file"])["file"].tolist() == ["a"] * 20 + ["b"] * 27
    assert store.provenance()["files"] == paths
    with pytest.raises(StoreError, match=r"a\.h5ad is no SOMA experiment; obs_filter \('donor == 1'\) selects cells"):
        open_store(paths, obs_filter="donor == 1")
    with pytest.raises(StoreError, match=r"b\.soma has no measurement 'ATAC'"):  # which the file has no part in
        open_store(paths, measurement="ATAC")
    with pytest.raises(StoreError, match=r"a\.h5ad is no part of the Census"):
        open_store(paths, census_version="2025-11-08")
    tuned = open_store(paths, tiledb={"soma.init_buffer_bytes": "512", "vfs.s3.aws_secret_access_key": "SECRET"})
    opened = tuned.provenance()["opened"]
    assert (opened["layer"], opened["genes_join"]) == ("X", "intersection")
    assert opened["tiledb"] == {"soma.init_buffer_bytes": "512"}
    again = open_recorded({"layer": "X", "uri": tuned.source, **tuned.provenance()}, DataConfig())
    assert again.fingerprint() == store.fingerprint()


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
