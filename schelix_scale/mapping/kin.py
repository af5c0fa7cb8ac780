"""Novelty scores of cells -> those of cells and their kin: the cells of the same batch that are most like them.

A type that the reference lacks is many cells that are alike, an outlier is one: their mean tells the first from the
second, which single scores do not. A batch can be off as a whole, so that means are those above the batch's median.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from schelix_scale.graph.vectors import row_blocks, unit_rows

SIZES, SHARE = (1, 2, 4, 8, 15), 10  # cells of a mean: the most that are no more than one in ten of a pool
POOL = 1_000
BLOCK = 2_048


@dataclass(frozen=True)
class Pool:
    """Cells of one batch, among which its cells have their kin.

    Attributes
    ----------
    rows
        (p,) numbers of the cells, ascending.
    unit_pd
        (p, d) their uncorrected Anchor components, scaled to norm 1: a batch's cells are displaced alike.
    score_p
        (p,) their own scores.
    """

    rows: np.ndarray
    unit_pd: np.ndarray
    score_p: np.ndarray

    @classmethod
    def of_cells(cls, rows: np.ndarray, raw_pd: np.ndarray, score_p: np.ndarray) -> Pool:
        """Make a pool of cells (p,), ascending."""
        return cls(rows, unit_rows(raw_pd), score_p)

    @property
    def size(self) -> int:
        """Which of `SIZES` the means are of: 15 cells, or fewer in a pool of less than 150, where kin are few."""
        return max(0, int(np.searchsorted(SIZES, len(self.rows) // SHARE, side="right")) - 1)

    def above(self, mean_m: np.ndarray, size: int) -> np.ndarray:
        """Return by how much mean scores exceed the median of the pool; those of single cells as they are."""
        return mean_m - np.median(self.score_p) if size else mean_m

    def mean_scores(
        self, rows: np.ndarray, raw_md: np.ndarray, score_m: np.ndarray, size: int | None = None
    ) -> np.ndarray:
        """Return the mean score, (m,), of each cell and its nearest others of the pool.

        Parameters
        ----------
        rows
            (m,) numbers of the cells: one that is in the pool is not its own kin.
        raw_md, score_m
            Their uncorrected Anchor components, and own scores.
        size
            Which of `SIZES`; no more than that of this pool, which is the default.
        """
        k = SIZES[self.size if size is None else min(size, self.size)] - 1
        if k < 1:
            return score_m
        out = np.empty(len(rows))
        for start, stop in row_blocks(len(rows), BLOCK):
            alike = unit_rows(raw_md[start:stop]) @ self.unit_pd.T
            own = np.minimum(np.searchsorted(self.rows, rows[start:stop]), len(self.rows) - 1)
            mine = np.flatnonzero(self.rows[own] == rows[start:stop])
            alike[mine, own[mine]] = -np.inf
            near = np.argpartition(-alike, k - 1, axis=1)[:, :k]
            theirs = np.sort(self.score_p[near], axis=1).sum(axis=1)  # sorted: the order of cells decides no digit
            out[start:stop] = (score_m[start:stop] + theirs) / (k + 1)
        return out


@dataclass(frozen=True)
class KinScores:
    """How novel cells (m,) are.

    Attributes
    ----------
    mean, own
        Mean scores of cells and their kin, and cells' own.
    above
        By how much the means exceed the median of the batch, which can be off as a whole; of single cells their scores.
    size
        Which of `SIZES` the means are of.
    """

    mean: np.ndarray
    own: np.ndarray
    above: np.ndarray
    size: np.ndarray

    @classmethod
    def of_cells(
        cls, pools: Sequence[Pool], batch_m: np.ndarray, rows: np.ndarray, raw_md: np.ndarray, own_m: np.ndarray
    ) -> KinScores:
        """Score cells of several batches, each among the pool that has the number of its batch."""
        mean, above, size = np.empty(len(rows)), np.empty(len(rows)), np.empty(len(rows), np.int64)
        for batch in np.unique(batch_m):
            mine, pool = np.flatnonzero(batch_m == batch), pools[batch]
            mean[mine] = pool.mean_scores(rows[mine], raw_md[mine], own_m[mine])
            above[mine], size[mine] = pool.above(mean[mine], pool.size), pool.size
        return cls(mean, own_m, above, size)
