"""Counting what is read: rows through a store that wraps a real one, chunks of zarr arrays on disk."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from schelix_scale.stores import CellStore

from .forwarding import ForwardingStore


class CountingStore(ForwardingStore):
    def __init__(self, store: CellStore) -> None:
        super().__init__(store)
        self.reads = np.zeros(store.n_cells, int)
        self.largest = self.blocks_read = 0
        self._lock = threading.Lock()

    def read(self, rows: np.ndarray, genes: np.ndarray | None = None) -> sparse.csr_matrix:
        with self._lock:
            np.add.at(self.reads, rows, 1)
            self.largest = max(self.largest, len(rows))
            self.blocks_read += 1
        return self.store.read(rows, genes)


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
