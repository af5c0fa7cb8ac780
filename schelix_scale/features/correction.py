"""Components of the sketch -> a mixture correction that any cell can be put through in closed form.

The soft clusters are Harmony's (Korsunsky et al. 2019), fitted by harmonypy. The correction
z' = z - sum_k R_k(z) W_k[b] is the form in which Symphony (Kang et al. 2021) maps queries, so a cell that
was not in the sketch is treated as one that was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from schelix_scale.genes.clusters import run_harmony

SIGMA = 0.1
THETA = 2.0
RIDGE_SHARE = 0.2
ROUNDS = 3


@dataclass(frozen=True)
class MixtureCorrection:
    """Mixture of linear experts: a soft cluster's batches are moved onto the cluster's common centre.

    Attributes
    ----------
    centroids_kd
        (K, d) unit centroids of the soft clusters.
    penalty_kb
        (K, b) log penalty on joining a cluster that the batch already fills (Harmony's diversity term).
    shift_kbd
        (K, b, d) what a batch is displaced by within a cluster: W.
    """

    centroids_kd: np.ndarray
    penalty_kb: np.ndarray
    shift_kbd: np.ndarray

    def responsibilities(self, z_nd: np.ndarray, batch_n: np.ndarray) -> np.ndarray:
        """Soft cluster weights R, (n, K), rows sum to 1."""
        unit = z_nd / np.maximum(np.linalg.norm(z_nd, axis=1, keepdims=True), 1e-12)
        logits = 2.0 / SIGMA * (unit @ self.centroids_kd.T) + self.penalty_kb.T[batch_n]
        logits -= logits.max(axis=1, keepdims=True)
        weights = np.exp(logits)
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))

    def apply(self, z_nd: np.ndarray, batch_n: np.ndarray) -> np.ndarray:
        """Correct (n, d) components of cells with (n,) batch codes; float32."""
        return self.apply_with_weights(z_nd, batch_n)[0]

    def apply_with_weights(
        self, z_nd: np.ndarray, batch_n: np.ndarray, strength: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Correct (n, d) components; return them, float32, with the soft weights R (n, K) that were used.

        R depends on where a corrected cell lies, so it is found by a few rounds from the uncorrected cell,
        as Harmony finds it for the sketch. Cells are moved by ``strength`` of their displacement; R is that of
        cells that are moved by all of it.
        """
        corrected = z_nd
        for _ in range(ROUNDS):
            weights_nk = self.responsibilities(corrected, batch_n)
            shift_nd = mixture_shift(weights_nk, batch_n, self.shift_kbd)
            corrected = z_nd - shift_nd
        return np.asarray(z_nd - strength * shift_nd, dtype=np.float32), weights_nk


def mixture_shift(weights_nk: np.ndarray, batch_n: np.ndarray, shift_kbd: np.ndarray) -> np.ndarray:
    """Return sum_k R_k W_k[b] of each cell, (n, d)."""
    shift = np.zeros((len(batch_n), shift_kbd.shape[2]))
    for batch in np.unique(batch_n):
        rows = batch_n == batch
        shift[rows] = weights_nk[rows] @ shift_kbd[:, batch]
    return shift


def fit_correction(z_nd: np.ndarray, batch_n: np.ndarray, n_batches: int, seed: int, threads: int) -> MixtureCorrection:
    """Fit Harmony on the sketch's (n, d) components and keep what corrects any cell."""
    fitted = run_harmony(z_nd, batch_n, seed, threads)
    weights_nk = np.asarray(fitted.R)
    observed_kb, expected_kb = occupancy(weights_nk, batch_n, n_batches)
    penalty_kb = THETA * np.log((expected_kb + 1) / (observed_kb + expected_kb + 1))
    shift_kbd = ridge_shifts(z_nd, batch_n, weights_nk, n_batches)
    centroids_kd = np.asarray(fitted.Y).T
    return MixtureCorrection(
        centroids_kd.astype(np.float32), penalty_kb.astype(np.float32), shift_kbd.astype(np.float32)
    )


def occupancy(weights_nk: np.ndarray, batch_n: np.ndarray, n_batches: int) -> tuple[np.ndarray, np.ndarray]:
    """Observed cells of each batch in each soft cluster, and those expected if batches mixed: (K, b) each."""
    one_hot_nb = np.zeros((len(batch_n), n_batches))
    one_hot_nb[np.arange(len(batch_n)), batch_n] = 1.0
    return weights_nk.T @ one_hot_nb, np.outer(weights_nk.sum(axis=0), one_hot_nb.mean(axis=0))


def ridge_shifts(z_nd: np.ndarray, batch_n: np.ndarray, weights_nk: np.ndarray, n_batches: int) -> np.ndarray:
    """Solve, for every soft cluster, the weighted ridge of components on batches with a free intercept.

    The penalty of a batch is 0.2 of its expected cells in the cluster, as in Harmony 2.

    Returns
    -------
    (K, b, d) coefficients of the batches. With one-hot batches the normal equations are an arrow matrix, so
    the intercept has a closed form: no (b, b) system is solved.
    """
    observed_kb, expected_kb = occupancy(weights_nk, batch_n, n_batches)
    shifts = np.zeros((weights_nk.shape[1], n_batches, z_nd.shape[1]))
    sums_bkd = np.stack([weights_nk[batch_n == b].T @ z_nd[batch_n == b] for b in range(n_batches)])
    for cluster in range(weights_nk.shape[1]):
        count, ridge, total = observed_kb[cluster], RIDGE_SHARE * expected_kb[cluster], sums_bkd[:, cluster]
        shrink = np.divide(1.0, count + ridge, out=np.zeros_like(count), where=count + ridge > 0)
        left = count.sum() - (count**2 * shrink).sum()
        if left <= 0:
            continue
        intercept = (total.sum(axis=0) - ((count * shrink)[:, None] * total).sum(axis=0)) / left
        shifts[cluster] = shrink[:, None] * (total - count[:, None] * intercept)
    return shifts
