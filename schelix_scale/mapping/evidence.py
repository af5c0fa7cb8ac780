"""What tells how novel cells are: how unlike the reference each is, and which way it is from its nearest cells there.

A way has no direction that others share where it is noise. Cells of a type that the reference lacks have one, so that
the mean way of many that are alike tells them from cells that are as far away by chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from schelix_scale.mapping.novelty import NEIGHBORS

STEPS, FARTHEST = 2.0**12, 1_000.0  # in one standard deviation: sums of such numbers are exact in any order
FEW, ENOUGH = 10, 100  # cells of a batch from which on it says something of the next, and all that a batch can say
SHRUNK = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
TINY = 1e-12
BLOCK = 4_096
ODD = 3.0  # how much odd votes weigh, beside how far a cell is


@dataclass(frozen=True)
class Evidence:
    """What tells how novel cells (m,) are.

    Attributes
    ----------
    score_cm
        (2, m) scores of single cells, see `novelty.NoveltyScore`: as they are, and with what labels say added.
    way_md
        (m, d) which way and how far each is from the mean of the 7 nearest reference cells, in standard deviations of
        held-out cells; float32, in whole steps of 1 / 4096.
    """

    score_cm: np.ndarray
    way_md: np.ndarray

    @classmethod
    def of_cells(cls, score_m: np.ndarray, odd_m: np.ndarray, way_md: np.ndarray) -> Evidence:
        """Put together scores, how odd votes are (see `odd_votes.oddest`; finite), and ways."""
        return cls(np.stack([score_m, score_m + ODD * odd_m]), way_md)

    def __getitem__(self, chosen: np.ndarray | slice) -> Evidence:
        """Return that of some of the cells."""
        return Evidence(self.score_cm[:, chosen], self.way_md[chosen])


def together(score_cm: np.ndarray, way_md: np.ndarray, count: int) -> np.ndarray:
    """Return score + log(count |way|^2), (2, m), of mean scores and mean ways of so many cells.

    Of noise the mean way of ``count`` cells has the square length of a single one's, divided by ``count``.
    """
    return np.asarray(score_cm + np.log(count * (way_md.astype(np.float64) ** 2).sum(axis=1) + TINY))


def mean_around(anchor_na: np.ndarray, indices_mk: np.ndarray) -> np.ndarray:
    """Return the mean components (m, d) of the 7 nearest reference cells, float64."""
    out = np.empty((len(indices_mk), anchor_na.shape[1]))
    for start in range(0, len(out), BLOCK):
        rows = slice(start, start + BLOCK)
        near = np.asarray(indices_mk[rows, :NEIGHBORS])
        around = np.take(anchor_na, near.ravel(), axis=0).reshape(*near.shape, -1)
        out[rows] = around.mean(axis=1, dtype=np.float64)
    return out


def whitening(way_sd: np.ndarray, batch_s: np.ndarray) -> np.ndarray:
    """Return (d, d) W with W W' the inverse of the covariance of held-out cells' ways within batches.

    The covariance is shrunk to its diagonal as far as tells best the ways of each batch from those of all others
    (highest Gaussian likelihood): in few batches types can be off in directions that say nothing of the next one's.
    Medians of batches are taken for their centres. Of a single batch, or of small ones, only the diagonal counts.
    """
    batches = np.unique(batch_s)
    parts = [way_sd[batch_s == batch] for batch in batches]
    parts = [part - np.median(part, axis=0) for part in parts]
    squares_bdd = np.stack([part.T @ part for part in parts])
    count_b = np.array([len(part) for part in parts])
    told = np.zeros(len(SHRUNK))
    for batch in np.flatnonzero(count_b >= FEW) if len(parts) > 1 else ():
        others = (squares_bdd.sum(axis=0) - squares_bdd[batch]) / (count_b.sum() - count_b[batch])
        likelihoods = [_likelihood(parts[batch], _shrunk(others, share)) for share in SHRUNK]
        told += min(count_b[batch], ENOUGH) * np.array(likelihoods)
    share = SHRUNK[int(told.argmax())] if told.any() else 1.0
    return np.asarray(np.linalg.cholesky(np.linalg.inv(_shrunk(squares_bdd.sum(axis=0) / count_b.sum(), share))))


def whitened(way_md: np.ndarray, whitening_dd: np.ndarray) -> np.ndarray:
    """Return ways (m, d) in standard deviations, in whole steps: float32 holds them, and their sums are exact."""
    steps = np.rint(np.clip(way_md @ whitening_dd, -FARTHEST, FARTHEST) * STEPS)
    return np.asarray(steps / STEPS, np.float32)


def _shrunk(covariance_dd: np.ndarray, share: float) -> np.ndarray:
    diagonal = np.diag(np.diag(covariance_dd))
    least = max(1e-3 * np.trace(covariance_dd) / len(covariance_dd), TINY)
    return np.asarray((1 - share) * covariance_dd + share * diagonal + least * np.eye(len(diagonal)))


def _likelihood(way_md: np.ndarray, covariance_dd: np.ndarray) -> float:
    """Mean log density of ways under a Gaussian of this covariance about 0, but for a constant."""
    from scipy.linalg import solve_triangular

    lower = np.linalg.cholesky(covariance_dd)
    white = solve_triangular(lower, way_md.T, lower=True)
    return float(-np.log(np.diag(lower)).sum() - 0.5 * (white**2).sum(axis=0).mean())
