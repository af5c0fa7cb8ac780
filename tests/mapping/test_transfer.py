from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from schelix_scale.transfer import (
    LabelCalibration,
    Labels,
    NoveltyCalibration,
    batch_weights,
    expected_calibration_error,
    sharpen,
    vote,
)


def test_missing_labels_are_not_known() -> None:
    labels = Labels.of_column("type", ["b", None, "a", "Unknown", float("nan"), "", "b", " a "])
    assert labels.names == ("a", "b")
    assert labels.code_n.tolist() == [1, -1, 0, -1, -1, -1, 1, 0]


def test_votes_are_those_of_weighted_neighbours() -> None:
    rng = np.random.default_rng(0)
    cells, codes, query = rng.normal(size=(200, 3)), rng.integers(0, 4, 200), rng.normal(size=(20, 3))

    def kernel(distances: np.ndarray) -> np.ndarray:
        return np.exp(-((distances / distances[:, [6]]) ** 2))

    peer = KNeighborsClassifier(15, weights=kernel).fit(cells, codes)
    distances, indices = peer.kneighbors(query, 25)
    np.testing.assert_allclose(vote(distances, codes[indices], 4), peer.predict_proba(query), atol=1e-12)


def test_neighbours_without_a_label_have_no_vote() -> None:
    distances = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    found = vote(distances, np.array([[-1, 1, -1], [-1, -1, -1]]), 3)
    np.testing.assert_allclose(found, [[0, 1, 0], [1 / 3, 1 / 3, 1 / 3]])


def test_batches_have_the_same_weight() -> None:
    np.testing.assert_allclose(batch_weights(np.array([7, 7, 7, 9])), [1 / 6, 1 / 6, 1 / 6, 1 / 2])


def draw(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Votes that are too sure: the truth is drawn from their square root."""
    votes = rng.dirichlet(np.full(5, 0.4), n)
    true = sharpen(votes, 2.0, 0.05)
    return votes, np.array([rng.choice(5, p=row) for row in true])


def test_probabilities_and_sets_hold_on_new_cells() -> None:
    rng = np.random.default_rng(4)
    votes, true = draw(3000, rng)
    fit = LabelCalibration.fit(votes, true, np.ones(len(true)))
    new_votes, new = draw(3000, rng)
    found = fit.probabilities(new_votes)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    correct = found.argmax(axis=1) == new
    assert expected_calibration_error(found.max(axis=1), correct) < 0.03
    assert expected_calibration_error(new_votes.max(axis=1), correct) > 0.1
    for coverage in (0.8, 0.9, 0.99):
        sets = fit.sets(found, coverage)
        assert sets[np.arange(len(new)), new].mean() == pytest.approx(coverage, abs=0.02)
    assert fit.sets(found, 0.99).sum() > fit.sets(found, 0.8).sum()


def test_p_values_are_uniform_on_what_is_not_novel() -> None:
    rng = np.random.default_rng(5)
    fit = NoveltyCalibration.fit(rng.normal(size=2000), np.ones(2000))
    p = fit.p_values(rng.normal(size=5000))
    for level in (0.01, 0.05, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=0.02)
    assert fit.p_values(np.array([100.0]))[0] == pytest.approx(1 / 2001)
    assert fit.p_values(np.array([-100.0]))[0] == pytest.approx(1.0)


def test_calibration_error_by_hand() -> None:
    confidence, correct = np.array([0.95, 0.95, 0.55]), np.array([True, False, True])
    assert expected_calibration_error(confidence, correct, bins=10) == pytest.approx((2 * 0.45 + 0.45) / 3)


def test_a_hard_batch_makes_probabilities_careful() -> None:
    """Labels of one of four batches are drawn from softer votes: probabilities are softer than for the mean cell."""
    rng = np.random.default_rng(7)
    votes, true = draw(4000, rng)
    batch = np.repeat(np.arange(4), 1000)
    hard = batch == 3
    true[hard] = [rng.choice(5, p=row) for row in sharpen(votes[hard], 4.0, 0.1)]
    pooled = LabelCalibration.fit(votes, true, np.ones(len(true)))
    careful = LabelCalibration.fit(votes, true, np.ones(len(true)), batch)
    surest = [fit.probabilities(votes).max(axis=1).mean() for fit in (pooled, careful)]
    assert surest[1] < surest[0] - 0.01
    alone = LabelCalibration.fit(votes, true, np.ones(len(true)), np.zeros(len(true)))
    assert (alone.temperature, alone.floor) == (pooled.temperature, pooled.floor)
