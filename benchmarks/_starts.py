"""How much of a total is the luck of k-means? Its NMI and ARI from several starts, of which scib-metrics takes one.

npy files of embeddings come in, the NMI and ARI of every start go out. Start 0 is the one of scib-metrics.
"""

from __future__ import annotations

from collections.abc import Sequence

from _scores import read_labels


def start_files(
    data: str, batch_key: str, label_key: str, files: Sequence[str], n_starts: int
) -> list[dict[str, list[float]]]:
    """Return ``nmi`` and ``ari`` of each start for npy files of embeddings of the cells in ``data``."""
    import jax
    import numpy as np

    labels_n = read_labels(data, batch_key, label_key)["label"].to_numpy(dtype=str)
    found = []
    for file in files:
        found.append(starts(np.load(file), labels_n, n_starts))
        jax.clear_caches()  # each start compiles code of its own, which would be kept
    return found


def starts(z_nd: object, labels_n: Sequence[str], n_starts: int) -> dict[str, list[float]]:
    """Return NMI and ARI with the labels of k-means from ``n_starts`` seeds, as many clusters as labels."""
    import numpy as np
    from scib_metrics.utils import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    found: dict[str, list[float]] = {"nmi": [], "ari": []}
    for seed in range(n_starts):
        clusters = KMeans(len(np.unique(labels_n)), seed=seed)
        clusters.fit(np.asarray(z_nd))
        found["nmi"].append(float(normalized_mutual_info_score(labels_n, clusters.labels_)))
        found["ari"].append(float(adjusted_rand_score(labels_n, clusters.labels_)))
    return found
