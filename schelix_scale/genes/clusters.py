"""Sketch components -> coarse clusters that batches share: Harmony and k-means, both by their libraries."""

from __future__ import annotations

from typing import Any

import numpy as np


def run_harmony(pcs_nd: np.ndarray, batch_n: np.ndarray, seed: int, threads: int = 0) -> Any:
    """Run harmonypy on (n, d) components with its defaults; return its Harmony object."""
    import harmonypy

    clusters = int(np.clip(round(len(pcs_nd) / 30), 2, 100))
    return harmonypy.run_harmony(
        np.asarray(pcs_nd, dtype=np.float64),
        {"batch": np.asarray(batch_n)},
        ["batch"],
        nclust=clusters,
        verbose=False,
        random_state=seed,
        ncores=threads,
    )


def coarse_clusters(pcs_nd: np.ndarray, batch_n: np.ndarray, seed: int, threads: int = 0) -> np.ndarray:
    """Cluster cells across batches into C = clip(sqrt(n) / 3, 12, 100) clusters (METHOD section 2).

    Parameters
    ----------
    pcs_nd
        (n, d) principal components.
    batch_n
        (n,) batch codes.

    Returns
    -------
    (n,) cluster codes, int32.
    """
    from sklearn.cluster import KMeans

    n = len(pcs_nd)
    n_clusters = min(int(np.clip(np.sqrt(n) / 3, 12, 100)), max(1, n // 10))
    corrected = run_harmony(pcs_nd, batch_n, seed, threads).Z_corr
    codes = KMeans(n_clusters, n_init=2, random_state=seed).fit_predict(corrected)
    return np.asarray(codes, dtype=np.int32)
