"""`open_store`: every source it takes, and what it says of those it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import zarr
from scipy import sparse

from schelix_scale.errors import StoreError
from schelix_scale.stores import AnnDataStore, MemoryStore, open_store

from .truth import make_truth, to_anndata, write_csr, write_zarr


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "cells.h5ad"
    to_anndata(make_truth()).write_h5ad(path)
    return path


def rebuilt(path: Path, **changed: np.ndarray) -> Path:
    """Replace arrays of X in the file by hand."""
    with h5py.File(path, "r+") as file:
        x_ng = sparse.csr_matrix(make_truth().x_ng)
        del file["X"]
        write_csr(file.create_group("X"), x_ng, **changed)
    return path


def test_paths_anndata_and_stores(path: Path) -> None:
    assert isinstance(open_store(path), AnnDataStore)
    store = open_store(str(path))
    assert store.source == str(path)
    assert open_store(store) is store
    assert isinstance(open_store(ad.read_h5ad(path)), MemoryStore)
    with pytest.raises(StoreError, match="is open with layer 'X'; 'counts' was asked"):
        open_store(store, "counts")
    with pytest.raises(StoreError, match="cannot be read from a ndarray"):
        open_store(np.zeros(3))
    with pytest.raises(StoreError, match=r"s3://bucket/a.zarr is a remote address"):
        open_store("s3://bucket/a.zarr")


def test_relative_path_survives_a_change_of_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    store = open_store(path.name)
    monkeypatch.chdir("/")
    assert store.source == path.name
    np.testing.assert_array_equal(store.read(np.array([2])).toarray(), make_truth().x_ng[[2]])


def test_a_file_address_is_the_path_of_it(path: Path) -> None:
    store = open_store(f"file://{path}")
    assert isinstance(store, AnnDataStore)
    assert (store.source, store.fingerprint()) == (str(path), open_store(path).fingerprint())
    assert open_store(f"file://{path.parent}/*.h5ad").n_cells == 83
    with pytest.raises(StoreError, match=r"cell\.h5ad does not exist\. Did you mean cells\.h5ad"):
        open_store(f"file://{path.with_name('cell.h5ad')}")
    with pytest.raises(StoreError, match=rf"file://{path} is given twice"):
        open_store([path, f"file://{path}"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measurement": "ATAC"}, r"is no SOMA experiment, so data\.measurement would not be applied\. Leave it out"),
        ({"timestamp": 5, "tiledb": {"a": "b"}}, r"so data\.timestamp, data\.tiledb would not"),
        (
            {"census_version": "2025-11-08"},
            r"is no part of the Census .*, so data\.census_version would",
        ),
        ({"census_uri": "here"}, r"so data\.census_uri would"),
    ],
)
def test_settings_that_files_are_not_read_by_are_refused(path: Path, options: dict[str, Any], message: str) -> None:
    for source in (path, ad.read_h5ad(path), [path]):
        with pytest.raises(StoreError, match=message):
            open_store(source, **options)
    assert open_store(path, measurement="RNA", census_version="stable").n_cells == 83


def test_backed(path: Path) -> None:
    backed = ad.read_h5ad(path, backed="r")
    store = open_store(backed)
    assert isinstance(store, AnnDataStore)
    assert store.source == str(path)
    with pytest.raises(StoreError, match=r"is a view of part of .*cells\.h5ad.*to_memory"):
        open_store(backed[:10])
    note = backed.obs["note"].copy()
    backed.obs["note"] = "z"
    with pytest.raises(StoreError, match=r"obs columns \['note'\] of this backed AnnData differ from .*to_memory"):
        open_store(backed)
    backed.obs["note"] = note.astype(object)
    assert open_store(backed).source == str(path)
    backed.obs["new"] = 1
    with pytest.raises(StoreError, match=r"obs columns \['new'\] of this backed AnnData are not in"):
        open_store(backed)
    with pytest.raises(StoreError, match="is backed by"):
        MemoryStore(backed)
    backed.file.close()


def test_import_is_light() -> None:
    code = "import sys, schelix_scale.stores as s; print([m for m in ('anndata', 'zarr', 'h5py') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_path(path: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cell\.h5ad does not exist\. Did you mean cells\.h5ad\?"):
        open_store(path.with_name("cell.h5ad"))
    with pytest.raises(StoreError, match=r"Its folder .*nowhere does not exist either"):
        open_store(tmp_path / "nowhere" / "cells.h5ad")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"holds no \.h5ad file or \.zarr directory"):
        open_store(tmp_path / "empty" / "cells.h5ad")


@pytest.mark.parametrize("name", ["a.csv", "a.mtx", "a.loom", "a"])
def test_other_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("1,2\n")
    with pytest.raises(StoreError, match=r"has the suffix .* Cells are read from \.h5ad files and \.zarr directories"):
        open_store(tmp_path / name)


def test_not_anndata_files(tmp_path: Path) -> None:
    (tmp_path / "zero.h5ad").touch()
    with pytest.raises(StoreError, match=r"zero\.h5ad is empty \(0 bytes\)"):
        open_store(tmp_path / "zero.h5ad")
    (tmp_path / "text.h5ad").write_text("gene,cell\n" * 1000)
    with pytest.raises(StoreError, match=r"text\.h5ad is not an HDF5 file"):
        open_store(tmp_path / "text.h5ad")
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["table"] = np.arange(3)
    with pytest.raises(StoreError, match=r"no anndata layout: expected X, obs and var, found table"):
        open_store(tmp_path / "other.h5ad")
    with h5py.File(tmp_path / "filtered.h5", "w") as file:
        file["matrix/barcodes"] = np.array([b"AAAC"])
    with pytest.raises(StoreError, match=r"filtered\.h5 is a 10x Genomics matrix.*read_10x_h5\(path\)\.write_h5ad"):
        open_store(tmp_path / "filtered.h5")


def test_not_anndata_directories(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="folder is a directory but not a zarr group"):
        open_store(tmp_path / "folder")
    zarr.open_group(str(tmp_path / "other.zarr"), mode="w").create_array("table", shape=(3,), dtype="i4")
    with pytest.raises(StoreError, match=r"other\.zarr has no anndata layout.*found table"):
        open_store(tmp_path / "other.zarr")
    zarr.create_array(str(tmp_path / "array.zarr"), shape=(3,), dtype="i4")
    with pytest.raises(StoreError, match=r"array\.zarr cannot be opened as a zarr group"):
        open_store(tmp_path / "array.zarr")
    broken = write_zarr(to_anndata(make_truth()), tmp_path / "broken.zarr", 3)
    (broken / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"broken\.zarr cannot be opened as a zarr group"):
        open_store(broken)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_truncated_file(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(StoreError, match=r"cells\.h5ad (is incomplete|cannot be opened).*(write it again|elsewhere)"):
        open_store(path)


def test_layers(tmp_path: Path, path: Path) -> None:
    with pytest.raises(StoreError, match=r"no layer 'counts'\. Available: X \("):
        open_store(path, "counts")
    truth = make_truth()
    adata = to_anndata(truth, layers={"counts": sparse.csr_matrix(truth.x_ng), "log": truth.x_ng})
    adata.raw = adata.copy()
    adata.write_h5ad(path)
    for source in (path, adata):
        with pytest.raises(StoreError, match=r"no layer 'count'\. Available: X, raw, counts, log \(--layer NAME"):
            open_store(source, "count")
        assert open_store(source, "log").available_layers == ("X", "raw", "counts", "log")
    del adata.raw
    adata.X = None
    adata.write_h5ad(path)
    for source in (path, adata):
        with pytest.raises(StoreError, match=r"has no X\. Choose another layer .*: counts, log\."):
            open_store(source)
        np.testing.assert_array_equal(open_store(source, "counts").read(np.arange(9)).toarray(), truth.x_ng[:9])


def test_matrix_that_is_not_read(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["X"].attrs["encoding-type"] = "coo_matrix"
    with pytest.raises(StoreError, match="layer 'X' has encoding 'coo'; csr_matrix, csc_matrix and dense are read"):
        open_store(path)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = np.full((83, 37), b"a")
    with pytest.raises(StoreError, match=r"holds values of type .*only numbers"):
        open_store(path)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = np.zeros(83)
    with pytest.raises(StoreError, match=r"has shape \(83,\); cells by genes needs two dimensions"):
        open_store(path)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = np.zeros((82, 37))
    with pytest.raises(StoreError, match="is 82 x 37 but obs has 83 rows and var 37"):
        open_store(path)


def test_old_dataframe(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["obs"]
        file["obs"] = np.array([(b"cell0", 1)], dtype=[("index", "S8"), ("batch", "i8")])
    with pytest.raises(StoreError, match=r"obs is not a dataframe of the current anndata layout.*write_h5ad"):
        open_store(path)


@pytest.mark.filterwarnings("ignore:.*without encoding metadata")
def test_dataframe_of_anndata_0_7(path: Path) -> None:
    """Encoding 0.1.0: categories in a group beside the codes."""
    with h5py.File(path, "r+") as file:
        codes, categories = file["obs/batch/codes"][()], file["obs/batch/categories"].asstr()[()]
        del file["obs/batch"]
        file["obs/__categories/batch"] = categories.tolist()
        file["obs/batch"] = codes
        file["obs/batch"].attrs["categories"] = file["obs/__categories/batch"].ref
        file["obs"].attrs["encoding-version"] = "0.1.0"
    store = open_store(path)
    assert store.obs(["donor", "batch"])["batch"].tolist() == make_truth().obs["batch"].tolist()


def test_memory_matrix_that_is_not_read() -> None:
    truth = make_truth()
    adata = to_anndata(truth, layers={"masked": np.ma.masked_less(truth.x_ng, 1)})
    with pytest.raises(StoreError, match=r"layer 'masked' is a numpy.*MaskedArray; scipy CSR or CSC and NumPy"):
        open_store(adata, "masked")
    with pytest.raises(StoreError, match="AnnData in memory: layer 'X' holds values of type complex64"):
        open_store(to_anndata(truth, truth.x_ng.astype(np.complex64)))


class TestDamage:
    """Damage that shows only when rows are read."""

    def test_lengths(self, path: Path) -> None:
        x_ng = sparse.csr_matrix(make_truth().x_ng)
        with pytest.raises(StoreError, match=rf"is damaged: {x_ng.nnz} values, {x_ng.nnz - 1} indices and 84 pointers"):
            open_store(rebuilt(path, indices=x_ng.indices[:-1]))

    def test_truncated_arrays(self, path: Path) -> None:
        x_ng = sparse.csr_matrix(make_truth().x_ng)
        store = open_store(rebuilt(path, indices=x_ng.indices[:100], data=x_ng.data[:100]))
        np.testing.assert_array_equal(store.read(np.arange(3)).toarray(), make_truth().x_ng[:3])
        with pytest.raises(StoreError, match="is damaged: indptr does not fit its 100 stored values"):
            store.read(np.array([80]))

    def test_indices_outside(self, path: Path) -> None:
        indices = sparse.csr_matrix(make_truth().x_ng).indices.copy()
        indices[0] = 37
        store = open_store(rebuilt(path, indices=indices))
        with pytest.raises(StoreError, match=r"is damaged: stored indices are outside 0\.\.36"):
            store.read(np.array([0]))

    def test_corrupt_chunk(self, tmp_path: Path) -> None:
        path = write_zarr(to_anndata(make_truth()), tmp_path / "a.zarr", 3, chunks=(100,))
        (path / "X" / "data" / "c" / "0").write_bytes(b"not a chunk")
        with pytest.raises(StoreError, match=r"layer 'X' cannot be read at 0:.*damaged"):
            open_store(path).read(np.array([0]))

    def test_obs_column(self, path: Path) -> None:
        with h5py.File(path, "r+") as file:
            file["obs/donor"].attrs["encoding-type"] = "from the future"
        with pytest.raises(StoreError, match=r"obs column 'donor' cannot be read: .*newer anndata"):
            open_store(path).obs(["donor"])

    def test_removed(self, path: Path) -> None:
        store = open_store(path)
        path.unlink()
        with pytest.raises(StoreError, match="does not exist"):
            store.read(np.array([0]))
        with pytest.raises(StoreError, match="cannot be read any more"):
            store.fingerprint()
