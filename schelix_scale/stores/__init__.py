"""Where cells come from: stores that read row blocks, and the checks on what they hold."""

from __future__ import annotations

from schelix_scale.stores.anndata import AnnDataStore
from schelix_scale.stores.base import Block, CellStore, Measured
from schelix_scale.stores.memory import MemoryStore
from schelix_scale.stores.opening import Source, open_configured, open_recorded, open_store

__all__ = [
    "AnnDataStore",
    "Block",
    "CellStore",
    "Measured",
    "MemoryStore",
    "Source",
    "open_configured",
    "open_recorded",
    "open_store",
]
