from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import chisquare

from schelix_scale.graph.operator import Operator
from schelix_scale.training.walks import TOGETHER, walk


def random_operator(n: int, k: int, seed: int) -> tuple[Operator, np.ndarray]:
    """Return an operator with k entries a row, and the same as a dense matrix."""
    rng = np.random.default_rng(seed)
    indices = np.array([rng.choice(n, k, replace=False) for _ in range(n)])
    weights = rng.dirichlet(np.ones(k), n).astype(np.float32)
    dense = np.zeros((n, n))
    np.put_along_axis(dense, indices, weights, axis=1)
    return Operator(indices.astype(np.int32), weights), dense


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_ends_as_the_powers_of_p_say(steps: int, k: int) -> None:
    operator, dense = random_operator(12, k, 1)
    draws = 40_000
    for start in (0, 5):
        expected = np.linalg.matrix_power(dense, steps)[start]
        rng = np.random.default_rng([start, steps])
        counts = np.bincount(walk(operator, np.full(draws, start), rng.random((steps, draws)))[-1], minlength=12)
        possible = expected > 0
        assert not counts[~possible].any()
        if possible.sum() > 1:
            assert chisquare(counts[possible], draws * expected[possible] / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("walks", [0, 1, TOGETHER - 1, TOGETHER, 3 * TOGETHER + 5])
def test_each_step_is_where_the_draw_lies_in_the_cumulative_weights(walks: int) -> None:
    """Each step of each walk by itself, by NumPy's search; walks begin anywhere and do not disturb one another."""
    operator, _ = random_operator(300, 31, 2)
    rng = np.random.default_rng(3)
    rows, draw_sm = rng.integers(0, 300, walks), rng.random((32, walks))
    path_sm = walk(operator, rows, draw_sm)
    assert path_sm.shape == (33, walks)
    np.testing.assert_array_equal(path_sm[0], rows)
    for (here_m, there_m), draw_m in zip(pairwise(path_sm), draw_sm, strict=True):
        for here, there, draw in zip(here_m, there_m, draw_m, strict=True):
            cumulative = np.cumsum(operator.weights_nk[here], dtype=np.float64)
            column = np.searchsorted(cumulative[:-1], draw * cumulative[-1], side="right")
            assert there == operator.indices_nk[here, column]


def test_the_least_and_the_largest_draw_lead_to_the_first_and_the_last_column() -> None:
    operator, _ = random_operator(50, 5, 4)
    rows = np.arange(50)
    path = walk(operator, rows, np.full((1, 50), np.nextafter(1, 0)))
    np.testing.assert_array_equal(path[-1], operator.indices_nk[:, -1])
    np.testing.assert_array_equal(walk(operator, rows, np.zeros((1, 50)))[-1], operator.indices_nk[:, 0])
    np.testing.assert_array_equal(walk(operator, rows, np.empty((0, 50)))[-1], rows)
