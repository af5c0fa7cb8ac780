"""P-values of novelty of cells and their kin: calibrated for each number of kin."""

from __future__ import annotations

import numpy as np
import pytest

from schelix_scale.mapping.calibration import KinCalibration
from schelix_scale.mapping.kin import KinScores
from schelix_scale.transfer import NoveltyCalibration

SIZES = (1, 2, 4, 8, 15)


def test_p_values_are_calibrated_for_each_number_of_kin() -> None:
    """The lesser of two p-values is small more often than either; small kin is calibrated on small kin."""
    rng = np.random.default_rng(3)

    def scores(n: int) -> np.ndarray:
        """What 15 cells score has something of what two of them do."""
        single = rng.normal(size=(n, 15))
        return np.stack([single[:, :k].mean(axis=1) for k in SIZES])

    held_out, batch = scores(4_000), np.repeat(np.arange(8), 500)
    held_out[3:, batch < 4] = np.nan
    calibration = KinCalibration.fit(held_out, batch)
    fewer = (0, 1, 1, 1, 2)
    for size in range(5):
        fresh = scores(4_000)
        most, less = fresh[size], fresh[fewer[size]]
        p = calibration.p_values(KinScores(fresh[0], most, most, less, np.full(4_000, size)))
        for level in (0.05, 0.2):
            assert np.mean(p <= level) == pytest.approx(level, rel=0.25), (size, level)
        far = np.full(4_000, 9.0)
        again = calibration.p_values(KinScores(far, most, far, less, np.full(4_000, size)))
        assert (again <= 0.002).all(), "what is farther off than all is novel"
        kin_alone = calibration.p_values(KinScores(np.zeros(4_000), most, far, far, np.full(4_000, size)))
        assert (kin_alone > 0.01).all(), "half of single cells are as far off: kin says so alone"


def test_batches_that_are_too_small_for_kin_calibrate_none() -> None:
    """A batch of 25 cells is looked at in twos, which is no measure for more; nor is one batch for others."""
    scores, batch = np.random.default_rng(9).normal(size=(5, 625)), np.repeat(np.arange(5), [25, 120, 120, 120, 240])
    scores[2:, batch == 0] = np.nan
    scores[4, batch < 4] = np.nan
    found = KinCalibration.fit(scores, batch)
    assert [len(part.scores_s) for part in found.sizes] == [625, 625, 600, 600]
    assert [len(part.scores_s) for part in found.both] == [625, 625, 600, 600]
    np.testing.assert_array_equal(found.sizes[3].scores_s, np.sort(scores[3, 25:]))
    last = batch > 2
    assert len(KinCalibration.fit(scores[:, last], batch[last]).sizes) == 4
    alone = batch == 4
    assert len(KinCalibration.fit(scores[:, alone], batch[alone]).sizes) == 5, "there is no other"


def test_held_out_cells_are_not_counted_twice() -> None:
    """A held-out cell has the p-value that a new cell would have among the others."""
    scores = np.random.default_rng(13).normal(size=50)
    calibration = NoveltyCalibration.fit(scores, np.ones(50))
    others = np.array([(np.delete(scores, i) >= score).sum() for i, score in enumerate(scores)])
    np.testing.assert_allclose(calibration.p_values(scores, 1 / 50), (others * 50 / 51 / 50) + 1 / 51)
    np.testing.assert_allclose(calibration.p_values(scores), ((others + 1) * 50 / 51 / 50) + 1 / 51)


def test_two_calibrations_of_novelty_are_one_p_value() -> None:
    """A type with few cells is told by its few, one with many by all of them."""
    rng = np.random.default_rng(2)
    sizes = tuple(NoveltyCalibration.fit(rng.normal(size=2_000), np.ones(2_000)) for _ in range(5))
    both = tuple(NoveltyCalibration.fit(rng.exponential(size=2_000), np.ones(2_000)) for _ in range(5))
    most, fewer = np.array([9.0, 0.0, 0.0]), np.array([0.0, 9.0, 0.0])
    p = KinCalibration(sizes, both).p_values(KinScores(np.full(3, 9.0), most, most, fewer, np.full(3, 4)))
    assert (p[:2] < 0.01).all()
    assert p[2] > 0.1


@pytest.mark.parametrize("sizes", [1, 2])
def test_held_out_cells_have_the_p_values_that_new_ones_would_have(sizes: int) -> None:
    """Of a calibration on all others but for the cell itself: by counting, of each step that leads there."""
    rng, n = np.random.default_rng(19), 60
    scores = rng.normal(size=(sizes, n))
    batch = np.repeat([0, 1, 2], 20)
    found = KinCalibration.fit(scores, batch).of_held_out(scores, batch)

    def p_values(values: np.ndarray) -> np.ndarray:
        above = np.array([(np.delete(values, i) >= value - 1e-12).sum() for i, value in enumerate(values)])
        return (above / n) * n / (n + 1) + 1 / (n + 1)

    single = p_values(scores[0])
    if sizes == 1:
        lesser = single
    else:
        pair = p_values(scores[1])
        lesser = np.maximum(pair, single / 20)  # of two cells, few are two
    np.testing.assert_allclose(found, p_values(-np.log(lesser)))
