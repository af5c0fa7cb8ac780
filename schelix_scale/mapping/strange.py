"""What is left over of expression -> whether other batches of the reference have cells in which the same is left over.

A known type can be left over, too: its cells lie scattered among others in the reference's components, and hardly any
of a cell's neighbours are of it. Then the cells of other batches that are most alike others of their own have the same
left over. Of a type that the reference lacks none has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from schelix_scale.mapping.profiles import TINY

CAP = 8.0  # standard deviations at which what is left over is cut: a few cells of one rare gene are no type
FURTHEST, SINGLE = 8, 2  # of the genes in which a cell is furthest off, those that add most do not count
SHARE = 0.1  # of the cells of a batch are strange
ASKED = 200  # cells of a batch that say what is usual, at most


@dataclass(frozen=True)
class Strange:
    """Held-out cells of the reference that have most in common with those most alike of their batch.

    Attributes
    ----------
    left_sh
        (s, h) float32 what is left over of them, cut at eight standard deviations.
    batch_s
        (s,) their batches.
    """

    left_sh: np.ndarray
    batch_s: np.ndarray

    @classmethod
    def of_batches(cls, parts: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> Strange:
        """Take a tenth of the cells of pools: of each its batch, what is left over (p, h) and is in common (p,)."""
        left, batch = [np.zeros((0, 0), np.float32)], [np.zeros(0, np.int64)]
        for of, left_ph, common_p in parts:
            most = np.sort(np.argsort(-common_p, kind="stable")[: int(np.ceil(SHARE * len(common_p)))])
            left.append(left_ph[most].astype(np.float32))
            batch.append(np.full(len(most), of))
        return cls(np.vstack(left[1:]) if parts else left[0], np.concatenate(batch))

    def without(self, batch: int) -> Strange:
        """Leave out those of a batch."""
        return Strange(self.left_sh[self.batch_s != batch], self.batch_s[self.batch_s != batch])

    def alike(self, left_mh: np.ndarray, most: int) -> np.ndarray:
        """Return what cells have in common with so many that are most alike, in the mean: (m,), 0 if there are none."""
        k = min(most, len(self.left_sh))
        if not k:
            return np.zeros(len(left_mh))
        product = left_mh @ self.left_sh.T  # of two that are as alike it does not matter which one is taken
        near = np.sort(np.argpartition(-product, k - 1, axis=1)[:, :k], axis=1)
        top = furthest(left_mh)
        sum_mt = self.left_sh[near[:, :, None], top[:, None, :]].sum(axis=1, dtype=np.float64)
        own_m = np.take_along_axis(product, near, axis=1).sum(axis=1, dtype=np.float64)
        return np.asarray((own_m - largest(np.take_along_axis(left_mh, top, axis=1) * sum_mt)) / k)

    def usual(self, left_ph: np.ndarray, likely_p: np.ndarray, most: int) -> float:
        """Return what it is of the cells of a batch that are probably not novel, in the median of 200 of these."""
        likely = np.flatnonzero(likely_p)
        chosen = likely[np.linspace(0, len(likely) - 1, min(ASKED, len(likely))).astype(int)]
        return float(np.median(np.abs(self.alike(left_ph[chosen], most)))) if len(chosen) else 0.0

    def more(self, left_mh: np.ndarray, most: int, usual: float) -> np.ndarray:
        """Return how much more it is of cells of the batch than usual, as a multiple of that, (m,): at least 0."""
        if usual <= TINY:
            return np.zeros(len(left_mh))
        return np.asarray(np.maximum(self.alike(left_mh, most) / usual - 1.0, 0.0))


def cut(left_mh: np.ndarray) -> np.ndarray:
    """Return what is left over, cut, float32."""
    return np.asarray(np.clip(left_mh, -CAP, CAP), np.float32)


def products(left_mh: np.ndarray, left_ph: np.ndarray) -> np.ndarray:
    """Return what cells have in common, (m, p) float64: exact enough that the order of sums hardly ever decides."""
    cells_mh = left_mh.astype(np.float64)
    others_ph = cells_mh if left_ph is left_mh else left_ph.astype(np.float64)  # NumPy computes half of it then
    return np.asarray(cells_mh @ others_ph.T)


def furthest(left_mh: np.ndarray) -> np.ndarray:
    """Return the eight genes (m, t) in which each cell is furthest off, ascending."""
    most = min(FURTHEST, left_mh.shape[1])
    return np.sort(np.argpartition(-np.abs(left_mh), most - 1, axis=1)[:, :most], axis=1)


def largest(adds_mt: np.ndarray) -> np.ndarray:
    """Sum of the two largest, (m,), of those above 0."""
    return np.asarray(np.maximum(np.sort(adds_mt, axis=1)[:, -SINGLE:], 0.0).sum(axis=1))
