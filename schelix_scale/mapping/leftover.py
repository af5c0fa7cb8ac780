"""Expression of cells of one batch -> what is left of it that neighbours and batch do not tell.

The components of a reference hold what its own cells differ in. What a type that it lacks differs in beside that is not
in them: its cells land among their nearest relatives, and look at home there. It is left over when the expression of
the neighbours is taken off; noise is left over, too, but is another in each cell, and what a batch is off by is left
over in all of its cells. What one batch of the reference is off by is left over of cells whose neighbours are all of
it, as those of a type that it alone has: it counts less, or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from schelix_scale.mapping.profiles import TINY, Around, Profiles

CALM = 10.0  # cells of average spread that say that a batch measures a gene as the reference does


@dataclass(frozen=True)
class Baseline:
    """What a batch is off by, of each gene: left over is what is above the neighbours' and this.

    Attributes
    ----------
    mean_h
        (h,) by how much its cells are above their neighbours.
    centre_h, slope_h
        (h,) neighbours' mean, and how much more its cells are above them for each unit above that: a batch can measure
        a gene better or worse.
    rest_h
        (h,) the mean of what is left then.
    """

    mean_h: np.ndarray
    centre_h: np.ndarray
    slope_h: np.ndarray
    rest_h: np.ndarray

    @classmethod
    def fit(
        cls, own_ph: np.ndarray, around_ph: np.ndarray, known_ph: np.ndarray | None, likely_p: np.ndarray
    ) -> Baseline:
        """Fit to cells of a batch.

        Parameters
        ----------
        own_ph, around_ph
            Expression of the cells, and the mean of their neighbours.
        known_ph
            Which genes are known of both; None: all.
        likely_p
            Which cells are probably not novel: a type that is a large part of a batch must not be taken for its mean.
        """
        known = np.ones(1, bool) if known_ph is None else known_ph
        left = (own_ph - around_ph) * known
        mean_h = _mean(left, known_ph, likely_p)
        left -= mean_h * known
        centre_h, spread = _spread(around_ph, known_ph)
        slope_h = (spread * left).sum(axis=0) / _square(spread, known_ph)
        left -= spread * slope_h
        return cls(mean_h, centre_h, slope_h, _mean(left, known_ph, likely_p))

    def __call__(self, own_mh: np.ndarray, around_mh: np.ndarray, known_mh: np.ndarray | None) -> np.ndarray:
        """Return what is left over of cells of the batch, (m, h).

        Of genes that are not known nothing is, and what is left of the others stands for them.
        """
        known = np.ones(1, bool) if known_mh is None else known_mh
        left = (own_mh - around_mh) * known
        left -= self.mean_h * known
        left -= (around_mh - self.centre_h) * known * self.slope_h
        left -= self.rest_h * known
        if known_mh is not None:
            left *= np.sqrt(known_mh.shape[1] / np.maximum(known_mh.sum(axis=1, keepdims=True), 1)).astype(np.float32)
        return np.asarray(left)


@dataclass(frozen=True)
class Told:
    """What neighbours in the reference, and the batch, tell of the expression of its cells.

    Attributes
    ----------
    profiles, batch
        The neighbours, and the batch of them that is left out: the one whose cells are held out, or None.
    base
        What the batch is off by.
    """

    profiles: Profiles
    batch: int | None
    base: Baseline

    def left_over(
        self, own_mh: sparse.csr_matrix, measured_mh: np.ndarray | None, unit_ma: np.ndarray, held_m: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what is left over of cells, (m, h) in standard deviations among neighbours, and how far it counts.

        For the parameters see `LeftOver.of_pool`, for the second array, (m,), `LeftOver.counts_p`.
        """
        around = self.profiles.around(unit_ma, self.batch)
        left = self.base(own_mh.toarray(), around.mean_mh, _both(measured_mh, around.known_mh))
        left *= self.profiles.weight_h.astype(np.float32)
        return left, self.profiles.mixed(around, self.batch) * held_m


@dataclass(frozen=True)
class LeftOver:
    """What is left over of cells of one batch: a pool.

    Attributes
    ----------
    left_ph
        (p, h) of each gene, in standard deviations among neighbours.
    around_ph, known_ph
        (p, h) neighbours' mean expression, and which genes are known of both; None: all.
    likely_p
        Which cells are probably not novel.
    counts_p
        (p,) how far it counts: not at all where all neighbours are of one batch, or of batches of which the profiles
        have no cells.
    unit_pa, same_p
        (p, a) corrected Anchor components, of norm 1; and numbers of the cells, of copies of a cell the same one.
    told
        What was taken off.
    """

    left_ph: np.ndarray
    around_ph: np.ndarray
    known_ph: np.ndarray | None
    likely_p: np.ndarray
    counts_p: np.ndarray
    unit_pa: np.ndarray
    same_p: np.ndarray
    told: Told

    @classmethod
    def of_pool(
        cls,
        profiles: Profiles,
        own_ph: sparse.csr_matrix,
        measured_ph: np.ndarray | None,
        unit_pa: np.ndarray,
        likely_p: np.ndarray,
        held_p: np.ndarray,
        batch: int | None = None,
        around: Around | None = None,
    ) -> LeftOver:
        """Take off what neighbours and batch tell.

        Parameters
        ----------
        own_ph
            Expression of the cells, see `profiles.Scaling`.
        measured_ph
            Which genes were measured in them; None: all.
        unit_pa
            Their corrected Anchor components, of norm 1.
        likely_p
            Which of them are probably not novel.
        held_p
            (p,) which share of the cells around them, of the whole reference, are of batches that the profiles have:
            where a run was extended, its new batches may have a type that these do not.
        batch
            That of the reference whose cells they are, if they are held out.
        around
            The cells around them, if they are known.
        """
        own, around = own_ph.toarray(), around or profiles.around(unit_pa, batch)
        known = _both(measured_ph, around.known_mh)
        base = Baseline.fit(own, around.mean_mh, known, likely_p)
        left = base(own, around.mean_mh, known) * profiles.weight_h.astype(np.float32)
        counts = profiles.mixed(around, batch) * held_p
        same = np.unique(unit_pa, axis=0, return_inverse=True)[1].ravel()
        return cls(left, around.mean_mh, known, likely_p, counts, unit_pa, same, Told(profiles, batch, base))


def of_noise(
    left_ph: np.ndarray, around_ph: np.ndarray, known_ph: np.ndarray | None, likely_p: np.ndarray
) -> np.ndarray:
    """Return what products (p, p) of what is left of two cells are in the mean if it is noise; of a cell itself: 0.

    Not 0, since means and slopes were fitted to the same cells: the fewer these are, the more. As far as terms of
    one over their number go.
    """
    variance_h = (left_ph.astype(np.float64) ** 2).mean(axis=0)
    spread = _spread(around_ph, known_ph)[1]
    scaled = spread * np.sqrt(variance_h / _square(spread, known_ph))
    mean_pp = (1.0 - likely_p[:, None] - likely_p) / max(int(likely_p.sum()), 1) * variance_h.sum()
    found = mean_pp - scaled @ scaled.T
    np.fill_diagonal(found, 0.0)
    return np.asarray(found)


def _spread(around_ph: np.ndarray, known_ph: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean (h,) of neighbours' expression, and what it is less that, (p, h)."""
    known = np.ones(1, bool) if known_ph is None else known_ph
    centre_h = _mean(around_ph * known, known_ph, slice(None))
    return centre_h, (around_ph - centre_h) * known


def _both(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    if one is None or other is None:
        return other if one is None else one
    return np.asarray(one & other)


def _square(spread_ph: np.ndarray, known_ph: np.ndarray | None) -> np.ndarray:
    """Sum of squares (h,) of neighbours' expression less its mean, that slopes are divided by."""
    square_h = (spread_ph**2).sum(axis=0)
    mean = square_h.sum() / (spread_ph.size if known_ph is None else max(int(known_ph.sum()), 1))
    return np.asarray(square_h + CALM * mean + TINY)


def _mean(x_ph: np.ndarray, known_ph: np.ndarray | None, rows: np.ndarray | slice) -> np.ndarray:
    """Mean of genes (h,) over those of the rows in which they are known; elsewhere they are 0."""
    if known_ph is None:
        return np.asarray(x_ph[rows].mean(axis=0))
    return np.asarray(x_ph[rows].sum(axis=0) / np.maximum(known_ph[rows].sum(axis=0), 1).astype(np.float32))
