"""Counting what is read: rows through a store that wraps a real one, chunks of zarr arrays on disk."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from schelix_scale.stores.base import CellStore, Measured


class CountingStore(CellStore):
    def __init__(self, store: CellStore) -> None:
        self.store = store
        self.reads = np.zeros(store.n_cells, int)
        self.largest = self.blocks_read = 0
        self._lock = threading.Lock()
        self.layer, self.available_layers, self.row_access = store.layer, store.available_layers, store.row_access

    @property
    def source(self) -> str:
        return self.store.source

    @property
    def n_cells(self) -> int:
        return self.store.n_cells

    @property
    def gene_names(self) -> pd.Index:
        return self.store.gene_names

    @property
    def cell_names(self) -> pd.Index:
        return self.store.cell_names

    @property
    def obs_columns(self) -> list[str]:
        return self.store.obs_columns

    @property
    def nonzeros_per_cell(self) -> float:
        return self.store.nonzeros_per_cell

    def obs(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        return self.store.obs(columns)

    def read(self, rows: np.ndarray, genes: np.ndarray | None = None) -> sparse.csr_matrix:
        with self._lock:
            np.add.at(self.reads, rows, 1)
            self.largest = max(self.largest, len(rows))
            self.blocks_read += 1
        return self.store.read(rows, genes)

    def measured(self) -> Measured | None:
        return self.store.measured()

    def fingerprint(self) -> str:
        return self.store.fingerprint()


def count_chunks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count every chunk that zarr reads from local disk from here on, by its path in the store.

    Chunks that are read are decoded: zarr keeps none.
    """
    from zarr.storage import LocalStore

    counts: Counter[str] = Counter()
    lock, get = threading.Lock(), LocalStore.get

    async def counting(self: LocalStore, key: str, *arguments: Any, **options: Any) -> Any:
        if "/c/" in key:
            with lock:
                counts[key] += 1
        return await get(self, key, *arguments, **options)

    monkeypatch.setattr(LocalStore, "get", counting)
    return counts
