"""Features of cells -> k nearest neighbours by cosine distance. The only module that imports pynndescent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from schelix_scale.config import GraphConfig
from schelix_scale.errors import GraphError
from schelix_scale.graph.vectors import unit_rows

QUERY_CELLS = 2_000
COMPILE_CELLS = 3_000
# pynndescent's defaults (up to 12 trees, .001) find as much in a third more time; every build is audited.
TREES, DELTA = 8, 0.01


@dataclass(frozen=True)
class Neighbors:
    """The k nearest other cells of each cell, nearest first.

    Attributes
    ----------
    indices_nk
        (n, k) row numbers, never the cell itself.
    distances_nk
        (n, k) cosine distances (1 - cosine similarity), float32.
    method
        ``exact``, ``ivf`` or ``pynndescent``.
    """

    indices_nk: np.ndarray
    distances_nk: np.ndarray
    method: str


def choose_method(n_cells: int, config: GraphConfig) -> str:
    """Return the search that ``method=auto`` stands for at this number of cells."""
    if config.method != "auto":
        return config.method
    return "exact" if n_cells < config.exact_below else "ivf"


def require_cells(n_cells: int, k: int) -> None:
    """Raise if there are not k other cells.

    Raises
    ------
    GraphError
        With what to change.
    """
    if k >= n_cells:
        raise GraphError(
            f"k = {k} neighbours need more than {k} cells, got {n_cells}. Lower graph.k (--set graph.k={n_cells // 2})."
        )


def find_neighbors(
    features_nd: np.ndarray,
    k: int,
    method: str,
    seed: int,
    threads: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Neighbors:
    """Find the k nearest other cells of every cell.

    Parameters
    ----------
    features_nd
        (n, d) features; only directions matter (cosine).
    method
        ``exact`` (brute force, n^2 work, no compilation) or ``pynndescent`` (approximate).

    Raises
    ------
    GraphError
        There are no k other cells.
    """
    n = len(features_nd)
    require_cells(n, k)
    unit = unit_rows(features_nd)
    if method == "exact":
        parts = []
        for start in range(0, n, QUERY_CELLS):
            rows = np.arange(start, min(start + QUERY_CELLS, n))
            parts.append(exact_neighbors(unit[rows], unit, k, own_rows=rows))
            advance(len(rows))
        indices, distances = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Neighbors(indices, distances, method)
    found = Neighbors(*approximate_neighbors(unit, k, seed, threads), method)
    advance(n)
    return found


def exact_neighbors(
    query_md: np.ndarray, reference_nd: np.ndarray, k: int, own_rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Brute-force neighbours among unit rows: (m, k) indices and cosine distances.

    ``own_rows`` (m,) are the queries' own positions in the reference, which are left out of their lists.
    """
    from sklearn.neighbors import NearestNeighbors

    extra = 0 if own_rows is None else 1
    search = NearestNeighbors(n_neighbors=k + extra, algorithm="brute").fit(reference_nd)
    distances, indices = search.kneighbors(query_md)
    if own_rows is not None:
        distances, indices = _drop_self(distances, indices, own_rows)
    return indices, (distances**2 / 2).astype(np.float32)


def _drop_self(distances: np.ndarray, indices: np.ndarray, own_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove each row's own number, or the last entry where ties pushed it off the list."""
    keep = indices != own_rows[:, None]
    keep[keep.all(axis=1), -1] = False
    shape = (len(indices), indices.shape[1] - 1)
    return distances[keep].reshape(shape), indices[keep].reshape(shape)


def approximate_neighbors(unit_nd: np.ndarray, k: int, seed: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Approximate neighbours among unit rows by pynndescent: (n, k) indices and cosine distances."""
    import numba
    from pynndescent import NNDescent

    threads = min(threads, int(numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]  # more is an error

    index = NNDescent(
        unit_nd, metric="euclidean", n_neighbors=k + 1, random_state=seed, n_jobs=threads, n_trees=TREES, delta=DELTA
    )
    indices, distances = index.neighbor_graph
    del index
    complete = (indices >= 0).all(axis=1)
    distances, indices = _drop_self(distances, indices.astype(np.int64), np.arange(len(unit_nd)))
    distances = (distances**2 / 2).astype(np.float32)
    if not complete.all():
        rows = np.flatnonzero(~complete)
        indices[rows], distances[rows] = exact_neighbors(unit_nd[rows], unit_nd, k, own_rows=rows)
    return indices, distances


def compile_search(dims: int, k: int, threads: int) -> None:
    """Search among a few random rows, so that pynndescent compiles what a search needs."""
    rows = np.random.default_rng(0).normal(size=(max(COMPILE_CELLS, 4 * k), dims))
    approximate_neighbors(unit_rows(rows), k, 0, threads)
