"""What is left over of expression -> how much of it cells and their kin have in common.

Kin are like each other in the components of the reference. What is left over of their expression (see `leftover`) is
noise in each of them, but for what a type has that the reference lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from schelix_scale.graph.vectors import unit_rows
from schelix_scale.mapping.evidence import STEPS
from schelix_scale.mapping.kin import most_alike, most_kin
from schelix_scale.mapping.leftover import LeftOver, of_noise
from schelix_scale.mapping.profiles import TINY

SIZES = 4, 8, 15, 30  # a cell and its kin: the most that `kin.most_kin` allows
WEIGHT = 2.0  # how much what is left over counts, beside how far a cell is


@dataclass(frozen=True)
class Shared:
    """How much of what is left over kin have in common, against what is usual in a reference.

    Attributes
    ----------
    usual_z
        (4,) see `usual_common`.
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


def pool_in_common(left: LeftOver, raw_pa: np.ndarray) -> np.ndarray:
    """Return what is left over of cells of a pool and their kin have in common, (p, z).

    ``raw_pa`` are their uncorrected Anchor components, by which they are kin. One column for each of `SIZES` that is no
    more than `kin.most_kin`: none for less than 28.
    """
    sizes = [size for size in SIZES if size <= most_kin(len(raw_pa))]
    if not sizes:
        return np.zeros((len(raw_pa), 0))
    values = left.left_ph.astype(np.float64)
    product = values @ values.T - of_noise(left.left_ph, left.around_ph, left.known_ph, left.likely_p)
    product *= np.outer(left.counts_p, left.counts_p)
    product[left.same_p[:, None] == left.same_p] = 0.0  # copies of a cell, and a cell and itself, share their noise
    unit, every = unit_rows(raw_pa), np.arange(len(raw_pa))
    return in_common(product, most_alike(unit, unit, max(sizes) - 1, (every, every)), sizes)


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


def usual_common(common: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Return what held-out cells usually have in common, (4,), each of `SIZES`; given that of batches' pools, (p, z).

    The mean over batches of the median without its sign. Of a size that none is large enough for, that of the next
    smaller one. Infinite where there is none, or nothing is in common: that tells nothing of new cells.
    """
    found = np.full(len(SIZES), np.inf)
    for size in range(len(SIZES)):
        of_batch = [[np.abs(part[:, size]) for part in parts if part.shape[1] > size] for parts in common]
        there = [np.concatenate(parts) for parts in of_batch if parts]
        found[size] = np.mean([np.median(part) for part in there]) if there else found[max(size - 1, 0)]
    return np.where(found > TINY, found, np.inf)
