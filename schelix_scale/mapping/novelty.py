"""How unlike the reference a cell is: where it is among the clusters, how far its neighbours are and which way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from schelix_scale.mapping.correction import Clusters

NEIGHBORS = 7
AROUND = 15  # nearest reference cells, from whose mean a cell is away
STEPS = 2.0**20  # in a standard deviation: sums of such numbers are exact, so that no order decides a digit
TINY = 1e-12
BLOCK = 4_096


@dataclass(frozen=True)
class Evidence:
    """What tells how novel cells (m,) are.

    Attributes
    ----------
    score_m
        Scores of single cells, see `NoveltyScore`.
    away_md
        (m, d) which way and how far each is from the mean of the 15 nearest reference cells, in standard deviations of
        held-out cells. Noise has no direction in common; cells of a type that the reference lacks have one.
    """

    score_m: np.ndarray
    away_md: np.ndarray

    def __getitem__(self, chosen: np.ndarray | slice) -> Evidence:
        """Return that of some of the cells."""
        return Evidence(self.score_m[chosen], self.away_md[chosen])

    @property
    def single(self) -> np.ndarray:
        """How novel the cells are, each taken alone, (m,): score + log(|away|^2)."""
        return together(self.score_m, self.away_md)


def together(score_m: np.ndarray, away_md: np.ndarray) -> np.ndarray:
    """Return score + log(|away|^2), (m,): of cells, or of means over a cell and its kin."""
    return np.asarray(score_m + np.log((away_md**2).sum(axis=1) + TINY))


def away_from(anchor_na: np.ndarray, corrected_md: np.ndarray, indices_mk: np.ndarray) -> np.ndarray:
    """Return corrected components (m, d) less the mean of those of the 15 nearest reference cells, float64."""
    out = np.empty(corrected_md.shape)
    for start in range(0, len(out), BLOCK):
        rows = slice(start, start + BLOCK)
        near = np.asarray(indices_mk[rows, :AROUND])
        around = np.take(anchor_na, near.ravel(), axis=0).reshape(*near.shape, -1)
        out[rows] = corrected_md[rows] - around.mean(axis=1, dtype=np.float64)
    return out


def whitening(away_sd: np.ndarray) -> np.ndarray:
    """Return (d, d) W with W W' the inverse of the mean square of held-out cells' ways, shrunk (Ledoit & Wolf 2004).

    The mean square and not the covariance: in the directions in which the batches of the reference differ, a cell has
    to be farther away.
    """
    from sklearn.covariance import ledoit_wolf

    square, _ = ledoit_wolf(away_sd, assume_centered=True)
    square += np.eye(len(square)) * max(1e-3 * np.trace(square) / len(square), TINY)
    return np.asarray(np.linalg.cholesky(np.linalg.inv(square)))


def whitened(away_md: np.ndarray, whitening_dd: np.ndarray) -> np.ndarray:
    """Return ways (m, d) in standard deviations, rounded to a millionth of one."""
    return np.asarray(np.rint(away_md @ whitening_dd * STEPS) / STEPS)


@dataclass(frozen=True)
class NoveltyScore:
    """Score of how novel a cell is, higher is more.

    log M(z) + log M(z') + log(d) / 2: M is the squared Mahalanobis distance to the clusters' centres, with their pooled
    covariance, weighted by cluster membership, of a cell before and after its batch's correction (which can move a
    type that the reference lacks onto one that it has); d is the mean distance to the 7 nearest cells.

    Attributes
    ----------
    centre_kd
        (K, d) centres.
    whitening_dd
        (d, d) W with W W' the inverse covariance.
    """

    clusters: Clusters
    whitening_dd: np.ndarray

    @classmethod
    def of_cells(cls, clusters: Clusters, corrected_sd: np.ndarray) -> NoveltyScore:
        """Measure the pooled covariance within clusters on corrected cells (s, d)."""
        weights = clusters.weights(corrected_sd)
        residual = corrected_sd - clusters.centre_kd[weights.argmax(axis=1)]
        covariance = residual.T @ residual / len(residual)
        covariance += np.eye(len(covariance)) * max(1e-3 * np.trace(covariance) / len(covariance), 1e-12)
        return cls(clusters, np.linalg.cholesky(np.linalg.inv(covariance)))

    def __call__(self, raw_md: np.ndarray, corrected_md: np.ndarray, distances_mk: np.ndarray) -> np.ndarray:
        """Score cells, (m,).

        Parameters
        ----------
        raw_md, corrected_md
            (m, d) Anchor components before and after the batch's correction.
        distances_mk
            (m, k) distances to the neighbours, nearest first.
        """
        near = distances_mk[:, :NEIGHBORS].astype(np.float64).mean(axis=1)
        spread = self._spread(raw_md) + self._spread(corrected_md)
        return np.asarray(spread + 0.5 * np.log(np.maximum(near, 1e-9)))

    def _spread(self, z_md: np.ndarray) -> np.ndarray:
        out = np.empty(len(z_md))
        centres = self.clusters.centre_kd @ self.whitening_dd
        for start in range(0, len(z_md), BLOCK):
            part = np.asarray(z_md[start : start + BLOCK], np.float64)
            white = part @ self.whitening_dd
            squared = (white**2).sum(axis=1)[:, None] - 2 * white @ centres.T + (centres**2).sum(axis=1)
            out[start : start + BLOCK] = (self.clusters.weights(part) * np.maximum(squared, 0)).sum(axis=1)
        return np.asarray(np.log(np.maximum(out, 1e-9)))
