"""Guards beside the total: did integration tear apart what belongs together, or merge what does not?

npy files of embeddings come in, a number a guard goes out; 1 is best, None where the data have no such case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from _scores import read_labels

if TYPE_CHECKING:
    import numpy as np

GUARD_LIBRARIES = ("scikit-learn", "numpy")
K_KEPT = 30
K_PRIVATE = 15
MIN_KEPT = 5
MIN_PRIVATE = 10


def guard_files(
    data: str, batch_key: str, label_key: str, reference: str, files: Sequence[str]
) -> list[dict[str, float | None]]:
    """Return the guards of npy files of embeddings of the cells in ``data``; ``reference`` is the file of PCA."""
    import numpy as np

    obs = read_labels(data, batch_key, label_key)
    labels_n, batches_n = obs["label"].to_numpy(dtype=str), obs["batch"].to_numpy(dtype=str)
    pca_nd = np.load(reference)
    return [
        {
            "kept_neighbors": kept_neighbors(z_nd, pca_nd, labels_n, batches_n),
            "private_purity": private_purity(z_nd, labels_n, batches_n),
        }
        for z_nd in map(np.load, files)
    ]


def kept_neighbors(
    z_nd: np.ndarray, before_nd: np.ndarray, labels_n: np.ndarray, batches_n: np.ndarray
) -> float | None:
    """Return how much of the neighbourhoods inside one type of one batch is as before: there is nothing to correct.

    The mean over cells of the Jaccard index of the k nearest neighbours among the cells of the same type and batch,
    in ``z_nd`` and in ``before_nd``. k is 30, in small groups a third of the other cells (where k neighbours drawn at
    random have an index of about 0.2); groups of 15 cells and fewer (k below 5) are left out.
    """
    import numpy as np

    _, group_n = np.unique(np.stack([labels_n, batches_n]), axis=1, return_inverse=True)
    found = []
    for group in range(group_n.max() + 1):
        rows = np.flatnonzero(group_n == group)
        k = min(K_KEPT, (len(rows) - 1) // 3)
        if k >= MIN_KEPT:
            found.append(jaccard(neighbors(z_nd[rows], k), neighbors(before_nd[rows], k)))
    return float(np.concatenate(found).mean()) if found else None


def private_purity(z_nd: np.ndarray, labels_n: np.ndarray, batches_n: np.ndarray) -> float | None:
    """Return whether types that one batch alone has stay apart: over-correction mixes them with others.

    The mean over these types of the share of same-type cells among the 15 nearest neighbours of their cells (in types
    of fewer cells, as many neighbours as the type has other cells). Types of fewer than 10 cells are left out.
    """
    import numpy as np

    if len(np.unique(batches_n)) < 2:
        return None
    shares = []
    for label in np.unique(labels_n):
        rows = np.flatnonzero(labels_n == label)
        if len(rows) >= MIN_PRIVATE and len(np.unique(batches_n[rows])) == 1:
            near = neighbors(z_nd, min(K_PRIVATE, len(rows) - 1), rows)
            shares.append(float((labels_n[near] == label).mean()))
    return float(np.mean(shares)) if shares else None


def neighbors(z_nd: np.ndarray, k: int, rows: np.ndarray | None = None) -> np.ndarray:
    """Return the k nearest other cells of every cell (or of ``rows``), by exhaustive search."""
    import numpy as np
    from sklearn.neighbors import NearestNeighbors

    rows = np.arange(len(z_nd)) if rows is None else rows
    near = (
        NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(z_nd).kneighbors(z_nd[rows], return_distance=False)
    )
    own = near == rows[:, None]
    own[~own.any(axis=1), -1] = True  # a cell with more than k copies of itself: leave out the last
    return near[~own].reshape(len(rows), k)


def jaccard(a_nk: np.ndarray, b_nk: np.ndarray) -> np.ndarray:
    """Return, for every cell, the neighbours it has in both lists as a share of those it has in either."""
    import numpy as np

    both = np.array([len(np.intersect1d(a, b)) for a, b in zip(a_nk, b_nk, strict=True)])
    return both / (a_nk.shape[1] + b_nk.shape[1] - both)
