from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.neighbors import NearestNeighbors

from schelix_scale.errors import GraphError
from schelix_scale.graph import audit as module
from schelix_scale.graph.audit import Audit, audit_recall, recall_interval, require_recall
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
    assert audit.low <= expected.mean() <= audit.high
    assert (audit.low, audit.high) == recall_interval(np.round(expected * K), K)
    assert (audit.cells, audit.k, audit.method) == (N, K, "pynndescent")


def test_a_sample_is_near_the_whole() -> None:
    z_nd, neighbors = degraded(0.3)
    whole = true_recall(z_nd, neighbors).mean()
    covered = 0
    for seed in range(40):
        audit = audit_recall(z_nd, neighbors, 60, seed)
        assert audit.cells == 60
        covered += audit.low <= whole <= audit.high
    assert covered >= 36
    assert audit_recall(z_nd, neighbors, 60, 3) == audit_recall(z_nd, neighbors, 60, 3)


def test_a_cell_that_is_alone_lacks_no_neighbours() -> None:
    nobody = Neighbors(np.empty((1, 0), np.int32), np.empty((1, 0), np.float32), "exact")
    assert audit_recall(np.ones((1, 4), np.float32), nobody, 50, 0).recall == 1


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


def test_cells_are_audited_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the cells that are asked for, and the figures are the same."""
    z_nd, neighbors = degraded(0.2)
    whole = audit_recall(z_nd, neighbors, 300, 0)
    monkeypatch.setattr(module, "AUDIT_BLOCK", 70)
    assert audit_recall(z_nd, neighbors, 300, 0) == whole


def losses(kind: str, recall: float, cells: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Neighbours found of k: lost one by one, more in some cells than in others, or all of a cell."""
    if kind == "one by one":
        return rng.binomial(k, recall, cells)
    if kind == "uneven":
        return rng.binomial(k, rng.beta(recall * 3, (1 - recall) * 3, cells))
    return k * rng.binomial(1, recall, cells)


@pytest.mark.parametrize("kind", ["one by one", "uneven", "all of a cell"])
@pytest.mark.parametrize("recall", [0.8, 0.95, 0.98])
def test_the_interval_covers_what_it_should(kind: str, recall: float) -> None:
    """95 % of samples; the neighbours of a cell are not independent. A normal interval of them covers 20 to 90 %."""
    rng = np.random.default_rng(0)
    found = [recall_interval(losses(kind, recall, 200, 30, rng), 30) for _ in range(600)]
    assert np.mean([low <= recall <= high for low, high in found]) >= 0.925
    assert np.mean([high - low for low, high in found]) < 5 * np.sqrt(recall * (1 - recall) / 200)


def test_the_interval_of_all_or_none_is_that_of_cells() -> None:
    """Wilson's, as SciPy has it; it has a width where all were found."""
    low, high = recall_interval(np.full(200, 30), 30)
    expected = binomtest(200, 200).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert low < 0.99
    low, high = recall_interval(30 * (np.arange(2_000) >= 200), 30)
    expected = binomtest(1_800, 2_000).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_the_interval_of_nothing_found() -> None:
    low, high = recall_interval(np.zeros(50, int), 10)
    assert low == 0
    assert 0 < high < 0.1


def test_require_recall() -> None:
    audit = Audit(0.934, 0.92, 0.95, 500, 30, "pynndescent")
    require_recall(audit, 0.934)
    with pytest.raises(
        GraphError, match=r"found 0\.934 of the exact .* 500 sampled cells; .*0\.920-0\.950, .* asks for 0\.95"
    ):
        require_recall(audit, 0.95)


def test_figures_for_json() -> None:
    figures = Audit(0.9, 0.8, 1.0, 500, 30, "exact").to_dict()
    assert figures == {"recall": 0.9, "low": 0.8, "high": 1.0, "cells": 500, "k": 30, "method": "exact"}
