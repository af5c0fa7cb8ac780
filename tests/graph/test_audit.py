from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from schelix_scale.errors import GraphError
from schelix_scale.graph.audit import Audit, audit_recall, require_recall
from schelix_scale.graph.knn import Neighbors, find_neighbors
from tests.synthetic import gaussian_cells

N, K = 400, 10


def degraded(share: float, seed: int = 0) -> tuple[np.ndarray, Neighbors]:
    """An exact graph in which a share of neighbours is replaced by random other cells, at their true distances."""
    z_nd, _, _ = gaussian_cells(n=N)
    unit = z_nd / np.linalg.norm(z_nd, axis=1, keepdims=True)
    search = NearestNeighbors(n_neighbors=K + 1, metric="cosine", algorithm="brute").fit(z_nd)
    indices = search.kneighbors(z_nd, return_distance=False)[:, 1:]
    rng = np.random.default_rng(seed)
    for row in range(N):
        for column in np.flatnonzero(rng.random(K) < share):
            indices[row, column] = rng.choice(np.setdiff1d(np.arange(N), [row, *indices[row]]))
    distances = 1 - np.einsum("nd,nkd->nk", unit, unit[indices])
    order = np.argsort(distances, axis=1)
    indices, distances = (np.take_along_axis(values, order, axis=1) for values in (indices, distances))
    return z_nd, Neighbors(indices, distances.astype(np.float32), "pynndescent")


def true_recall(z_nd: np.ndarray, neighbors: Neighbors) -> np.ndarray:
    """Share of each cell's exact neighbours that the graph names, by scikit-learn."""
    search = NearestNeighbors(n_neighbors=K + 1, metric="cosine", algorithm="brute").fit(z_nd)
    exact = search.kneighbors(z_nd, return_distance=False)[:, 1:]
    return np.array([len(set(a) & set(b)) / K for a, b in zip(exact, neighbors.indices_nk, strict=True)])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_recall_of_a_degraded_graph(share: float) -> None:
    z_nd, neighbors = degraded(share)
    audit = audit_recall(z_nd, neighbors, N, 0)
    expected = true_recall(z_nd, neighbors)
    assert audit.recall == pytest.approx(expected.mean(), abs=1e-9)
    assert expected.mean() == pytest.approx(1 - share, abs=0.03)
    half = 1.96 * expected.std() / np.sqrt(N)
    assert audit.low == pytest.approx(expected.mean() - half, abs=1e-9)
    assert audit.high == pytest.approx(min(1, expected.mean() + half), abs=1e-9)
    assert (audit.cells, audit.k, audit.method) == (N, K, "pynndescent")


def test_a_sample_is_near_the_whole() -> None:
    z_nd, neighbors = degraded(0.3)
    whole = true_recall(z_nd, neighbors).mean()
    covered = 0
    for seed in range(20):
        audit = audit_recall(z_nd, neighbors, 60, seed)
        assert audit.cells == 60
        covered += audit.low <= whole <= audit.high
    assert covered >= 16
    assert audit_recall(z_nd, neighbors, 60, 3) == audit_recall(z_nd, neighbors, 60, 3)


def test_more_cells_asked_than_there_are() -> None:
    z_nd, neighbors = degraded(0.2)
    assert audit_recall(z_nd, neighbors, 10 * N, 0).cells == N


def test_exact_graph_with_duplicates_has_full_recall() -> None:
    z_nd = np.repeat(gaussian_cells(n=30)[0], 25, axis=0)
    audit = audit_recall(z_nd, find_neighbors(z_nd, K, "exact", 0, 1), 500, 0)
    assert audit.recall == 1


def test_wrong_indices_with_right_distances_are_found_out() -> None:
    """What pynndescent below 0.7 did above 2**24 cells: distances are right, the numbers of the cells are not."""
    z_nd, neighbors = degraded(0.0)
    wrong = Neighbors((neighbors.indices_nk + 1) % N, neighbors.distances_nk, "pynndescent")
    assert audit_recall(z_nd, wrong, N, 0).recall == pytest.approx(true_recall(z_nd, wrong).mean(), abs=0.01)


def test_a_cell_itself_and_repeats_do_not_count() -> None:
    z_nd, neighbors = degraded(0.0)
    indices = neighbors.indices_nk.copy()
    indices[:, 0] = np.arange(N)
    indices[:, 2] = indices[:, 1]
    found = audit_recall(z_nd, Neighbors(indices, neighbors.distances_nk, "ivf"), N, 0)
    assert found.recall == pytest.approx((K - 2) / K, abs=1e-9)


def test_require_recall() -> None:
    audit = Audit(0.934, 0.92, 0.95, 500, 30, "pynndescent")
    require_recall(audit, 0.934)
    with pytest.raises(GraphError, match=r"found 0\.934 of the exact .* of 500 sampled cells; .* asks for 0\.95"):
        require_recall(audit, 0.95)


def test_figures_for_json() -> None:
    figures = Audit(0.9, 0.8, 1.0, 500, 30, "exact").to_dict()
    assert figures == {"recall": 0.9, "low": 0.8, "high": 1.0, "cells": 500, "k": 30, "method": "exact"}
