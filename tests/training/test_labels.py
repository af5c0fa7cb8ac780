from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schelix_scale.stores.known_labels import UNKNOWN
from schelix_scale.training.labels import Labels
from schelix_scale.training.walks import walk
from tests.training.tools import neighbours

LABEL = np.array([0, 0, 0, 0, 1, 1, UNKNOWN, 2, UNKNOWN, 0, 1, 2])
BATCH = np.array([0, 0, 0, 1, 0, 1, 1, 1, 0, 0, 0, 1])


@pytest.mark.parametrize(
    ("label", "shares"),
    [
        (0, {0: 1 / 8, 1: 1 / 8, 2: 1 / 8, 9: 1 / 8, 3: 1 / 2}),  # four cells of batch 0 and one of batch 1
        (1, {4: 1 / 4, 10: 1 / 4, 5: 1 / 2}),
        (2, {7: 1 / 2, 11: 1 / 2}),
    ],
)
def test_draws_evenly_over_batches_then_cells(label: int, shares: dict[int, float]) -> None:
    drawn = Labels.arrange(LABEL, BATCH).draw(np.full(40_000, label), np.random.default_rng(0).random((2, 40_000)))
    found = np.bincount(drawn, minlength=12) / 40_000
    expected = np.array([shares.get(cell, 0.0) for cell in range(12)])
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert not found[expected == 0].any()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_drawn_cells_have_the_label(n: int, labels: int, batches: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    label, batch = rng.integers(-1, labels, n), rng.integers(0, batches, n)
    known = label[label != UNKNOWN]
    if not len(known):
        return
    wanted = rng.choice(known, 50)
    np.testing.assert_array_equal(label[Labels.arrange(label, batch).draw(wanted, rng.random((2, 50)))], wanted)


def test_redirects_to_the_first_label_on_the_way() -> None:
    """Columns: meets label 1 before 0; meets nothing; starts on label 2 and ends on 0; meets 0 at its end."""
    path = np.array([[6, 6, 7, 8], [4, 8, 6, 6], [0, 6, 3, 9]])
    labels = Labels.arrange(LABEL, BATCH)
    ends = np.array([labels.redirect(path, 1.0, np.random.default_rng(seed).random((3, 4))) for seed in range(50)])
    assert set(LABEL[ends[:, 0]]) == {1}
    assert set(ends[:, 1]) == {6}
    assert set(ends[:, 2]) == {7, 11}
    assert set(LABEL[ends[:, 3]]) == {0}
    np.testing.assert_array_equal(labels.redirect(path, 0.0, np.zeros((3, 4))), path[-1])


def test_share_of_the_walks_is_redirected() -> None:
    path = np.tile([[0], [8]], (1, 20_000))
    ends = Labels.arrange(LABEL, BATCH).redirect(path, 0.3, np.random.default_rng(1).random((3, 20_000)))
    assert np.mean(ends != 8) == pytest.approx(0.3, abs=0.015)


def test_labels_met_by_walks_are_label_propagation() -> None:
    """Which label an absorbed walk finds is distributed as the harmonic solution (Zhu et al. 2003), dense NumPy."""
    rng = np.random.default_rng(3)
    operator = neighbours(rng.normal(size=(40, 2)), 5)
    label = np.where(rng.random(40) < 0.4, rng.integers(0, 2, 40), UNKNOWN)
    dense = np.zeros((40, 40))
    np.put_along_axis(dense, operator.indices_nk.astype(int), operator.weights_nk, axis=1)
    known = label != UNKNOWN
    harmonic = np.linalg.solve(
        np.eye((~known).sum()) - dense[~known][:, ~known], dense[~known][:, known] @ np.eye(2)[label[known]]
    )
    labels = Labels.arrange(label, np.zeros(40, int))
    start = np.flatnonzero(~known)[:5]
    for cell, expected in zip(start, harmonic, strict=False):
        path = walk(operator, np.full(4_000, cell), rng.random((300, 4_000)))
        found = label[labels.redirect(path, 1.0, rng.random((3, 4_000)))]
        np.testing.assert_allclose([np.mean(found == 0), np.mean(found == 1)], expected, atol=0.035)
