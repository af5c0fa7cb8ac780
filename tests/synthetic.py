"""Made-up cells with known types, batches and batch-sensitive genes; no code of the package is used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse


@dataclass(frozen=True)
class Synthetic:
    """Counts and their dense log-normalised values, with everything that was planted.

    ``condition_n`` is nested in the batches (odd batches are treated); ``responsive_g`` respond to it.
    """

    counts_ng: np.ndarray
    log_ng: np.ndarray
    type_n: np.ndarray
    batch_n: np.ndarray
    condition_n: np.ndarray
    sensitive_g: np.ndarray
    responsive_g: np.ndarray

    @property
    def log_csr(self) -> sparse.csr_matrix:
        return sparse.csr_matrix(self.log_ng.astype(np.float32))


def dense_log_normalize(counts_ng: np.ndarray) -> np.ndarray:
    totals = counts_ng.sum(axis=1, keepdims=True)
    return np.log1p(counts_ng / np.where(totals > 0, totals, 1) * 1e4)


def make_cells(
    batch_strength: float = 0.9,
    response: float = 0.0,
    n_types: int = 5,
    n_batches: int = 4,
    per_group: int = 60,
    n_genes: int = 180,
    depth: float = 3000.0,
    seed: int = 0,
) -> Synthetic:
    """Make ``per_group`` cells of every type in every batch.

    The first third of the genes is batch-sensitive: shifted by batch (sd ``batch_strength`` in log units) and
    little by type. Genes of the second third respond to the condition by ``response``; they and the others
    differ between types.
    """
    rng = np.random.default_rng(seed)
    type_n = np.tile(np.repeat(np.arange(n_types), per_group), n_batches)
    batch_n = np.repeat(np.arange(n_batches), n_types * per_group)
    condition_n = batch_n % 2
    sensitive, responsive = np.zeros((2, n_genes), bool)
    sensitive[: n_genes // 3] = True
    responsive[n_genes // 3 : 2 * n_genes // 3] = response != 0
    by_type = rng.normal(0, 1.0, (n_types, n_genes)) * np.where(sensitive, 0.3, 1.0)
    by_batch = rng.normal(0, 1.0, (n_batches, n_genes))
    by_batch = (by_batch - by_batch.mean(axis=0)) / by_batch.std(axis=0) * batch_strength * sensitive
    by_condition = np.outer([0, 1], response * rng.choice([-1, 1], n_genes) * responsive)
    level = rng.normal(0, 0.5, n_genes) + by_type[type_n] + by_batch[batch_n] + by_condition[condition_n]
    share = np.exp(level)
    share /= share.sum(axis=1, keepdims=True)
    counts = rng.poisson(share * depth * rng.lognormal(0, 0.2, (len(level), 1))).astype(np.float64)
    order = rng.permutation(len(counts))
    return Synthetic(
        counts[order],
        dense_log_normalize(counts[order]),
        type_n[order],
        batch_n[order],
        condition_n[order],
        sensitive,
        responsive,
    )


def gaussian_cells(
    n: int = 600, d: int = 8, n_types: int = 4, n_batches: int = 3, shift: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (z_nd, type_n, batch_n): separate types, every batch displaced by a vector of norm ``shift``."""
    rng = np.random.default_rng(seed)
    type_n, batch_n = rng.integers(0, n_types, n), rng.integers(0, n_batches, n)
    centres = 6 * np.linalg.qr(rng.normal(size=(d, d)))[0][:n_types]
    displaced = rng.normal(size=(n_batches, d))
    displaced *= shift / np.linalg.norm(displaced, axis=1, keepdims=True)
    return centres[type_n] + displaced[batch_n] + 0.4 * rng.normal(size=(n, d)), type_n, batch_n
