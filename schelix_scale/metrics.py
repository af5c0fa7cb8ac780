"""Scores of an embedding: batches mixed, labels conserved. Higher is better and 1 is the best of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from schelix_scale.errors import DataError

PERPLEXITY = 30
SEEDS = (0, 1, 2)


def batch_mixing(embedding_nd: np.ndarray, batch_n: Sequence[object] | np.ndarray | pd.Series) -> float:
    """Median iLISI over cells, scaled to 0..1: how many batches there are among the neighbours of a cell.

    iLISI is the inverse Simpson index of the batches in a neighbourhood of perplexity 30 (smaller for fewer than 91
    cells): 1 where all neighbours are of one batch, B where all B batches are alike. It is scaled to
    (iLISI - 1) / (B - 1). Batches of unequal sizes stay below 1 even when they are mixed at random, so compare
    embeddings of the same cells.

    Parameters
    ----------
    embedding_nd
        (n, d) coordinates.
    batch_n
        (n,) batch of each cell.

    Raises
    ------
    DataError
        There is one batch only, fewer than 4 cells, a missing value, or the lengths differ.

    References
    ----------
    I. Korsunsky et al., "Fast, sensitive and accurate integration of single-cell data with Harmony", Nature Methods
    2019 (LISI). M. D. Luecken et al., "Benchmarking atlas-level data integration in single-cell genomics", Nature
    Methods 2022 (the median and its scaling). Computed by harmonypy.
    """
    from harmonypy import compute_lisi

    embedding_nd, codes, n_batches = _checked(embedding_nd, batch_n, "batch")
    perplexity = min(PERPLEXITY, (len(codes) - 1) // 3)
    ilisi = compute_lisi(embedding_nd, pd.DataFrame({"batch": codes}), ["batch"], perplexity=perplexity)
    return float(np.clip((np.median(ilisi) - 1) / (n_batches - 1), 0, 1))


def label_conservation(embedding_nd: np.ndarray, labels: Sequence[object] | np.ndarray | pd.Series) -> dict[str, float]:
    """How well the labels can be seen in the embedding: ``nmi`` and ``silhouette``.

    Parameters
    ----------
    embedding_nd
        (n, d) coordinates.
    labels
        (n,) label of each cell, at least two of them, and fewer than cells.

    Returns
    -------
    ``nmi``: normalised mutual information between the labels and a k-means clustering with as many clusters as
    labels, the mean of three seeds. ``silhouette``: mean silhouette width s of the labels as (s + 1) / 2.

    Raises
    ------
    DataError
        There is one label only, a label for every cell, fewer than 4 cells, a missing value, or the lengths differ.

    References
    ----------
    M. D. Luecken et al., "Benchmarking atlas-level data integration in single-cell genomics", Nature Methods 2022 (NMI
    and the scaled silhouette); k-means in place of Leiden as in scib-metrics. Computed by scikit-learn.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score, silhouette_score

    embedding_nd, codes, n_labels = _checked(embedding_nd, labels, "label")
    if n_labels == len(codes):
        raise DataError(f"each of the {n_labels} cells has a label of its own; labels must name groups of cells.")
    nmi = [
        normalized_mutual_info_score(codes, KMeans(n_labels, n_init=10, random_state=seed).fit_predict(embedding_nd))
        for seed in SEEDS
    ]
    return {"nmi": float(np.mean(nmi)), "silhouette": float((silhouette_score(embedding_nd, codes) + 1) / 2)}


def _checked(
    embedding_nd: np.ndarray, groups: Sequence[object] | np.ndarray | pd.Series, what: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the embedding as float64, the code of each cell's group, and the number of groups."""
    embedding_nd = np.asarray(embedding_nd, dtype=np.float64)
    codes, names = pd.factorize(np.asarray(groups, dtype=object))
    if len(codes) != len(embedding_nd):
        raise DataError(f"the embedding has {len(embedding_nd)} cells but there are {len(codes)} {what} values.")
    if len(codes) < 4:
        raise DataError(f"{len(codes)} cells are too few to be scored; give at least 4.")
    if (codes < 0).any():
        raise DataError(f"the {what} is missing for {int((codes < 0).sum())} of {len(codes)} cells; leave them out.")
    if len(names) < 2:
        raise DataError(f"all {len(codes)} cells have the same {what} ({names[0]}); a score needs two or more.")
    return embedding_nd, codes, len(names)
