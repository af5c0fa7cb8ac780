"""Brute-force ranking against NumPy's sort and scikit-learn."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from schelix_scale.errors import GraphError
from schelix_scale.graph import nearest as module
from schelix_scale.graph.build import TASK_BYTES
from schelix_scale.graph.nearest import distinct, nearest, nearest_among, nearest_in_blocks
from schelix_scale.graph.vectors import row_blocks, unit_rows
from tests.synthetic import gaussian_cells


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 9), st.integers(0, 3_000), st.booleans())
def test_highest_scores_of_each_row(seed: int, rows: int, k: int, more: int, floor: bool) -> None:
    """With rows of many candidates, with ties (rounded scores), and with a floor that k scores reach."""
    rng = np.random.default_rng(seed)
    scores = np.round(rng.uniform(-1, 1, (rows, k + more)), rng.integers(1, 8)).astype(np.float32)
    expected = -np.sort(-scores, axis=1)[:, :k]
    columns, values = nearest(scores.copy(), k, expected[:, -1] if floor else None)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(np.take_along_axis(scores, columns, axis=1), expected)
    assert all(len(set(row)) == k for row in columns.tolist())


def test_a_floor_that_too_few_scores_reach() -> None:
    scores = np.random.default_rng(0).uniform(-1, 1, (4, 50)).astype(np.float32)
    expected = -np.sort(-scores, axis=1)[:, :5]
    floor = np.array([-1, expected[1, 2], 1, expected[3, 4]], np.float32)
    np.testing.assert_array_equal(nearest(scores.copy(), 5, floor)[1], expected)


def test_what_must_not_be_chosen() -> None:
    scores = np.full((3, 5), 0.5, np.float32)
    scores[:, 1] = -np.inf
    columns, _ = nearest(scores, 4)
    assert (np.sort(columns, axis=1) == [0, 2, 3, 4]).all()


@pytest.mark.parametrize("block", [7, 50, 1_000])
def test_neighbours_over_blocks_are_those_of_scikit_learn(block: int) -> None:
    unit = unit_rows(gaussian_cells(n=400)[0])
    rows = np.array([0, 3, 77, 399])
    blocks = ((start, unit[start:stop]) for start, stop in row_blocks(len(unit), block))
    found, distances = nearest_in_blocks(unit[rows], blocks, 6, rows)
    search = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit(unit.astype(np.float64))
    expected, indices = search.kneighbors(unit[rows].astype(np.float64))
    np.testing.assert_array_equal(found, indices[:, 1:])
    np.testing.assert_allclose(distances, expected[:, 1:], atol=1e-6)
    others = ((start, unit[start:stop]) for start, stop in row_blocks(len(unit), block))
    own, _ = nearest_in_blocks(unit[rows], others, 6)
    np.testing.assert_array_equal(own, indices[:, :6])


@pytest.mark.parametrize("offset", [2**24, 2**31, 2**33])
def test_row_numbers_of_any_size(offset: int) -> None:
    """Blocks that say that they start beyond what 24 bits of a float, or int32, can number."""
    unit = unit_rows(gaussian_cells(n=60)[0])
    found, _ = nearest_in_blocks(unit[:5], [(offset, unit[:30]), (offset + 30, unit[30:])], 4)
    exact = np.argsort(-(unit[:5] @ unit.T), axis=1)[:, :4]
    np.testing.assert_array_equal(found, exact + offset)


@pytest.mark.parametrize("block", [20, 37, 1_000])
def test_nearest_candidates(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, among candidates in any order, some of which are the queries themselves."""
    monkeypatch.setattr(module, "BLOCK_CANDIDATES", block)
    unit = unit_rows(gaussian_cells(n=400)[0])
    candidates = np.random.default_rng(0).permutation(400)[:150]
    scores = unit[50:90].astype(np.float64) @ unit[candidates].astype(np.float64).T
    scores[candidates[None, :] == np.arange(50, 90)[:, None]] = -np.inf
    expected = np.argsort(-scores, axis=1)[:, :6]
    columns, values = nearest_among(unit[50:90], unit, candidates, 6, 50)
    assert all(len(set(row)) == 6 for row in columns.tolist())
    for found in (values, np.take_along_axis(scores, columns, axis=1)):
        np.testing.assert_allclose(found, np.take_along_axis(scores, expected, axis=1), atol=1e-6)


def test_memory_does_not_grow_with_the_candidates() -> None:
    """Not even where all candidates are equal, so that all their scores are ties."""
    vectors = np.tile(unit_rows(gaussian_cells(n=1)[0]), (100_000, 1))
    tracemalloc.start()
    columns, values = nearest_among(vectors[:256], vectors, np.arange(100_000), 30, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < TASK_BYTES
    assert all(len(set(row)) == 30 for row in columns.tolist())
    np.testing.assert_allclose(values, 1, atol=1e-6)


def test_what_is_not_finite_has_no_neighbours() -> None:
    unit = unit_rows(gaussian_cells(n=300)[0])
    queries = unit[:4].copy()
    queries[1] = np.nan
    with pytest.raises(GraphError, match="not finite"):
        nearest_among(queries, unit, np.arange(4, 300), 5)


def test_distinct() -> None:
    numbers = np.random.default_rng(0).integers(0, 50, (20, 9)).astype(np.int32)
    np.testing.assert_array_equal(distinct(numbers), np.unique(numbers))
    assert distinct(numbers[:0]).size == 0
