"""Novelty of cells and their kin, against a mean over cells that are sorted one by one."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from schelix_scale import Reference
from schelix_scale.mapping.calibration import KinCalibration, hold_out
from schelix_scale.mapping.kin import KinScores, Pool
from schelix_scale.mapping.reference import Frozen
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.transfer import NoveltyCalibration


def expected(pool: np.ndarray, raw: np.ndarray, score: np.ndarray, k: int) -> np.ndarray:
    """Mean of each cell's score and those of the k - 1 other cells of the pool of highest cosine similarity."""
    alike, out = cosine_similarity(raw, raw[pool]), []
    for cell in range(len(raw)):
        others = [place for place in np.argsort(-alike[cell]) if pool[place] != cell][: k - 1]
        out.append(np.mean([score[cell], *score[pool[others]]]))
    return np.array(out)


@pytest.mark.parametrize(("size", "k"), [(200, 15), (149, 8), (60, 4), (20, 2), (19, 1)])
def test_a_cell_and_its_kin(size: int, k: int) -> None:
    rng = np.random.default_rng(0)
    raw, score = rng.normal(size=(300, 6)).astype(np.float32), rng.normal(size=300)
    rows = np.sort(rng.choice(300, size, replace=False))
    found = Pool.of_cells(rows, raw[rows], score[rows]).mean_scores(np.arange(300), raw, score)
    np.testing.assert_allclose(found, expected(rows, raw, score, k), rtol=1e-6)


def test_kin_is_of_the_own_batch() -> None:
    rng = np.random.default_rng(1)
    raw, score, batch = rng.normal(size=(400, 5)).astype(np.float32), rng.normal(size=400), np.arange(400) % 2
    pools = []
    for code in (0, 1):
        rows = np.flatnonzero(batch == code)
        pools.append(Pool.of_cells(rows, raw[rows], score[rows]))
    part = np.r_[np.arange(30), 399]
    found = KinScores.of_cells(pools, batch[part], part, raw[part], score[part])
    for code in (0, 1):
        rows = np.flatnonzero(batch == code)
        of_batch = expected(np.arange(200), raw[rows], score[rows], 15)
        of_batch, here = of_batch[np.isin(rows, part)], batch[part] == code
        np.testing.assert_allclose(found.mean[here], of_batch, rtol=1e-6)
        np.testing.assert_allclose(found.above[here], of_batch - np.median(score[rows]), atol=1e-6)
    assert (found.size == 4).all()
    np.testing.assert_array_equal(found.own, score[part])


def test_cells_that_are_off_together_are_novel_and_one_that_is_off_alone_is_not() -> None:
    """Single cells are as far off now and then; kin without any cell that is far off counts up to a fifth of that."""
    rng = np.random.default_rng(2)
    alone = NoveltyCalibration.fit(np.r_[rng.normal(size=1940), np.full(60, 6.0)], np.ones(2000))
    means = NoveltyCalibration.fit(rng.normal(scale=0.3, size=2000), np.ones(2000))
    own, above = np.array([4.0, 1.0, 4.0, 7.0]), np.array([2.0, 2.0, 0.0, 0.0])
    told = alone.p_values(own)
    p = KinCalibration((alone, alone, alone, alone, means)).p_values(KinScores(own, own, above, np.full(4, 4)))
    assert told[0] > 0.02
    assert p[0] < 0.01
    assert p[1] == pytest.approx(told[1] / 5)
    assert p[1] > 0.01
    np.testing.assert_array_equal(p[2:], told[2:])
    assert p[3] < 0.01, "what is farther off than all is novel, whatever its kin"


def test_means_are_compared_with_means_of_as_many_cells() -> None:
    """A small batch has small kin, whose means vary more."""
    rng = np.random.default_rng(3)
    counts = (1, 2, 4, 8, 15)
    sizes = tuple(NoveltyCalibration.fit(rng.normal(scale=count**-0.5, size=2000), np.ones(2000)) for count in counts)
    own = np.full(2000, np.quantile(sizes[0].scores_s, 0.7))  # between kin's p-value and five times that
    for place, count in enumerate(counts[1:], 1):
        above = rng.normal(scale=count**-0.5, size=2000)
        p = KinCalibration(sizes).p_values(KinScores(own, own, above, np.full(2000, place)))
        assert np.abs(np.mean(p <= 0.1) - 0.1) < 0.03


def test_held_out_cells_have_kin_in_their_batch(reference: Reference) -> None:
    frozen: Frozen = reference.frozen
    held_out = hold_out(frozen, MapConfig())
    batch, raw = frozen.batch_n[held_out.rows], np.asarray(frozen.raw_na[held_out.rows])
    assert held_out.pool >= np.bincount(batch).max(), "all are in the pool, for this to be told"
    for code in np.unique(batch):
        mine = np.flatnonzero(batch == code)
        for place, size in enumerate((1, 2, 4, 8, 15)):
            whole = expected(np.arange(len(mine)), raw[mine], held_out.scores[0, mine], size)
            whole -= np.median(held_out.scores[0, mine]) if place else 0
            np.testing.assert_allclose(held_out.scores[place, mine], whole, atol=1e-5)
