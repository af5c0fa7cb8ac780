"""How unlike the reference a single cell is: where it lies among the clusters, and how far its neighbours are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from schelix_scale.mapping.correction import Clusters

NEIGHBORS = 7  # that count: more are not of a cell's type where it has few
FARTHER = 100.0  # than its neighbours are from theirs, or nearer, a cell is at most: either can be copies of one cell
BLOCK = 4_096


@dataclass(frozen=True)
class NoveltyScore:
    """Score of how novel a cell is, higher is more.

    log M(z) + log M(z') - log M(r) + log d + log(d / w): M is the squared Mahalanobis distance to the clusters'
    centres, with their pooled covariance, weighted by cluster membership, of a cell before and after its batch's
    correction (which can move a type that the reference lacks onto one that it has), and of the mean r of the 7 nearest
    cells. d is the mean distance to these, and w how far they are from theirs (their mean kernel width): types with few
    or scattered cells are far from any, and from the centres.

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

    def __call__(
        self,
        raw_md: np.ndarray,
        corrected_md: np.ndarray,
        around_md: np.ndarray,
        distances_mk: np.ndarray,
        width_mk: np.ndarray,
    ) -> np.ndarray:
        """Score cells, (m,).

        Parameters
        ----------
        raw_md, corrected_md
            (m, d) Anchor components before and after the batch's correction.
        around_md
            (m, d) the mean of those, corrected, of the 7 nearest neighbours.
        distances_mk, width_mk
            (m, k) distances to the neighbours, nearest first, and the neighbours' kernel widths.
        """
        near, theirs = (part[:, :NEIGHBORS].astype(np.float64).mean(axis=1) for part in (distances_mk, width_mk))
        near = np.maximum(near, np.maximum(theirs / FARTHER, 1e-9))
        spread = self._spread(raw_md) + self._spread(corrected_md) - self._spread(around_md)
        return np.asarray(spread + np.log(near) + np.log(near / np.maximum(theirs, near / FARTHER)))

    def _spread(self, z_md: np.ndarray) -> np.ndarray:
        out = np.empty(len(z_md))
        centres = self.clusters.centre_kd @ self.whitening_dd
        for start in range(0, len(z_md), BLOCK):
            part = np.asarray(z_md[start : start + BLOCK], np.float64)
            white = part @ self.whitening_dd
            squared = (white**2).sum(axis=1)[:, None] - 2 * white @ centres.T + (centres**2).sum(axis=1)
            out[start : start + BLOCK] = (self.clusters.weights(part) * np.maximum(squared, 0)).sum(axis=1)
        return np.asarray(np.log(np.maximum(out, 1e-9)))
