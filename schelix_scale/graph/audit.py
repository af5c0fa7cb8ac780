"""A neighbour graph -> how many of the true neighbours it found, on sampled cells searched exactly."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from schelix_scale.errors import GraphError
from schelix_scale.graph.knn import Neighbors
from schelix_scale.graph.nearest import nearest_in_blocks
from schelix_scale.graph.threads import one_thread_each
from schelix_scale.graph.vectors import row_blocks, taken, unit_rows
from schelix_scale.scheduling import run_tasks

AUDIT_BLOCK = 250  # cells that are searched exactly at once
Z = 1.959964  # of 95 %


@dataclass(frozen=True)
class Audit:
    """Recall of a graph on a sample of cells.

    Attributes
    ----------
    recall
        Mean share of the k exact neighbours that were found.
    low, high
        95 % confidence interval of the mean, see `recall_interval`.
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

    def __str__(self) -> str:
        """Return the figures in words, for the log."""
        return f"{self.recall:.3f} (95 % CI {self.low:.3f}-{self.high:.3f}, {self.cells} cells)"

    def to_dict(self) -> dict[str, float | int | str]:
        """Return the fields for JSON."""
        return asdict(self)


def audit_recall(features_nd: np.ndarray, neighbors: Neighbors, n_cells: int, seed: int, threads: int = 1) -> Audit:
    """Compare the graph with exact neighbours of ``n_cells`` random cells.

    A found neighbour counts as true if it is no farther than the k-th exact one, so that ties (duplicated
    cells) are not held against the graph. Its distance is computed anew from its row number: stored distances
    may be right where row numbers are not.
    """
    n, k = neighbors.indices_nk.shape
    if not k:
        return Audit(1.0, 1.0, 1.0, n, k, neighbors.method)  # a cell without others lacks none
    rows = np.sort(np.random.default_rng([seed, 0xA0D17]).choice(n, min(n_cells, n), replace=False))
    found_m = np.empty(len(rows), np.int64)

    def compare(span: tuple[int, int]) -> int:
        found_m[slice(*span)] = _true_neighbors(features_nd, neighbors.indices_nk, rows[slice(*span)])
        return span[1] - span[0]

    with one_thread_each():
        run_tasks(compare, list(row_blocks(len(rows), AUDIT_BLOCK)), threads)
    low, high = recall_interval(found_m, k)
    return Audit(float(found_m.mean() / k), low, high, len(rows), k, neighbors.method)


def _true_neighbors(features_nd: np.ndarray, indices_nk: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """How many of the k neighbours of some cells (m,) are exact ones, (m,)."""
    n, k = indices_nk.shape
    queries = unit_rows(features_nd[rows])
    blocks = ((start, unit_rows(features_nd[start:stop])) for start, stop in row_blocks(n))
    _, exact = nearest_in_blocks(queries, blocks, k, rows)
    found = unit_rows(taken(features_nd, indices_nk[rows].ravel())).reshape(len(rows), k, -1)
    true = 1 - np.einsum("md,mkd->mk", queries, found) <= exact[:, -1:] + 1e-6
    return np.asarray((true & others_once(indices_nk[rows], rows)).sum(axis=1))


def recall_interval(found_m: np.ndarray, k: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of found_m / k, for counts (m,) of neighbours found of k.

    Wilson's interval of the m k neighbours, whose number is divided by the design effect (Kish 1965; Korn & Graubard
    1998): how many times the variance of the mean is that of independent neighbours. Those of a cell are lost
    together, and the more so the less one sees of it: the design effect is the one measured on the f cells that lack
    neighbours, and k (all of a cell or none) on z^2 more that may have been missed. So where all neighbours were found,
    the interval is that of m cells of which each has them all or none.
    """
    m, recall = len(found_m), float(found_m.mean() / k)
    lacking = int((found_m < k).sum())
    independent = recall * (1 - recall) / (m * k)
    effect = 1.0
    if independent > 0 and m > 1:
        effect = max(1.0, float((found_m / k).var(ddof=1)) / m / independent)
    effect = (lacking * effect + Z**2 * k) / (lacking + Z**2)
    size = m * k / effect
    middle, half = recall + Z**2 / (2 * size), Z * np.sqrt(recall * (1 - recall) / size + (Z / (2 * size)) ** 2)
    low, high = ((middle + sign * half) / (1 + Z**2 / size) for sign in (-1, 1))
    return float(max(0.0, min(low, recall))), float(min(1.0, max(high, recall)))


def others_once(indices_mk: np.ndarray, rows_m: np.ndarray) -> np.ndarray:
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

    The mean over the sampled cells is judged, as it is the best estimate; the interval, which is reported with it, says
    how far the recall of all cells may be from it. ``graph.audit_cells`` makes it narrower; where the recall must not
    be below r at all, ask for that much more.

    Raises
    ------
    GraphError
        With the figures and what to change.
    """
    if audit.recall < minimum:
        raise GraphError(
            f"The neighbour graph found {audit.recall:.3f} of the exact neighbours of {audit.cells} sampled cells; its "
            f"95 % confidence interval is {audit.low:.3f}-{audit.high:.3f}, and graph.min_recall asks for "
            f"{minimum}. Raise graph.k, lower graph.min_recall, or use another graph.method (exact finds all)."
        )
