"""The anndata layout on disk: opening, what is wrong when it cannot be opened, layers, obs and var.

What comes in: a path. What goes out: an open h5py or zarr root for the time of one call, its elements and frames.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas as pd

from schelix_scale.errors import StoreError

FORMATS = "Cells are read from .h5ad files and .zarr directories written by anndata"
# h5py serialises all calls anyway; one lock from open to close keeps one thread's close away from another's read.
_HDF5 = threading.RLock()


@contextmanager
def open_root(path: Path, source: str) -> Iterator[Any]:
    """Open ``path`` for reading and yield its root group, or raise a `StoreError` that says what is wrong."""
    check_path(path, source)
    if path.is_dir():
        root = _open_zarr(path, source)
        _check_root(root, source)
        yield root
        return
    with _HDF5, _open_hdf5(path, source) as root:
        _check_root(root, source)
        yield root


def check_path(path: Path, source: str) -> None:
    """Raise a `StoreError` when ``path`` cannot be a file or directory of cells."""
    if not path.exists():
        raise StoreError(f"{source} does not exist. {_siblings(path)}")
    if path.is_dir():
        if not any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zarray", ".zmetadata")):
            raise StoreError(f"{source} is a directory but not a zarr group. {FORMATS}.")
    elif path.suffix.lower() not in (".h5ad", ".h5", ".hdf5"):
        raise StoreError(
            f"{source} has the suffix {path.suffix or 'none'!r}. {FORMATS}; read it with scanpy or anndata "
            f"(read_csv, read_mtx, read_loom, ...) and save it with adata.write_h5ad."
        )
    elif path.stat().st_size == 0:
        raise StoreError(f"{source} is empty (0 bytes). Write or copy it again.")


def layer_paths(root: Any) -> dict[str, str]:
    """Return layer name -> path of its matrix, in the order X, raw, then the names under layers/."""
    paths = {name: f"layers/{name}" for name in sorted(root["layers"].keys())} if "layers" in root else {}
    main = {"X": "X"} if "X" in root and not _is_null(root["X"]) else {}
    raw = {"raw": "raw/X"} if "raw" in root and "X" in root["raw"] else {}
    return {**main, **raw, **{name: path for name, path in paths.items() if name not in ("X", "raw")}}


def missing_layer(layer: str, available: Sequence[str], source: str) -> StoreError:
    """Return the error for a layer that is not there."""
    listed = ", ".join(available) or "none"
    if layer == "X":
        return StoreError(f"{source} has no X. Choose another layer (--layer NAME) of those there: {listed}.")
    return StoreError(f"{source} has no layer {layer!r}. Available: {listed} (--layer NAME).")


def index_length(frame: Any, what: str) -> int:
    """Return the number of rows of a stored dataframe without reading it."""
    return int(_index(frame, what).shape[0])


def read_index(frame: Any, what: str) -> pd.Index:
    """Return the row names of a stored dataframe."""
    return pd.Index(_read(_index(frame, what), what)).astype(str)


def frame_columns(frame: Any) -> list[str]:
    """Return the column names of a stored dataframe."""
    return [str(name) for name in frame.attrs["column-order"]]


def read_frame(frame: Any, columns: Sequence[str], what: str) -> pd.DataFrame:
    """Read ``columns`` of a stored dataframe; no other column is touched in the current encoding (0.2.0)."""
    names = read_index(frame, what)
    if str(frame.attrs.get("encoding-version", "")) != "0.2.0":
        whole = _read(frame, what)
        return whole.loc[:, list(columns)].set_axis(names, axis=0)
    return pd.DataFrame({name: _read(frame[name], f"{what} column {name!r}") for name in columns}, index=names)


def text_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of a dataframe that hold text, categories of text included, without missing values."""
    kinds = {name: pd.api.types.infer_dtype(table[name], skipna=True) for name in table}
    texts = [name for name, kind in kinds.items() if kind in ("string", "categorical")]
    return table[texts].astype(object).fillna("").astype(str)


def _index(frame: Any, what: str) -> Any:
    name = frame.attrs.get("_index")
    if hasattr(frame, "shape") or name is None or "column-order" not in frame.attrs or str(name) not in frame:
        raise StoreError(
            f"{what} is not a dataframe of the current anndata layout (anndata before 0.7 stored a compound dataset). "
            f"Re-write it with a current anndata: anndata.read_h5ad(path).write_h5ad(new_path)."
        )
    return frame[str(name)]


def _read(element: Any, what: str) -> Any:
    from anndata.io import read_elem

    try:
        return read_elem(element)
    except Exception as error:
        raise StoreError(
            f"{what} cannot be read: {error}. It is damaged or of a newer anndata: write it again or update anndata."
        ) from error


def _is_null(element: Any) -> bool:
    return bool(element.attrs.get("encoding-type") == "null")


def _open_zarr(path: Path, source: str) -> Any:
    import zarr

    try:
        # Consolidated metadata may be older than the layers; on a local disk it saves nothing.
        return zarr.open_group(str(path), mode="r", use_consolidated=False)
    except Exception as error:
        raise StoreError(f"{source} cannot be opened as a zarr group: {error}. {FORMATS}.") from error


def _open_hdf5(path: Path, source: str) -> Any:
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        if "truncated" in str(error):
            raise StoreError(f"{source} is incomplete: {error}. Copy or write it again.") from error
        if not h5py.is_hdf5(path):
            raise StoreError(f"{source} is not an HDF5 file, whatever its suffix says. {FORMATS}.") from error
        raise StoreError(f"{source} cannot be opened: {error}. It is damaged or open for writing elsewhere.") from error


def _check_root(root: Any, source: str) -> None:
    if "obs" in root and "var" in root:
        return
    names = sorted(map(str, root.keys()))
    if any(hasattr(root[name], "keys") and "barcodes" in root[name] for name in names):
        raise StoreError(
            f"{source} is a 10x Genomics matrix, not an anndata file. Convert it once: "
            f"scanpy.read_10x_h5(path).write_h5ad(new_path)."
        )
    found = ", ".join(names[:8]) or "nothing"
    raise StoreError(f"{source} has no anndata layout: expected X, obs and var, found {found}. {FORMATS}.")


def _siblings(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"Its folder {folder} does not exist either."
    names = sorted(entry.name for entry in folder.iterdir())
    near = get_close_matches(path.name, names, n=3) or [n for n in names if n.endswith((".h5ad", ".zarr"))][:3]
    return f"Did you mean {' or '.join(near)}?" if near else f"{folder} holds no .h5ad file or .zarr directory."
