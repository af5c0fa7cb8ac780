"""What is left over of expression -> how much of it each cell has in common with those of its batch most alike in it.

A type that the reference lacks can lie scattered among others in the reference's components, so that its cells are not
kin there: those with genes of their own that nothing else tells. They are alike in what is left over. Noise makes the
most alike of hundreds of cells so, too; how much is measured on held-out batches. Cells of a known type that lies
scattered are alike as well, but also with cells of other batches, see `strange`: that is taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from schelix_scale.graph.vectors import row_blocks
from schelix_scale.mapping.evidence import STEPS
from schelix_scale.mapping.kin import SHARE
from schelix_scale.mapping.leftover import LeftOver, Told
from schelix_scale.mapping.profiles import TINY
from schelix_scale.mapping.strange import Strange, cut, furthest, largest, products

LEAST = 28  # cells of a pool, for any to be alike
MOST = 12  # cells that are most alike, at most: one in seven of a pool with the cell itself, if that is less
KNEE, HIGH = 0.9, 0.99  # of held-out cells are below what counts, and below what is high
MANY = 0.03  # of a pool above what is high, three times as many as usual: the other cells of its batch are read again
FEWEST = 5  # of a small pool: fewer are often there by chance
WEIGHT = 5.0  # how much it counts, beside how far a cell is
PART = 1_024  # cells that are compared at once
COPY = 1e-6  # cosine distance below which a cell is a copy of another


@dataclass(frozen=True)
class Alike:
    """Cells of a pool with which cells of the same batch are compared.

    Attributes
    ----------
    left_ph, unit_pa
        (p, h) float32 what is left over of them, and (p, a) corrected Anchor components, of norm 1.
    product_pp
        (p, p) float32 what each two have in common: 0 of copies of a cell.
    most
        How many that are most alike count.
    usual
        What cells of the batch that are probably not novel have in common with these, in the median.
    strange, usual_elsewhere, knee
        Cells of other batches, what those cells have in common with these, and above which value cells are compared
        with these; None and 0 while held-out ones are not yet.
    """

    left_ph: np.ndarray
    unit_pa: np.ndarray
    product_pp: np.ndarray
    most: int
    usual: float
    strange: Strange | None = None
    usual_elsewhere: float = 0.0
    knee: float = 0.0

    @classmethod
    def of_pool(
        cls, left: LeftOver, strange: Strange | None = None, knee: float = 0.0
    ) -> tuple[Alike | None, np.ndarray]:
        """Compare all cells of a pool with each other, and those above a knee with strange cells of other batches.

        Returns
        -------
        None for a pool of less than 28 cells; and what its cells have in common with those most alike, (p,), as a
        multiple of what is usual in the batch, less by how much more than usual they have in common with cells of other
        batches, as far as what is left over of a cell counts: 0 if it is not known.
        """
        p = len(left.left_ph)
        if p < LEAST:
            return None, np.zeros(p)
        values = cut(left.left_ph)
        product = products(values, values)
        same = left.same_p[:, None] == left.same_p
        pairs = np.where(same, 0.0, product).astype(np.float32)
        found = cls(values, left.unit_pa, pairs, min(MOST, p // SHARE - 1), 1.0)
        common = found._with_most_alike(values, np.where(same, -np.inf, product))
        usual = float(np.median(np.abs(common[left.likely_p]))) if left.likely_p.any() else 0.0
        if usual <= TINY:
            return None, np.zeros(p)
        found = replace(found, usual=usual)
        if strange is not None:
            elsewhere = strange.usual(values, left.likely_p, found.most)
            found = replace(found, strange=strange, usual_elsewhere=elsewhere, knee=knee)
        return found, found._less_elsewhere(values, common / usual, left.counts_p)

    def of_others(self, left_mh: np.ndarray, counts_m: np.ndarray, unit_ma: np.ndarray) -> np.ndarray:
        """Return what other cells of the batch have in common with the most alike of these, (m,), see `of_pool`."""
        values = cut(left_mh)
        product = products(values, self.left_ph)
        product[unit_ma @ self.unit_pa.T > 1 - COPY] = -np.inf
        return self._less_elsewhere(values, self._with_most_alike(values, product) / self.usual, counts_m)

    def _less_elsewhere(self, left_mh: np.ndarray, common_m: np.ndarray, counts_m: np.ndarray) -> np.ndarray:
        """Take off what cells above the knee have in common with strange ones: what others have adds nothing."""
        found = counts_m * common_m
        high = np.flatnonzero(found > self.knee)
        if self.strange is not None and len(high):
            found[high] -= counts_m[high] * self.strange.more(left_mh[high], self.most, self.usual_elsewhere)
        return np.asarray(found)

    def _with_most_alike(self, left_mh: np.ndarray, product_mp: np.ndarray) -> np.ndarray:
        """Mean over the pairs (m,) of a cell and those most alike it; -inf where the two are copies: not alike.

        Pairs of the latter count no more than the cell itself has in common with them: it is not one of them otherwise.
        What the two genes add that add most is left out: a batch can be off by as many in one type.
        """
        k = self.most
        near = np.argpartition(-product_mp, k - 1, axis=1)[:, :k]
        near.sort(axis=1)  # no order decides a digit
        own = np.take_along_axis(product_mp, near, axis=1)
        own_m = np.where(np.isfinite(own), own, 0.0).sum(axis=1) / k
        pairs = self.product_pp[near[:, :, None], near[:, None, :]].sum(axis=(1, 2), dtype=np.float64)
        theirs_m = pairs / max(k * (k - 1), 1)
        top = furthest(left_mh)
        theirs = self.left_ph[near[:, :, None], top[:, None, :]].astype(np.float64) * np.isfinite(own)[:, :, None]
        sum_mt = theirs.sum(axis=1)
        own_m -= largest(np.take_along_axis(left_mh, top, axis=1) * sum_mt) / k
        theirs_m -= largest(sum_mt**2 - (theirs**2).sum(axis=1)) / max(k * (k - 1), 1)
        return np.asarray((2 * own_m + (k - 1) * np.minimum(theirs_m, own_m)) / (k + 1))


@dataclass(frozen=True)
class Among:
    """A pool with which other cells of its batch are compared, some at a time: their genes are dense."""

    told: Told
    alike: Alike

    def __call__(
        self, own_mh: sparse.csr_matrix, measured_mh: np.ndarray | None, unit_ma: np.ndarray, held_m: np.ndarray
    ) -> np.ndarray:
        """Return what cells have in common with the most alike of the pool, (m,); see `LeftOver.of_pool`."""
        out = np.zeros(len(unit_ma))
        for start, stop in row_blocks(len(out), PART):
            part = slice(start, stop)
            known = None if measured_mh is None else measured_mh[part]
            left, counts = self.told.left_over(own_mh[part], known, unit_ma[part], held_m[part])
            out[part] = self.alike.of_others(left, counts, unit_ma[part])
        return out

    @staticmethod
    def bytes_of(pool: int, genes: int) -> int:
        """Memory of a pool of so many cells."""
        return 4 * pool * (pool + genes)


@dataclass(frozen=True)
class UsuallyAlike:
    """How much cells of known types have in common with those most alike, as multiples of what is usual in a batch.

    Attributes
    ----------
    knee, high
        What 90 and 99 % of the cells of a held-out batch are below, in the median over batches; infinite if that is not
        known: then it says nothing of new cells.
    """

    knee: float
    high: float

    @classmethod
    def fit(cls, parts: Sequence[np.ndarray]) -> UsuallyAlike:
        """Take held-out batches, (p,) each, whose expression is known."""
        if not parts:
            return cls(np.inf, np.inf)
        knee, high = (float(np.median([np.quantile(part, level) for part in parts])) for level in (KNEE, HIGH))
        return cls(knee, high) if knee > TINY else cls(np.inf, np.inf)

    def adds(self, alike_m: np.ndarray, often_m: np.ndarray) -> np.ndarray:
        """Return what it adds to scores, (2, m), without and with what labels say: 5 log(t / knee), and of f^2 t.

        At least 0. ``often_m`` is f, see `odd_votes.often`.
        """
        both = np.stack([alike_m, often_m**2 * alike_m]) / self.knee
        return np.asarray(np.rint(WEIGHT * np.log(np.maximum(both, 1.0)) * STEPS) / STEPS)

    def looks_again(self, alike_p: np.ndarray) -> bool:
        """Say whether a pool has at least three times as many cells above what is high as usual, and five."""
        return bool((alike_p > self.high).sum() >= max(MANY * len(alike_p), FEWEST))
