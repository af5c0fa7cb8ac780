"""How novel cells are -> how novel they and their kin are: the cells of the same batch that are most like them.

A type that the reference lacks is many cells that are alike, an outlier is one: their mean tells the first from the
second, which single cells do not. Most of all that of which way they are from the reference: what is noise is another
way in each, and the mean of 15 is a quarter as far, but all cells of a type that the reference lacks are away in one.
A batch can be off as a whole, so that mean scores are those above the batch's lower quartile; not its median, since
more than half of a batch can be of a type that the reference lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from schelix_scale.graph.vectors import row_blocks, unit_rows
from schelix_scale.mapping.novelty import Evidence, together

SIZES, SHARE = (1, 2, 4, 8, 15), 10  # cells of a mean: the most that are no more than one in ten of a pool
POOL = 1_000
USUAL = 0.25  # quantile of a batch's scores that says how far off it is as a whole
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
    own
        What tells how novel each of them is.
    """

    rows: np.ndarray
    unit_pd: np.ndarray
    own: Evidence

    @classmethod
    def of_cells(cls, rows: np.ndarray, raw_pd: np.ndarray, own: Evidence) -> Pool:
        """Make a pool of cells (p,), ascending."""
        return cls(rows, unit_rows(raw_pd), own)

    @property
    def size(self) -> int:
        """Which of `SIZES` the means are of: 15 cells, or fewer in a pool of less than 150, where kin are few."""
        return max(0, int(np.searchsorted(SIZES, len(self.rows) // SHARE, side="right")) - 1)

    def above(self, score_m: np.ndarray, size: int) -> np.ndarray:
        """Return by how much scores of kin exceed the lower quartile of the pool; those of single cells as they are."""
        return score_m - np.quantile(self.own.score_m, USUAL) if size else score_m

    def scores(self, rows: np.ndarray, raw_md: np.ndarray, own: Evidence, size: int | None = None) -> np.ndarray:
        """Return how novel each cell and its nearest others of the pool are together, (m,).

        The mean of their scores, and log(|w|^2) of the mean w of the ways that they are from the reference.

        Parameters
        ----------
        rows
            (m,) numbers of the cells: one that is in the pool is not its own kin.
        raw_md, own
            Their uncorrected Anchor components, and what tells how novel each is.
        size
            Which of `SIZES`; no more than that of this pool, which is the default.
        """
        k = SIZES[self.size if size is None else min(size, self.size)] - 1
        if k < 1:
            return own.single
        out = np.empty(len(rows))
        for start, stop in row_blocks(len(rows), BLOCK):
            alike = unit_rows(raw_md[start:stop]) @ self.unit_pd.T
            place = np.minimum(np.searchsorted(self.rows, rows[start:stop]), len(self.rows) - 1)
            mine = np.flatnonzero(self.rows[place] == rows[start:stop])
            alike[mine, place[mine]] = -np.inf
            near = np.argpartition(-alike, k - 1, axis=1)[:, :k]
            theirs = np.sort(self.own.score_m[near], axis=1).sum(axis=1)  # sorted: the order of cells decides no digit
            away = own.away_md[start:stop] + self.own.away_md[near].sum(axis=1)  # exact: see `novelty.STEPS`
            out[start:stop] = together((own.score_m[start:stop] + theirs) / (k + 1), away / (k + 1))
        return out


@dataclass(frozen=True)
class KinScores:
    """How novel cells (m,) are.

    Attributes
    ----------
    kin, single
        Of cells and their kin together, and of each cell alone.
    above
        By how much the first exceed the batch's lower quartile; of single cells as they are.
    size
        Which of `SIZES` the first are of.
    """

    kin: np.ndarray
    single: np.ndarray
    above: np.ndarray
    size: np.ndarray

    @classmethod
    def of_cells(
        cls, pools: Sequence[Pool], batch_m: np.ndarray, rows: np.ndarray, raw_md: np.ndarray, own: Evidence
    ) -> KinScores:
        """Score cells of several batches, each among the pool that has the number of its batch."""
        kin, above, size = np.empty(len(rows)), np.empty(len(rows)), np.empty(len(rows), np.int64)
        for batch in np.unique(batch_m):
            mine, pool = np.flatnonzero(batch_m == batch), pools[batch]
            kin[mine] = pool.scores(rows[mine], raw_md[mine], own[mine])
            above[mine], size[mine] = pool.above(kin[mine], pool.size), pool.size
        return cls(kin, own.single, above, size)
