"""`open_store`: whatever describes cells -> a `CellStore`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from schelix_scale.errors import StoreError
from schelix_scale.stores.anndata import AnnDataStore
from schelix_scale.stores.base import CellStore
from schelix_scale.stores.memory import MemoryStore

if TYPE_CHECKING:
    from anndata import AnnData


def open_store(source: str | Path | AnnData | CellStore, layer: str = "X") -> CellStore:
    """Open a source of cells.

    Parameters
    ----------
    source
        An ``.h5ad`` file, an anndata ``.zarr`` directory, an AnnData (a backed one is re-opened from its file),
        or a store, which is returned as it is.
    layer
        ``"X"``, ``"raw"`` or the name of a layer.

    Raises
    ------
    StoreError
        The source cannot be read as cells; the message names it, says what is wrong and the remedy.
    """
    if isinstance(source, CellStore):
        if layer not in ("X", source.layer):
            raise StoreError(
                f"{source.source} is open with layer {source.layer!r}; {layer!r} was asked. Open it with that layer."
            )
        return source
    if isinstance(source, str) and "://" in source:
        raise StoreError(f"{source} is a remote address; cells are read from local paths. Copy it to a local disk.")
    if isinstance(source, str | Path):
        return AnnDataStore(source, layer)
    anndata = sys.modules.get("anndata")
    if anndata is not None and isinstance(source, anndata.AnnData):
        return _reopen(source, layer) if source.isbacked else MemoryStore(source, layer)
    raise StoreError(
        f"Cells cannot be read from a {type(source).__qualname__}. Give a path, an AnnData or a CellStore."
    )


def _reopen(adata: AnnData, layer: str) -> CellStore:
    """Open the file behind a backed AnnData, or raise when the object in memory says something else."""
    remedy = "Use adata.to_memory(), or write it to a file and open that."
    if adata.is_view:
        raise StoreError(f"This AnnData is a view of part of {adata.filename}, which cannot be opened alone. {remedy}")
    store = AnnDataStore(Path(adata.filename), layer)
    unsaved = [str(name) for name in adata.obs.columns if name not in store.obs_columns]
    if unsaved:
        raise StoreError(f"obs columns {unsaved[:5]} of this backed AnnData are not in {adata.filename}. {remedy}")
    return store
