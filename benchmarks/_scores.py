"""Scores of embeddings: npy files, batches and labels come in, the metrics of scib-metrics go out.

The metrics are the defaults of its Benchmarker, the total .6 bio + .4 batch, neighbours exact. PCA is what
``pcr_comparison`` compares with.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

SCORE_LIBRARIES = ("scib-metrics", "jax", "scikit-learn", "numpy", "scipy", "anndata")
AGGREGATES = {"Bio conservation": "bio", "Batch correction": "batch", "Total": "total"}


def score_files(
    data: str, batch_key: str, label_key: str, reference: str, files: Sequence[str]
) -> list[dict[str, float | None]]:
    """Return metric -> value of npy files of embeddings of the cells in ``data``; ``reference`` is the file of PCA."""
    import numpy as np

    obs = read_labels(data, batch_key, label_key)
    pca_nd = np.load(reference)
    loaded = [np.load(file) for file in files]
    scores: dict[int, dict[str, float | None]] = {}
    for i in sorted(range(len(files)), key=lambda i: loaded[i].shape[1]):  # like shapes together: compiled once
        twin = next((j for j in scores if np.array_equal(loaded[i], loaded[j])), None)
        scores[i] = dict(scores[twin]) if twin is not None else score(loaded[i], pca_nd, obs)
        gc.collect()
    return [scores[i] for i in range(len(files))]


def count_cells(path: str, batch_key: str, label_key: str) -> dict[str, int]:
    """Return ``n_cells``, ``n_batches`` and ``n_labels``; complain as `read_labels` does."""
    obs = read_labels(path, batch_key, label_key)
    return {"n_cells": len(obs), "n_batches": obs["batch"].nunique(), "n_labels": obs["label"].nunique()}


def read_labels(path: str, batch_key: str, label_key: str) -> pd.DataFrame:
    """Read batch and label of every cell as text columns ``batch`` and ``label``.

    Raises
    ------
    ValueError
        A column is missing, or some cells have no label.
    """
    import anndata
    import h5py
    import pandas as pd

    with h5py.File(path) as file:
        obs = anndata.io.read_elem(file["obs"])
    for key in (batch_key, label_key):
        if key not in obs:
            raise ValueError(f"{path} has no obs column {key!r}. Its columns: {', '.join(map(str, obs.columns))}.")
        if missing := int(obs[key].isna().sum()):
            raise ValueError(f"{path}: {missing} of {len(obs)} cells have no {key!r}. Leave these cells out.")
    found = {"batch": obs[batch_key].astype(str), "label": obs[label_key].astype(str)}
    return pd.DataFrame(found, index=obs.index.astype(str)).astype("category")


def score(z_nd: np.ndarray, pca_nd: np.ndarray, obs: pd.DataFrame) -> dict[str, float | None]:
    """Return every metric of one embedding, and bio, batch and total; None where a metric is not defined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import anndata
        import numpy as np
        import scib_metrics
        from scib_metrics.benchmark import Benchmarker

        logging.getLogger().setLevel(logging.WARNING)  # isolated labels speak to the root logger
        scib_metrics.settings.verbosity = logging.WARNING
        obsm = {"z": z_nd, "reference": pca_nd}
        adata = anndata.AnnData(np.zeros((len(obs), 1), np.float32), obs=obs.copy(), obsm=obsm)
        benchmarker = Benchmarker(
            adata, "batch", "label", ["z"], pre_integrated_embedding_obsm_key="reference", progress_bar=False
        )
        benchmarker.prepare(neighbor_computer=exact_neighbors)
        benchmarker.benchmark()
        found = benchmarker.get_results(min_max_scale=False, clean_names=False).loc["z"].astype(float)
    return {AGGREGATES.get(name, name): float(value) if np.isfinite(value) else None for name, value in found.items()}


def exact_neighbors(z_nd: np.ndarray, k: int) -> Any:
    """Return the k nearest cells of each, itself (at distance 0) first, by exhaustive search."""
    import numpy as np
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.neighbors import NearestNeighbors

    if k > len(z_nd):
        raise ValueError(f"scoring needs at least {k} cells, these are {len(z_nd)}")
    distances, indices = NearestNeighbors(n_neighbors=k - 1, algorithm="brute").fit(z_nd).kneighbors()
    own = np.arange(len(z_nd))[:, None]
    return NeighborsResults(
        indices=np.hstack([own, indices]), distances=np.hstack([np.zeros((len(z_nd), 1)), distances])
    )
