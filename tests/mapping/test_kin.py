"""Novelty of cells and their kin, against a mean over cells that are sorted one by one."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from schelix_scale import Reference
from schelix_scale.mapping.calibration import KinCalibration, _corrected, hold_out
from schelix_scale.mapping.kin import KinScores, Pool
from schelix_scale.mapping.novelty import Evidence, away_from, whitened, whitening
from schelix_scale.mapping.reference import Frozen
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.transfer import NoveltyCalibration


def expected(pool: np.ndarray, raw: np.ndarray, score: np.ndarray, away: np.ndarray, k: int) -> np.ndarray:
    """Mean score + log |mean way|^2 of each cell and the k - 1 others of the pool of highest cosine similarity."""
    alike, out = cosine_similarity(raw, raw[pool]), []
    for cell in range(len(raw)):
        others = [place for place in np.argsort(-alike[cell]) if pool[place] != cell][: k - 1]
        kin = [cell, *pool[others]]
        out.append(np.mean(score[kin]) + 2 * np.log(np.linalg.norm(np.mean(away[kin], axis=0))))
    return np.array(out)


def made_up(seed: int, n: int) -> tuple[np.ndarray, Evidence]:
    """Components of cells, and what tells how novel they are."""
    rng = np.random.default_rng(seed)
    raw, away = rng.normal(size=(n, 6)).astype(np.float32), rng.normal(size=(n, 4))
    return raw, Evidence(rng.normal(size=n), whitened(away, np.eye(4)))


@pytest.mark.parametrize(("size", "k"), [(200, 15), (149, 8), (60, 4), (20, 2), (19, 1)])
def test_a_cell_and_its_kin(size: int, k: int) -> None:
    raw, own = made_up(0, 300)
    rows = np.sort(np.random.default_rng(0).choice(300, size, replace=False))
    found = Pool.of_cells(rows, raw[rows], own[rows]).scores(np.arange(300), raw, own)
    np.testing.assert_allclose(found, expected(rows, raw, own.score_m, own.away_md, k), rtol=1e-5)


def test_the_order_of_cells_decides_no_digit() -> None:
    raw, own = made_up(4, 300)
    again = np.random.default_rng(4).permutation(300)
    found, other = (
        Pool.of_cells(np.arange(300), raw[order], own[order]).scores(np.arange(300), raw[order], own[order])
        for order in (np.arange(300), again)
    )
    np.testing.assert_array_equal(found[again], other)


def test_kin_is_of_the_own_batch() -> None:
    (raw, own), batch = made_up(1, 400), np.arange(400) % 2
    pools = []
    for code in (0, 1):
        rows = np.flatnonzero(batch == code)
        pools.append(Pool.of_cells(rows, raw[rows], own[rows]))
    part = np.r_[np.arange(30), 399]
    found = KinScores.of_cells(pools, batch[part], part, raw[part], own[part])
    for code in (0, 1):
        rows = np.flatnonzero(batch == code)
        of_batch = expected(np.arange(200), raw[rows], own.score_m[rows], own.away_md[rows], 15)
        of_batch, here = of_batch[np.isin(rows, part)], batch[part] == code
        np.testing.assert_allclose(found.kin[here], of_batch, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.above[here], of_batch - np.quantile(own.score_m[rows], 0.25), atol=1e-4)
    assert (found.size == 4).all()
    alone = own.score_m[part] + 2 * np.log(np.linalg.norm(own.away_md[part], axis=1))
    np.testing.assert_allclose(found.single, alone, rtol=1e-6)


def test_ways_are_those_from_the_mean_of_the_nearest() -> None:
    rng = np.random.default_rng(5)
    reference, cells = rng.normal(size=(100, 3)).astype(np.float32), rng.normal(size=(7, 3)).astype(np.float32)
    near = np.argsort(((cells[:, None] - reference) ** 2).sum(axis=2), axis=1)[:, :30]
    found = away_from(reference, cells, near)
    for cell in range(7):
        np.testing.assert_allclose(found[cell], cells[cell] - reference[near[cell, :15]].mean(axis=0), atol=1e-6)


def test_ways_are_in_standard_deviations_about_none() -> None:
    """A direction in which all held-out cells are away counts as little as one in which they vary."""
    rng = np.random.default_rng(6)
    away = rng.normal(size=(20_000, 3)) @ np.array([[2.0, 0, 0], [1.0, 0.5, 0], [0, 0, 1.0]]) + [0, 3.0, 0]
    white = whitened(away, whitening(away))
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(3), atol=0.02)


def test_a_common_way_tells_more_than_how_far_cells_are() -> None:
    """All cells are as far away, but those of one type into one direction."""
    rng = np.random.default_rng(7)
    raw = np.repeat(np.eye(4), 100, axis=0) + rng.normal(scale=0.05, size=(400, 4))
    away = rng.normal(size=(400, 20))
    away[:100] = rng.normal(scale=0.3, size=(100, 20)) + np.eye(20)[0] * 4
    away *= np.sqrt(20) / np.linalg.norm(away, axis=1, keepdims=True)
    own = Evidence(rng.normal(size=400), whitened(away, np.eye(20)))
    found = Pool.of_cells(np.arange(400), raw, own).scores(np.arange(400), raw, own)
    assert found[:100].min() > found[100:].max()
    assert np.median(own.single[:100]) < np.quantile(own.single[100:], 0.8), "single cells do not tell it"


def test_a_type_that_is_most_of_a_batch_does_not_hide_itself() -> None:
    """Cells that are far off stand out as much if they are six in ten of a batch as if they are one in ten."""
    rng = np.random.default_rng(8)
    above = []
    for count in (120, 20):
        raw = np.repeat(np.eye(2), [count, 200 - count], axis=0) + rng.normal(scale=0.05, size=(200, 2))
        score = rng.normal(size=200) + 10 * (raw[:, 0] > raw[:, 1])
        own = Evidence(score, whitened(rng.normal(size=(200, 4)), np.eye(4)))
        pool = Pool.of_cells(np.arange(200), raw, own)
        above.append(pool.above(pool.scores(np.arange(200), raw, own), pool.size)[raw[:, 0] > raw[:, 1]].mean())
    assert above[0] == pytest.approx(above[1], abs=2)


def test_cells_that_are_off_together_are_novel_and_one_that_is_off_alone_is_not() -> None:
    """Single cells are as far off now and then; what kin says alone counts up to twenty times."""
    rng = np.random.default_rng(2)
    alone = NoveltyCalibration.fit(np.r_[rng.normal(size=1940), np.full(60, 6.0)], np.ones(2000))
    means = NoveltyCalibration.fit(rng.normal(scale=0.3, size=2000), np.ones(2000))
    own, above = np.array([4.0, 0.0, 4.0, 7.0]), np.array([2.0, 2.0, 0.0, 0.0])
    told = alone.p_values(own)
    p = KinCalibration((alone, alone, alone, alone, means)).p_values(KinScores(own, own, above, np.full(4, 4)))
    assert told[0] > 0.02
    assert p[0] < 0.01
    assert p[1] == pytest.approx(told[1] / 20)
    assert p[1] > 0.01
    np.testing.assert_array_equal(p[2:], told[2:])
    assert p[3] < 0.01, "what is farther off than all is novel, whatever its kin"


def test_means_are_compared_with_means_of_as_many_cells() -> None:
    """A small batch has small kin, whose means vary more."""
    rng = np.random.default_rng(3)
    counts = (1, 2, 4, 8, 15)
    sizes = tuple(NoveltyCalibration.fit(rng.normal(scale=count**-0.5, size=2000), np.ones(2000)) for count in counts)
    own = np.full(2000, np.quantile(sizes[0].scores_s, 0.7))  # between kin's p-value and twenty times that
    for place, count in enumerate(counts[1:], 1):
        above = rng.normal(scale=count**-0.5, size=2000)
        p = KinCalibration(sizes).p_values(KinScores(own, own, above, np.full(2000, place)))
        assert np.abs(np.mean(p <= 0.1) - 0.1) < 0.03


def test_held_out_cells_have_kin_in_their_batch(reference: Reference) -> None:
    frozen: Frozen = reference.frozen
    held_out = hold_out(frozen, MapConfig())
    rows = held_out.rows
    batch, raw = frozen.batch_n[rows], np.asarray(frozen.raw_na[rows])
    assert held_out.pool >= np.bincount(batch).max(), "all are in the pool, for this to be told"
    corrected = np.concatenate(
        [_corrected(frozen, mine, mine) for mine in np.split(rows, np.flatnonzero(np.diff(batch)) + 1)]
    )
    around = np.asarray(frozen.anchor_na)[held_out.indices[:, :15]].mean(axis=1)
    away = (corrected - around) @ held_out.whitening
    alone = frozen.novelty(raw, corrected, held_out.distances)
    np.testing.assert_allclose(away.T @ away / len(away), np.eye(away.shape[1]), atol=0.3)
    for code in np.unique(batch):
        mine = np.flatnonzero(batch == code)
        for place, size in enumerate((1, 2, 4, 8, 15)):
            whole = expected(np.arange(len(mine)), raw[mine], alone[mine], away[mine], size)
            whole -= np.quantile(alone[mine], 0.25) if place else 0
            np.testing.assert_allclose(held_out.scores[place, mine], whole, rtol=1e-3, atol=1e-3)
