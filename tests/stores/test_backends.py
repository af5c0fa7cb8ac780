"""Every backend and encoding against the contract."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from schelix_scale.stores import AnnDataStore, CellStore, MemoryStore

from .contract import CellStoreContract
from .truth import Truth, make_truth, to_anndata, write_zarr

Writer = Callable[[Truth, Path], CellStore]


def unsorted_csr(x_ng: np.ndarray) -> sparse.csr_matrix:
    """CSR of the same values whose indices are reversed, with a stored zero and a value split in two."""
    parts = []
    for row in x_ng:
        columns = np.flatnonzero(row)[::-1]
        values = row[columns]
        if columns.size:
            columns, values = np.r_[columns, columns[0], 4], np.r_[values, 0.25, 0.0]
            values[0] -= 0.25
        parts.append((values, columns))
    indptr = np.cumsum([0] + [len(values) for values, _ in parts])
    arrays = (np.concatenate([v for v, _ in parts]), np.concatenate([c for _, c in parts]), indptr)
    return sparse.csr_matrix(arrays, shape=x_ng.shape)


def h5ad(matrix: Callable[[np.ndarray], object], layer: str = "X", **kwargs: object) -> Writer:
    def write(truth: Truth, folder: Path) -> CellStore:
        path = folder / "cells.h5ad"
        to_anndata(truth, matrix(truth.x_ng)).write_h5ad(path, **kwargs)
        return AnnDataStore(path, layer)

    return write


def in_zarr(matrix: Callable[[np.ndarray], object], zarr_format: int, **arrays: object) -> Writer:
    def write(truth: Truth, folder: Path) -> CellStore:
        shutil.rmtree(folder / "cells.zarr", ignore_errors=True)
        path = write_zarr(to_anndata(truth, matrix(truth.x_ng)), folder / "cells.zarr", zarr_format, **arrays)
        return AnnDataStore(path)

    return write


def raw(truth: Truth, folder: Path) -> CellStore:
    adata = to_anndata(truth)
    adata.raw = adata.copy()
    adata = adata[:, 3:9].copy()
    adata.X = adata.X * 10
    adata.write_h5ad(folder / "cells.h5ad")
    return AnnDataStore(folder / "cells.h5ad", "raw")


def layer(truth: Truth, folder: Path) -> CellStore:
    adata = to_anndata(truth, np.zeros_like(truth.x_ng), layers={"counts": sparse.csr_matrix(truth.x_ng)})
    adata.write_h5ad(folder / "cells.h5ad")
    return AnnDataStore(folder / "cells.h5ad", "counts")


def anndata_zarr(truth: Truth, folder: Path) -> CellStore:
    with ad.settings.override(auto_shard_zarr_v3=False, zarr_write_format=3), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consolidated metadata")
        to_anndata(truth).write_zarr(folder / "cells.zarr")
    return AnnDataStore(folder / "cells.zarr")


def memory(matrix: Callable[[np.ndarray], object], layer: str = "X") -> Writer:
    def write(truth: Truth, folder: Path) -> CellStore:
        return MemoryStore(to_anndata(truth, matrix(truth.x_ng)), layer)

    return write


def memory_layer(truth: Truth, folder: Path) -> CellStore:
    adata = to_anndata(truth, None, layers={"counts": sparse.csr_array(truth.x_ng)})
    adata.X = adata.X * 2
    return MemoryStore(adata, "counts")


def memory_view(truth: Truth, folder: Path) -> CellStore:
    doubled = ad.concat([to_anndata(truth), to_anndata(truth)], index_unique="-")
    view = doubled[: truth.x_ng.shape[0]]
    view.obs_names = truth.obs.index
    return MemoryStore(view)


def same(x_ng: np.ndarray) -> np.ndarray:
    return x_ng


BACKENDS: dict[str, Writer] = {
    "h5ad csr": h5ad(sparse.csr_matrix),
    "h5ad csr gzip": h5ad(sparse.csr_matrix, compression="gzip"),
    "h5ad csr not canonical": h5ad(unsorted_csr),
    "h5ad csr int64": h5ad(lambda x: sparse.csr_matrix(x.astype(np.int64))),
    "h5ad csr uint8": h5ad(lambda x: sparse.csr_matrix(x.astype(np.uint8))),
    "h5ad csc": h5ad(sparse.csc_matrix),
    "h5ad dense": h5ad(same),
    "h5ad dense float64 gzip": h5ad(lambda x: x.astype(np.float64), compression="gzip"),
    "h5ad dense float16": h5ad(lambda x: x.astype(np.float16)),
    "h5ad raw": raw,
    "h5ad layer": layer,
    "zarr v2 csr": in_zarr(sparse.csr_matrix, 2),
    "zarr v3 csr": in_zarr(sparse.csr_matrix, 3),
    "zarr v3 csr sharded": in_zarr(sparse.csr_matrix, 3, chunks=(10,), shards=(50,)),
    "zarr v3 auto-sharded": in_zarr(sparse.csr_matrix, 3, auto_shard=True),
    "zarr v3 dense": in_zarr(same, 3, chunks=(8, 10)),
    "zarr v3 dense sharded": in_zarr(same, 3, chunks=(8, 10), shards=(16, 40)),
    "zarr v2 csc": in_zarr(sparse.csc_matrix, 2),
    "zarr v3 csc": in_zarr(sparse.csc_matrix, 3),
    "zarr by anndata": anndata_zarr,
    "memory csr": memory(sparse.csr_matrix),
    "memory csr not canonical": memory(unsorted_csr),
    "memory csc": memory(sparse.csc_matrix),
    "memory dense": memory(same),
    "memory layer csr_array": memory_layer,
    "memory view": memory_view,
}


@pytest.fixture(params=list(BACKENDS))
def writer(request: pytest.FixtureRequest) -> Writer:
    return BACKENDS[request.param]


class TestBackends(CellStoreContract):
    @pytest.fixture
    def truth(self) -> Truth:
        return make_truth()

    @pytest.fixture
    def store(self, truth: Truth, writer: Writer, tmp_path: Path) -> CellStore:
        return writer(truth, tmp_path)

    @pytest.fixture
    def changed(self, writer: Writer, tmp_path: Path) -> CellStore:
        return writer(make_truth(seed=1), tmp_path)


@pytest.mark.parametrize("kind", ["h5ad csc", "zarr v3 csc", "memory csc", "h5ad csr", "h5ad dense", "memory dense"])
def test_row_access_hint(kind: str, tmp_path: Path) -> None:
    assert BACKENDS[kind](make_truth(), tmp_path).row_access == ("scan" if "csc" in kind else "fast")


def test_same_content_same_memory_fingerprint() -> None:
    first, second = (MemoryStore(to_anndata(make_truth())) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    renamed = make_truth(prefix="other")
    assert MemoryStore(to_anndata(renamed)).fingerprint() != first.fingerprint()


def test_obs_in_memory_has_a_fingerprint() -> None:
    adata = to_anndata(make_truth())
    adata.obs["hole"] = pd.Series(["x", None] * 41 + ["y"], adata.obs_names, dtype=object)
    adata.obs["lists"] = pd.Series([[1]] * 83, adata.obs_names)
    first = MemoryStore(adata).obs_fingerprint()
    kept = adata.copy()
    kept.obs = kept.obs.astype({"note": "category", "hole": "category"})  # as anndata does when it writes
    assert MemoryStore(kept).obs_fingerprint() == first

    def changed(name: str, cell: int, value: object) -> str:
        other = adata.copy()
        other.obs[name] = other.obs[name].astype(object)
        other.obs.iat[cell, other.obs.columns.get_loc(name)] = value
        other.obs[name] = other.obs[name].astype(adata.obs[name].dtype)
        return MemoryStore(other).obs_fingerprint()

    batch = next(name for name in ("b1", "b2") if name != adata.obs["batch"].iloc[80])
    prints = [changed("batch", 80, batch), changed("donor", 80, 7), changed("score", 3, 0.5), changed("note", 1, "z")]
    prints += [changed("hole", 1, "x"), changed("lists", 2, [1, 2])]
    for table in (adata.obs.rename(columns={"note": "notes"}), adata.obs.drop(columns="note"), adata.obs.assign(new=1)):
        other = adata.copy()
        other.obs = table
        prints.append(MemoryStore(other).obs_fingerprint())
    assert len({first, *prints}) == 10
    assert MemoryStore(adata.copy()).fingerprint() == MemoryStore(kept).fingerprint()


def test_layers_have_their_own_fingerprint(tmp_path: Path) -> None:
    truth = make_truth()
    adata = to_anndata(truth, layers={"counts": sparse.csr_matrix(truth.x_ng)})
    adata.write_h5ad(tmp_path / "a.h5ad")
    for opener in (lambda name: AnnDataStore(tmp_path / "a.h5ad", name), lambda name: MemoryStore(adata, name)):
        assert opener("X").fingerprint() != opener("counts").fingerprint()


@pytest.mark.parametrize("column", ["batch", "donor"])
def test_zarr_fingerprint_sees_obs(tmp_path: Path, column: str) -> None:
    truth = make_truth()
    path = write_zarr(to_anndata(truth), tmp_path / "a.zarr", 3)
    before = AnnDataStore(path).fingerprint()
    changed = Truth(truth.x_ng, truth.obs.assign(**{column: truth.obs[column].to_numpy()[::-1]}), truth.genes)
    write_zarr(to_anndata(changed), path, 3)
    assert AnnDataStore(path).fingerprint() != before
