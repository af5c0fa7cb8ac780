"""Sorted rows of a store -> their values in one sweep: kept in memory, or spilled to a file until some are chosen."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import final

import numpy as np
from scipy import sparse

from schelix_scale.publish import disk_errors
from schelix_scale.stores.base import CellStore
from schelix_scale.stores.checks import check_block

MIN_BLOCK, MAX_BLOCK = 256, 5_000
IN_FLIGHT = 8  # blocks that together hold as many cells as the sketch
READERS = 2


def sweep(
    store: CellStore, rows: np.ndarray, cells: int, threads: int = READERS
) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
    """Read sorted ``rows`` (m,) once, in order, and yield them block by block with their checked values.

    Blocks are consecutive in the store, so that a stored chunk is read once, and once more if it lies across the
    boundary of two blocks (or of two pieces in which a store reads one). Two blocks are read ahead.

    Parameters
    ----------
    cells
        Cells of the sketch that is being drawn, to which memory was dealt: what is in flight stays below it. A store
        that is scanned by every read is read in blocks of that many.
    threads
        Threads of the run; more than two do not read.

    Raises
    ------
    DataError
        Values are NaN, infinite or negative, or cells are all zero.
    """
    readers = min(READERS, threads) if store.row_access == "fast" else 1
    waiting: deque[tuple[np.ndarray, Future[sparse.csr_matrix]]] = deque()
    pool = ThreadPoolExecutor(readers)
    try:
        for part in _blocks(rows, store, cells):
            waiting.append((part, pool.submit(store.read, part)))
            if len(waiting) == readers:
                yield _checked(store, *waiting.popleft())
        while waiting:
            yield _checked(store, *waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _blocks(rows: np.ndarray, store: CellStore, cells: int) -> Iterator[np.ndarray]:
    """Cut sorted rows into blocks: not too many rows, and not too far from the first to the last."""
    if store.row_access == "scan":
        most, reach = max(MAX_BLOCK, cells), store.n_cells
    else:
        most, reach = int(np.clip(cells // IN_FLIGHT, MIN_BLOCK, MAX_BLOCK)), max(MIN_BLOCK, cells)
    start = 0
    while start < len(rows):
        stop = min(start + most, int(np.searchsorted(rows, rows[start] + reach)))
        yield rows[start:stop]
        start = stop


def _checked(
    store: CellStore, part: np.ndarray, read: Future[sparse.csr_matrix]
) -> tuple[np.ndarray, sparse.csr_matrix]:
    block = read.result()
    check_block(block, part, store)
    return part, block


@final
class RowStack:
    """A CSR matrix of ``width`` genes that grows by rows in place: the operating system moves it, nothing is copied."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._data, self._indices = np.empty(0, np.float32), np.empty(0, np.int32)
        self._lengths: list[np.ndarray] = []

    def append(self, x_ng: sparse.csr_matrix) -> None:
        """Add rows below."""
        stop = self._grow(x_ng.nnz)
        self._data[stop:], self._indices[stop:] = x_ng.data, x_ng.indices
        self._lengths.append(np.diff(x_ng.indptr))

    def matrix(self) -> sparse.csr_matrix:
        """Return the (m, width) matrix. It shares memory with the stack: once rows are added, it must not be used."""
        pointer = self._pointer()
        kind = np.int32 if pointer[-1] < 2**31 else np.int64
        return sparse.csr_matrix(
            (self._data, self._indices, pointer.astype(kind)), shape=(len(pointer) - 1, self._width)
        )

    def insert(self, before: np.ndarray, x_ng: sparse.csr_matrix) -> None:
        """Put row i of ``x_ng`` before the row that is now at ``before[i]``; ``before`` (k,) is sorted."""
        pointer, lengths = self._pointer(), np.diff(x_ng.indptr)
        source = self._grow(x_ng.nnz)
        target = source + x_ng.nnz
        for i in range(len(before) - 1, -1, -1):  # from the end, so that nothing is overwritten before it has moved
            first, new = int(pointer[before[i]]), slice(*map(int, x_ng.indptr[i : i + 2]))
            for values, inserted in ((self._data, x_ng.data), (self._indices, x_ng.indices)):
                moved = target - (source - first)
                values[moved:target] = values[first:source]
                values[moved - (new.stop - new.start) : moved] = inserted[new]
            target -= (source - first) + (new.stop - new.start)
            source = first
        self._lengths = [np.insert(np.diff(pointer), before, lengths)]

    def _grow(self, values: int) -> int:
        stop = len(self._data)
        for array in (self._data, self._indices):
            array.resize(stop + values, refcheck=False)
        return stop

    def _pointer(self) -> np.ndarray:
        return np.concatenate([[0], *self._lengths]).cumsum(dtype=np.int64)


@final
class Spill:
    """Rows with their values in a file without a name, which is gone when it is closed or the process ends.

    Parameters
    ----------
    folder
        Where the disk space is taken; that of temporary files when None. 8 bytes a stored value.
    name
        What messages of a full disk call it.
    """

    def __init__(self, folder: Path | None, name: str = "sketch") -> None:
        self._target = (folder or Path(tempfile.gettempdir())) / name
        self._blocks: list[tuple[np.ndarray, np.ndarray, int]] = []
        with disk_errors(self._target):
            self._file = tempfile.TemporaryFile(dir=folder)
        self._end = 0

    def __enter__(self) -> Spill:
        """Return the spill."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the disk space back."""
        self._file.close()

    def append(self, rows: np.ndarray, x_ng: sparse.csr_matrix) -> None:
        """Write (m,) row numbers' values.

        Raises
        ------
        RunError
            The disk is full.
        """
        with disk_errors(self._target):
            x_ng.data.astype(np.float32, copy=False).tofile(self._file)
            x_ng.indices.astype(np.int32, copy=False).tofile(self._file)
        self._blocks.append((rows, np.asarray(x_ng.indptr), self._end))
        self._end += 8 * x_ng.nnz

    def blocks(self, width: int) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Yield what was written, block by block: row numbers and (m, width) values."""
        for rows, pointer, offset in self._blocks:
            self._file.seek(offset)
            data = np.fromfile(self._file, np.float32, int(pointer[-1]))
            indices = np.fromfile(self._file, np.int32, int(pointer[-1]))
            yield rows, sparse.csr_matrix((data, indices, pointer), shape=(len(rows), width))

    def take(self, rows: np.ndarray, width: int) -> sparse.csr_matrix:
        """Return the values of some of the rows (sorted) that were written, (m, width)."""
        taken = RowStack(width)
        for there, x_ng in self.blocks(width):
            wanted = np.isin(there, rows)
            if wanted.any():
                taken.append(x_ng[wanted])
        return taken.matrix()
