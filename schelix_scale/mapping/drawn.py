"""All cells of new batches, block after block -> the expression of a few of each, on disk: one pass over the store.

Cells are drawn by what is measured of them, so that neither their order nor the threads have a part in which they are.
Of a block those are spilled that are among the first of their batch so far: of a batch of n cells about
k (1 + log(n / k)), of which k are kept. Memory holds their numbers alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self, final

import numpy as np
from scipy import sparse

from schelix_scale.arrays import create_array, load_array, map_array
from schelix_scale.genes.sweep import Spill

DRAWN = "features/drawn"


@final
class Drawing:
    """Collects the first cells of each batch and their values, from several threads.

    Parameters
    ----------
    batches
        How many batches there are.
    count
        Cells of a batch, at most.
    genes
        (h,) positions of the genes whose values are kept.
    folder
        Where values wait until all cells have passed by: 8 bytes a value, in a file without a name.
    """

    def __init__(self, batches: int, count: int, genes: np.ndarray, folder: Path) -> None:
        self._count, self._genes = count, genes
        self._order = [np.zeros(0, np.uint64)] * batches
        self._rows = [np.zeros(0, np.int64)] * batches
        self._last = np.full(batches, np.iinfo(np.uint64).max, np.uint64)  # of those that are kept: falls, never rises
        self._spill, self._lock = Spill(folder, "drawn"), Lock()

    def __enter__(self) -> Self:
        """Return the drawing."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the disk space back."""
        self._spill.__exit__()

    def offer(
        self, rows: np.ndarray, batch_m: np.ndarray, order_m: np.ndarray, x_mg: sparse.csr_matrix, seen_m: np.ndarray
    ) -> None:
        """Let cells pass by.

        Parameters
        ----------
        rows, batch_m
            (m,) their numbers, none of which passes by twice, and batches.
        order_m
            (m,) uint64 by which they are drawn, least first; of the same ones the first row.
        x_mg
            (m, g) their values of all genes.
        seen_m
            Which of them may be drawn.
        """
        maybe = np.flatnonzero(seen_m & (order_m <= self._last[batch_m]))
        maybe = maybe[np.argsort(batch_m[maybe], kind="stable")]
        of_batch = np.split(maybe, np.flatnonzero(np.diff(batch_m[maybe])) + 1) if len(maybe) else []
        with self._lock:
            found = [self._among_first(int(batch_m[mine[0]]), rows, mine, order_m) for mine in of_batch]
        kept = np.sort(np.concatenate([np.zeros(0, np.int64), *found]))
        if len(kept):
            x_kh = x_mg[kept][:, self._genes]
            with self._lock:
                self._spill.append(rows[kept], x_kh)

    def _among_first(self, batch: int, rows: np.ndarray, mine: np.ndarray, order_m: np.ndarray) -> np.ndarray:
        """Take up the cells of a batch that are among its first so far; return their places."""
        order = np.r_[self._order[batch], order_m[mine]]
        numbers = np.r_[self._rows[batch], rows[mine]]
        first = np.lexsort((numbers, order))[: self._count]
        self._order[batch], self._rows[batch] = order[first], numbers[first]
        if len(first) == self._count:
            self._last[batch] = order[first[-1]]
        new = first[first >= len(order) - len(mine)] - (len(order) - len(mine))
        return np.asarray(mine[new])

    def write(self, folder: Path, known_gh: np.ndarray) -> None:
        """Write a directory that `Drawn.open` opens; ``known_gh`` are the genes that each group of cells measured."""
        folder.mkdir(parents=True)
        rows = np.concatenate(self._rows)
        by_row = np.argsort(rows)
        length = np.zeros(len(rows), np.int64)
        for there, x_bh in self._spill.blocks(len(self._genes)):
            places, mine = _places(rows, by_row, there)
            length[places] = np.diff(x_bh.indptr)[mine]
        pointer = np.r_[0, length.cumsum()]
        data = create_array(folder / "data.npy", (int(pointer[-1]),), "float32")
        indices = create_array(folder / "indices.npy", (int(pointer[-1]),), "int32")
        for there, x_bh in self._spill.blocks(len(self._genes)):
            places, mine = _places(rows, by_row, there)
            x_ph = x_bh[mine]
            target = np.repeat(pointer[places] - x_ph.indptr[:-1], np.diff(x_ph.indptr)) + np.arange(x_ph.nnz)
            data[target], indices[target] = x_ph.data, x_ph.indices
        for array in (data, indices):
            array.flush()
        np.save(folder / "pointer.npy", pointer)
        np.save(folder / "rows.npy", rows)
        np.save(folder / "starts.npy", np.cumsum([0, *map(len, self._rows)]))
        np.save(folder / "known.npy", known_gh)


def _places(rows: np.ndarray, by_row: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places among ``rows`` of those of a block that are there, and their places in the block."""
    found = np.minimum(np.searchsorted(rows, there, sorter=by_row), max(len(rows) - 1, 0))
    mine = np.flatnonzero(rows[by_row[found]] == there)
    return by_row[found[mine]], mine


@dataclass(frozen=True)
class Drawn:
    """Drawn cells, batch by batch, and in each as they were drawn.

    Attributes
    ----------
    rows, starts
        (r,) their numbers, and (b + 1,) where each batch begins and ends.
    pointer, indices, data
        Of their values as CSR, the last two memory maps.
    known_gh
        (g, h) bool: which genes each group of cells measured.
    """

    rows: np.ndarray
    starts: np.ndarray
    pointer: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    known_gh: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> Drawn:
        """Open what `Drawing.write` wrote."""
        rows, starts, pointer = (load_array(folder / f"{name}.npy") for name in ("rows", "starts", "pointer"))
        indices, data = (map_array(folder / f"{name}.npy") for name in ("indices", "data"))
        return cls(rows, starts, pointer, indices, data, load_array(folder / "known.npy"))

    def of_batch(self, batch: int, count: int) -> tuple[np.ndarray, sparse.csr_matrix]:
        """Return the first cells of a batch, ``count`` at most, as they were drawn: numbers and (m, h) values."""
        start = int(self.starts[batch])
        stop = min(start + count, int(self.starts[batch + 1]))
        pointer = self.pointer[start : stop + 1]
        span = slice(int(pointer[0]), int(pointer[-1]))
        parts = np.asarray(self.data[span]), np.asarray(self.indices[span]), pointer - pointer[0]
        return self.rows[start:stop], sparse.csr_matrix(parts, shape=(stop - start, self.known_gh.shape[1]))
