"""How novel cells are -> how novel they and their kin are: the cells of the same batch that are most like them.

A type that the reference lacks is many cells that are alike, an outlier is one. What many of them have in common tells
the first from the second: a mean score that is high, and above all a mean way from the reference that is long, since
noise is another way in each. A batch can be off as a whole, so that ways are those from the median way of the half of
its cells that score less, and what comes out is that above the lower quartile of its cells'. (Not the median: a type
that the reference lacks can be up to three quarters of a batch; one that is more hides itself.) A batch that lies in
few of the reference's clusters has cells of one or two types, and cannot tell what it is as a whole: what batches of
the reference usually score is taken for it. Of a batch of less than 20 cells each is looked at alone, and as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from schelix_scale.graph.vectors import row_blocks, unit_rows
from schelix_scale.mapping.evidence import Evidence, together

SIZES, SHARE = (1, 2, 4, 8, 15, 30), 7  # cells and their kin: the most that are no more than one in seven of a pool
LARGE = 1_000  # cells of a pool, for more than 15 kin: in a smaller one these are of related types, too
ALONE = 20  # cells that a pool has at least, for any to have kin
FEWER = 2  # places before in `SIZES`: a rare type has too few cells for the most, so that a quarter counts, too
AROUND = 3  # cells of a pool, nearest to a cell, whose expression speaks for it
BLOCK = 2_048
QUARTILE = 0.25
TOLD = 0.25, 0.5  # share of the usual number of clusters at which a batch says nothing and all of what it is as a whole


@dataclass(frozen=True)
class Usual:
    """What is usual in held-out batches.

    Attributes
    ----------
    spread
        In how many clusters a batch lies, see `spread_of`.
    score_cz
        (2, 6) lower quartile of what its cells score with each number of `SIZES`, see `Evidence`; 0 for single cells.
    """

    spread: float
    score_cz: np.ndarray

    def told(self, spread: float) -> float:
        """Return how far a batch in so many clusters tells what it is as a whole, from 0 to 1."""
        none, whole = TOLD
        return float(np.clip((spread / max(self.spread, 1.0) - none) / (whole - none), 0.0, 1.0))


def spread_of(weights_mk: np.ndarray) -> float:
    """Return in how many clusters cells lie, given their soft weights (m, K), rows sum to 1; 1 of a single cell.

    One over the chance that two of them share a cluster. That is no larger in a small batch than in a large one.
    """
    m = len(weights_mk)
    shared = float((weights_mk.sum(axis=0) ** 2).sum() - (weights_mk**2).sum())
    return float(np.clip(m * (m - 1) / max(shared, 1e-12), 1.0, weights_mk.shape[1])) if m > 1 else 1.0


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
    usual_way_d, usual_cz
        (d,) and (2, z) median way of the half of its cells that score less, and what its cells usually score with each
        number of kin up to ``size``: as far as the batch tells it. 0 of single cells.
    size
        Which of `SIZES` its cells are looked at with, see `most_kin`.
    left_cp
        (2, p) what the expression of each of them and its kin adds to its scores, see `expression.Shared`.
    alike_cp
        (2, p) what that of each of them and those most alike adds to its own, see `alike.UsuallyAlike`.
    """

    rows: np.ndarray
    unit_pd: np.ndarray
    own: Evidence
    usual_way_d: np.ndarray
    usual_cz: np.ndarray
    size: int
    left_cp: np.ndarray
    alike_cp: np.ndarray

    @classmethod
    def of_cells(
        cls,
        rows: np.ndarray,
        raw_pd: np.ndarray,
        own: Evidence,
        most: int = len(SIZES) - 1,
        usual: Usual | None = None,
        spread: float = np.inf,
        left_cp: np.ndarray | None = None,
        alike_cp: np.ndarray | None = None,
    ) -> Pool:
        """Make a pool of cells (p,), ascending.

        Parameters
        ----------
        most
            The largest size that it may have.
        usual, spread
            What is usual in other batches, and in how many clusters this one lies: without them the batch is taken to
            tell what it is as a whole.
        left_cp, alike_cp
            What their expression adds; nothing by default.
        """
        size = min(most, int(np.searchsorted(SIZES, most_kin(len(rows)), side="right")) - 1)
        nothing = np.zeros((2, len(rows)))
        adds = nothing if left_cp is None else left_cp, nothing if alike_cp is None else alike_cp
        found = cls(rows, unit_rows(raw_pd), own, np.zeros(own.way_md.shape[1]), np.zeros((2, size + 1)), size, *adds)
        if size == 0:
            return found
        told, likely = 1.0 if usual is None else usual.told(spread), likely_known(own)
        found = replace(found, usual_way_d=told * np.median(own.way_md[likely], axis=0).astype(np.float64))
        usual_cz = np.quantile(found.scores(rows, raw_pd, own), QUARTILE, axis=-1)
        if usual is not None:
            usual_cz = told * usual_cz + (1 - told) * usual.score_cz[:, : size + 1]
        usual_cz[:, 0] = 0.0
        return replace(found, usual_cz=usual_cz)

    def scores(self, rows: np.ndarray, raw_md: np.ndarray, own: Evidence) -> np.ndarray:
        """Return how novel cells and their kin are together, for each of `SIZES` up to that of the pool: (2, z, m).

        That is the mean of their scores and log(k |w|^2) of the mean w of their k ways, above what the batch has. What
        expression adds for a cell is what it adds for the three of the pool that are most like it.

        Parameters
        ----------
        rows
            (m,) numbers of the cells: one that is in the pool is not its own kin.
        raw_md, own
            Their uncorrected Anchor components, and what tells how novel each is.
        """
        sizes = SIZES[: self.size + 1]
        out = np.empty((2, len(sizes), len(rows)))
        for start, stop in row_blocks(len(rows), BLOCK):
            score, way = own.score_cm[:, start:stop], own.way_md[start:stop]
            left = bool(self.left_cp.any())
            near = self._nearest(rows[start:stop], raw_md[start:stop], max(sizes[-1] - 1, AROUND * left))
            if left:
                score = score + self.left_cp[:, near[:, :AROUND]].mean(axis=2)
            out[:, 0, start:stop] = together(score, way, 1)
            for place, k in enumerate(sizes[1:], 1):
                kin = near[:, : k - 1]
                of_kin = self.own.score_cm[:, kin] + self.left_cp[:, kin]
                theirs = np.sort(of_kin, axis=2).sum(axis=2)  # sorted: no order decides a digit
                away = way + self.own.way_md[kin].sum(axis=1, dtype=np.float64)  # exact: see `evidence.STEPS`
                out[:, place, start:stop] = together((score + theirs) / k, away / k - self.usual_way_d, k)
        return np.asarray(out - self.usual_cz[..., None])

    def alike(self, rows: np.ndarray, raw_md: np.ndarray) -> np.ndarray:
        """Return what `alike_cp` is of the three cells of the pool that are most like others, in the mean, (2, m).

        See `scores` for the parameters.
        """
        out = np.zeros((2, len(rows)))
        if self.alike_cp.any():
            for start, stop in row_blocks(len(rows), BLOCK):
                near = self._nearest(rows[start:stop], raw_md[start:stop], AROUND)
                out[:, start:stop] = self.alike_cp[:, near].mean(axis=2)
        return out

    def _nearest(self, rows: np.ndarray, raw_md: np.ndarray, count: int) -> np.ndarray:
        """Places (m, count) of the cells of the pool that are most like others, but for themselves, nearest first."""
        if not count:
            return np.zeros((len(rows), 0), np.int64)
        place = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        mine = np.flatnonzero(self.rows[place] == rows)
        return most_alike(unit_rows(raw_md), self.unit_pd, count, (mine, place[mine]))


def most_kin(cells: int) -> int:
    """Return how many cells are taken together in a pool of so many, at most."""
    if cells < ALONE:
        return 1
    return min(cells // SHARE, SIZES[-1] if cells >= LARGE else SIZES[-2])


def most_alike(unit_md: np.ndarray, unit_pd: np.ndarray, count: int, same: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return places (m, count) of the cells (p, d) that are most like others (m, d), nearest first.

    All are of norm 1; ``same`` are places among the others, and where they are among the cells: none is like itself.
    """
    alike = unit_md @ unit_pd.T
    alike[same] = -np.inf
    near = np.argpartition(-alike, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(alike, near, axis=1), axis=1, kind="stable")
    return np.take_along_axis(near, order, axis=1)


def likely_known(own: Evidence) -> np.ndarray:
    """Return which cells of a batch are probably not novel, (m,) bool: the half that score less, without labels."""
    score_m = own.score_cm[0]
    return np.asarray(score_m <= np.median(score_m)) if len(score_m) else np.zeros(0, bool)


@dataclass(frozen=True)
class KinScores:
    """How novel cells (m,) are together with their kin.

    Attributes
    ----------
    single
        Each cell alone.
    plain
        With as many kin as their pool allows, of ways from the batch's own, but not above what its cells score.
    most, fewer
        That above the batch's own, and with about a quarter of the kin.
    size
        Which of `SIZES` the first two are of.
    """

    single: np.ndarray
    plain: np.ndarray
    most: np.ndarray
    fewer: np.ndarray
    size: np.ndarray

    @classmethod
    def of_cells(
        cls,
        pools: Sequence[Pool],
        batch_m: np.ndarray,
        rows: np.ndarray,
        raw_md: np.ndarray,
        own: Evidence,
        at_most: tuple[int, int] = (len(SIZES) - 1, len(SIZES) - 1),
        alike_cm: np.ndarray | None = None,
    ) -> tuple[KinScores, KinScores]:
        """Score cells of several batches, each among the pool that has the number of its batch.

        The first are without what labels say, the second with it, each with no larger size than ``at_most``.
        ``alike_cm`` (2, m) is added to the scores of cells, not to those of their kin: nothing by default, and where
        it is not a number what it is of the cells of the pool that are most like them.
        """
        single, plain, most, fewer = np.empty((4, 2, len(rows)))
        size = np.empty((2, len(rows)), np.int64)
        for batch in np.unique(batch_m):
            mine, pool = np.flatnonzero(batch_m == batch), pools[batch]
            found = pool.scores(rows[mine], raw_md[mine], own[mine])
            if alike_cm is not None:
                adds = alike_cm[:, mine]
                unknown = np.flatnonzero(np.isnan(adds[0]))
                adds[:, unknown] = pool.alike(rows[mine[unknown]], raw_md[mine[unknown]])
                found = found + adds[:, None]
            single[:, mine] = found[:, 0]
            for c, largest in enumerate(at_most):
                place = min(pool.size, largest)
                size[c, mine], most[c, mine], fewer[c, mine] = place, found[c, place], found[c, less(place)]
                plain[c, mine] = found[c, place] + pool.usual_cz[c, place]
        without, with_labels = (cls(single[c], plain[c], most[c], fewer[c], size[c]) for c in (0, 1))
        return without, with_labels


def less(size: int) -> int:
    """Return which of `SIZES` is about a quarter of this one: itself for a single cell, and for two."""
    return max(min(size, 1), size - FEWER)
