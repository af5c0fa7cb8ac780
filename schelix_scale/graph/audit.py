"""A neighbour graph -> how many of the true neighbours it found, on sampled cells searched exactly."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from schelix_scale.errors import GraphError
from schelix_scale.graph.knn import Neighbors
from schelix_scale.graph.nearest import nearest_in_blocks
from schelix_scale.graph.vectors import row_blocks, unit_rows


@dataclass(frozen=True)
class Audit:
    """Recall of a graph on a sample of cells.

    Attributes
    ----------
    recall
        Mean share of the k exact neighbours that were found.
    low, high
        95 % normal confidence interval of the mean.
    cells
        Number of sampled cells.
    k
        Neighbours a cell.
    method
        How the graph was built.
    """

    recall: float
    low: float
    high: float
    cells: int
    k: int
    method: str

    def to_dict(self) -> dict[str, float | int | str]:
        """Return the fields for JSON."""
        return asdict(self)


def audit_recall(features_nd: np.ndarray, neighbors: Neighbors, n_cells: int, seed: int) -> Audit:
    """Compare the graph with exact neighbours of ``n_cells`` random cells.

    A found neighbour counts as true if it is no farther than the k-th exact one, so that ties (duplicated
    cells) are not held against the graph. Its distance is computed anew from its row number: stored distances
    may be right where row numbers are not.
    """
    n, k = neighbors.indices_nk.shape
    rows = np.sort(np.random.default_rng([seed, 0xA0D17]).choice(n, min(n_cells, n), replace=False))
    queries = unit_rows(features_nd[rows])
    blocks = ((start, unit_rows(features_nd[start:stop])) for start, stop in row_blocks(n))
    _, exact = nearest_in_blocks(queries, blocks, k, rows)
    found = unit_rows(features_nd[neighbors.indices_nk[rows].ravel()]).reshape(len(rows), k, -1)
    true = 1 - np.einsum("md,mkd->mk", queries, found) <= exact[:, -1:] + 1e-6
    hits = (true & _others_once(neighbors.indices_nk[rows], rows)).mean(axis=1)
    half = float(1.96 * hits.std() / np.sqrt(len(rows)))
    recall = float(hits.mean())
    return Audit(recall, max(0.0, recall - half), min(1.0, recall + half), len(rows), k, neighbors.method)


def _others_once(indices_mk: np.ndarray, rows_m: np.ndarray) -> np.ndarray:
    """Whether a neighbour is another cell than its row, and named for the first time in it, (m, k)."""
    order = np.argsort(indices_mk, axis=1, kind="stable")
    ordered = np.take_along_axis(indices_mk, order, axis=1)
    first = np.ones(ordered.shape, bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    once = np.empty_like(first)
    np.put_along_axis(once, order, first, axis=1)
    return np.asarray(once & (indices_mk != rows_m[:, None]))


def require_recall(audit: Audit, minimum: float) -> None:
    """Raise if the recall is below the asked minimum.

    Raises
    ------
    GraphError
        With the figures and what to change.
    """
    if audit.recall < minimum:
        raise GraphError(
            f"The neighbour graph found {audit.recall:.3f} of the exact neighbours of {audit.cells} sampled cells; "
            f"graph.min_recall asks for {minimum}. Raise graph.k, "
            "lower graph.min_recall, or use another graph.method (exact finds all)."
        )
