"""Several files as one store: the contract, and what is read of which file."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tiledbsoma
import tiledbsoma.io
from scipy import sparse

from schelix_scale.config import DataConfig
from schelix_scale.errors import StoreError
from schelix_scale.stores import AnnDataStore, CellStore, open_recorded, open_store
from schelix_scale.stores.joined import JoinedStore

from .contract import CellStoreContract
from .truth import Truth, make_truth, save, to_anndata

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
