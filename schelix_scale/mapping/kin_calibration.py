"""Held-out scores of cells and their kin -> p-values of new ones: calibrated for each number of kin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from schelix_scale.mapping.kin import KinScores, less
from schelix_scale.mapping.odd_votes import ENOUGH
from schelix_scale.transfer import NoveltyCalibration, batch_weights

LEAST = 20  # cells of a batch from which on it tells something
KIN_COUNTS = 20.0  # how many times less than that of the cell alone a p-value can be
BATCHES, TOLD = 3, 0.005  # of a number of kin: held-out batches, if there are so many, and the least p-value


@dataclass(frozen=True)
class KinCalibration:
    """Of the novelty of cells and their kin, for each of the first of `kin.SIZES`.

    Attributes
    ----------
    sizes
        Of scores, each of the batches that have cells enough for kin of this size.
    both
        Of the lesser of two p-values, with as many kin and with fewer, but at least a twentieth of that of the cell
        alone: -log p.
    """

    sizes: tuple[NoveltyCalibration, ...]
    both: tuple[NoveltyCalibration, ...]

    @classmethod
    def fit(cls, scores_zs: np.ndarray, batch_s: np.ndarray) -> KinCalibration:
        """Calibrate on held-out cells of batches, with a score for each size: nan where a batch is too small for it.

        A size that hardly any batch is large enough for is left out, and so are larger ones: with less than 20 cells of
        three batches (or of as many as there are), or with so few that they cannot tell small p-values.
        """
        batches = max(1, batches_told(batch_s))
        sizes: list[NoveltyCalibration] = []
        both: list[NoveltyCalibration] = []
        for size, scores_s in enumerate(scores_zs):
            there = np.isfinite(scores_s)
            if size and batches_told(batch_s[there]) < min(BATCHES, batches):
                break
            weights = batch_weights(batch_s[there], ENOUGH)
            found = NoveltyCalibration.fit(scores_s[there], weights)
            if size and found.least > max(TOLD, 2 * sizes[0].least):
                break
            sizes.append(found)
            p = _of_held_out(sizes, size, scores_zs, batch_s)
            both.append(NoveltyCalibration.fit(-np.log(p), weights))
        return cls(tuple(sizes), tuple(both))

    def of_held_out(self, scores_zs: np.ndarray, batch_s: np.ndarray) -> np.ndarray:
        """P-values (s,) of the held-out cells that this was fitted to, each of the largest size that its batch has.

        Each cell counts once, as those of new cells count.
        """
        out = np.ones(len(batch_s))
        for size, part in enumerate(self.both):
            there = np.isfinite(scores_zs[size])
            p = _of_held_out(self.sizes, size, scores_zs, batch_s)
            out[there] = part.p_values(-np.log(p), batch_weights(batch_s[there], ENOUGH))
        return out

    def p_values(self, scores: KinScores) -> np.ndarray:
        """P-values (m,): how often the lesser p-value of a cell that is not novel is as small.

        A type that the reference lacks has many cells or few; the lesser of the two p-values finds both, and is itself
        calibrated, since of two the lesser is small more often. It counts down to a twentieth of the p-value of the
        cell alone, so that what kin says alone finds nothing novel: types that hardly any held-out batch has can be off
        in one direction, too.
        """
        out = np.empty(len(scores.size))
        for size in np.unique(scores.size):
            mine = scores.size == size
            p = _lesser(self.sizes, size, scores.most[mine], scores.fewer[mine])
            p = np.maximum(p, self.sizes[0].p_values(scores.single[mine]) / KIN_COUNTS)
            out[mine] = self.both[size].p_values(-np.log(p))
        return out


def batches_told(batch_s: np.ndarray) -> int:
    """Return of how many batches there are 20 cells."""
    return int((np.unique(batch_s, return_counts=True)[1] >= LEAST).sum())


def _of_held_out(
    sizes: Sequence[NoveltyCalibration], size: int, scores_zs: np.ndarray, batch_s: np.ndarray
) -> np.ndarray:
    """Return the lesser p-values of the held-out cells that have scores of this size, see `KinCalibration.both`."""
    there, fewer = np.isfinite(scores_zs[size]), np.isfinite(scores_zs[less(size)])
    own_s = np.zeros(len(batch_s))
    own_s[fewer] = batch_weights(batch_s[fewer], ENOUGH)
    weights = batch_weights(batch_s[there], ENOUGH)
    p = _lesser(sizes, size, scores_zs[size, there], scores_zs[less(size), there], weights, own_s[there])
    alone = sizes[0].p_values(scores_zs[0, there], batch_weights(batch_s, ENOUGH)[there])
    return np.asarray(np.maximum(p, alone / KIN_COUNTS))


def _lesser(
    sizes: Sequence[NoveltyCalibration],
    size: int,
    most_m: np.ndarray,
    fewer_m: np.ndarray,
    weight_m: np.ndarray | float = 0.0,
    fewer_weight_m: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Return the lesser p-value (m,) of two; weights are those of held-out cells in the two calibrations."""
    most = sizes[size].p_values(most_m, weight_m)
    lesser: np.ndarray = np.minimum(most, sizes[less(size)].p_values(fewer_m, fewer_weight_m))
    return lesser
