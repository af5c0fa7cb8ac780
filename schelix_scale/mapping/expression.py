"""Expression of cells, and of reference cells that are like them -> how much of the rest kin have in common.

The components of a reference hold what its own cells differ in. What a type that it lacks differs in beside that is not
in them: its cells land among their nearest relatives, and look at home there. It is left over when the expression of
the neighbours is taken off; noise is left over, too, but is another in each cell, and what a batch is off by is left
over in all of its cells. What one batch of the reference is off by is left over of cells whose neighbours are all of
it, as those of a type that it alone has: it tells nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from schelix_scale.graph.vectors import unit_rows
from schelix_scale.mapping.evidence import STEPS
from schelix_scale.mapping.kin import most_alike
from schelix_scale.mapping.profiles import TINY, Profiles

SIZES, SHARE = (4, 8, 15), 7  # a cell and its kin: the most that are no more than one in seven of a pool
CALM = 10.0  # cells of average spread that say that a batch measures a gene as the reference does
WEIGHT = 2.0  # how much what is left over counts, beside how far a cell is


@dataclass(frozen=True)
class Shared:
    """How much of what is left over kin have in common, against what is usual in a reference.

    Attributes
    ----------
    usual_z
        (3,) see `usual_common`.
    """

    usual_z: np.ndarray

    def of_pool(self, common_pz: np.ndarray, often_p: np.ndarray) -> np.ndarray:
        """Return 2 log(1 + t / u) and 2 log(1 + f^2 t / u), (2, p), 0 where nothing is in common.

        Parameters
        ----------
        common_pz
            What is in common, t (p, z): the most kin count, the last column. Without any all are 0.
        often_p
            f, how far cells of the label that a cell would get can be all of its neighbours, see `odd_votes.often`.
        """
        size = common_pz.shape[1] - 1
        if size < 0:
            return np.zeros((2, len(common_pz)))
        share = np.maximum(common_pz[:, size], 0.0) / self.usual_z[size]
        found = WEIGHT * np.log1p(np.stack([share, often_p**2 * share]))
        return np.asarray(np.rint(found * STEPS) / STEPS)  # BLAS may round otherwise when other threads are at work


def pool_in_common(
    profiles: Profiles,
    own_ph: sparse.csr_matrix,
    known_ph: np.ndarray | None,
    unit_pa: np.ndarray,
    raw_pa: np.ndarray,
    likely_p: np.ndarray,
    told_p: np.ndarray,
    batch: int | None = None,
) -> np.ndarray:
    """Return what is left over of cells of one batch and their kin have in common, (p, z).

    Parameters
    ----------
    own_ph
        Their expression, see `profiles.Scaling`.
    known_ph
        Which genes were measured in them; None: all.
    unit_pa, raw_pa
        Their Anchor components: corrected, of norm 1; and uncorrected, by which they are kin.
    likely_p
        Which of them are probably not novel.
    told_p
        (p,) which share of the cells around them, of the whole reference, are of batches that the profiles have: where
        a run was extended, its new batches may have a type that these do not.
    batch
        That of the reference whose cells they are, if they are held out.

    Returns
    -------
    One column for each of `SIZES` that is no more than one in seven of the cells: none for less than 28.
    """
    sizes = [size for size in SIZES if size * SHARE <= len(raw_pa)]
    if not sizes:
        return np.zeros((len(raw_pa), 0))
    around = profiles.around(unit_pa, batch)
    known = around.known_mh
    if known_ph is not None:
        known = known_ph if known is None else known & known_ph
    weight = profiles.weight_h.astype(np.float32)
    left = (left_over(own_ph.toarray(), around.mean_mh, known, likely_p) * weight).astype(np.float64)
    product = left @ left.T - of_noise(left, around.mean_mh, known, likely_p)
    counts_p = profiles.mixed(around, batch) * told_p
    product *= np.outer(counts_p, counts_p)
    same = np.unique(unit_pa, axis=0, return_inverse=True)[1].ravel()
    product[same[:, None] == same] = 0.0  # copies of a cell, and a cell and itself, share their noise
    unit, every = unit_rows(raw_pa), np.arange(len(raw_pa))
    return in_common(product, most_alike(unit, unit, max(sizes) - 1, (every, every)), sizes)


def left_over(
    own_ph: np.ndarray, around_ph: np.ndarray, known_ph: np.ndarray | None, likely_p: np.ndarray
) -> np.ndarray:
    """Return what is left of the expression of cells of one batch (p, h) that neighbours and batch do not tell.

    Of each gene, that is what is above the neighbours', less its mean over cells that are probably not novel, and less
    a share of the neighbours': a batch can measure a gene better or worse. Of genes that are not known nothing is left,
    and what is left of the others stands for them.

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
    left -= _mean(left, known_ph, likely_p) * known
    spread, square_h = _spread(around_ph, known_ph)
    left -= spread * ((spread * left).sum(axis=0) / square_h)
    left -= _mean(left, known_ph, likely_p) * known
    if known_ph is not None:
        left *= np.sqrt(known_ph.shape[1] / np.maximum(known_ph.sum(axis=1, keepdims=True), 1)).astype(np.float32)
    return np.asarray(left)


def of_noise(
    left_ph: np.ndarray, around_ph: np.ndarray, known_ph: np.ndarray | None, likely_p: np.ndarray
) -> np.ndarray:
    """Return what products (p, p) of what is left of two cells are in the mean if it is noise; of a cell itself: 0.

    Not 0, since means and slopes were fitted to the same cells: the fewer these are, the more. As far as terms of
    one over their number go.
    """
    variance_h = (left_ph.astype(np.float64) ** 2).mean(axis=0)
    spread, square_h = _spread(around_ph, known_ph)
    scaled = spread * np.sqrt(variance_h / square_h)
    mean_pp = (1.0 - likely_p[:, None] - likely_p) / max(int(likely_p.sum()), 1) * variance_h.sum()
    found = mean_pp - scaled @ scaled.T
    np.fill_diagonal(found, 0.0)
    return np.asarray(found)


def _spread(around_ph: np.ndarray, known_ph: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return neighbours' expression less its mean (p, h), and its sum of squares (h,) that slopes are divided by."""
    known = np.ones(1, bool) if known_ph is None else known_ph
    spread = (around_ph - _mean(around_ph * known, known_ph, slice(None))) * known
    square_h = (spread**2).sum(axis=0)
    mean = square_h.sum() / (spread.size if known_ph is None else max(int(known_ph.sum()), 1))
    return spread, square_h + CALM * mean + TINY


def _mean(x_ph: np.ndarray, known_ph: np.ndarray | None, rows: np.ndarray | slice) -> np.ndarray:
    """Mean of genes (h,) over those of the rows in which they are known; elsewhere they are 0."""
    if known_ph is None:
        return np.asarray(x_ph[rows].mean(axis=0))
    return np.asarray(x_ph[rows].sum(axis=0) / np.maximum(known_ph[rows].sum(axis=0), 1).astype(np.float32))


def in_common(product_pp: np.ndarray, kin_pk: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Return how much cells have in common with their kin, (p, z): the mean over pairs of a cell and its kin.

    Parameters
    ----------
    product_pp
        What two cells have in common: the product of what is left of them, summed over genes. Of noise it is 0 in the
        mean, however much there is, but for two that are the same.
    kin_pk
        Places of each cell's kin among these cells, nearest first; the cell itself is not its own.
    sizes
        How many cells are taken together, one of them the cell itself.
    """
    every = np.c_[np.arange(len(kin_pk)), kin_pk]
    pairs = product_pp[every[:, :, None], every[:, None, :]].astype(np.float64)
    pairs[:, np.arange(every.shape[1]), np.arange(every.shape[1])] = 0.0
    return np.stack([pairs[:, :k, :k].sum(axis=(1, 2)) / (k * (k - 1)) for k in sizes], axis=1)


def usual_common(common: Sequence[np.ndarray]) -> np.ndarray:
    """Return what held-out cells of batches, (p, z) each, usually have in common, for each of `SIZES`: (3,).

    The mean over batches of the median without its sign. Of a size that none is large enough for, that of the next
    smaller one. Infinite where there is none, or nothing is in common: that tells nothing of new cells.
    """
    found = np.full(len(SIZES), np.inf)
    for size in range(len(SIZES)):
        there = [np.abs(part[:, size]) for part in common if part.shape[1] > size]
        found[size] = np.mean([np.median(part) for part in there]) if there else found[max(size - 1, 0)]
    return np.where(found > TINY, found, np.inf)
