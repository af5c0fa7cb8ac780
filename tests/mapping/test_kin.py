"""Novelty of cells and their kin, against means over cells that are sorted one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from schelix_scale import Reference
from schelix_scale.mapping.evidence import Evidence, mean_around, whitened, whitening
from schelix_scale.mapping.held_out import _corrected, hold_out
from schelix_scale.mapping.kin import KinScores, Pool, Usual, spread_of
from schelix_scale.mapping.reference import Frozen
from schelix_scale.mapping.settings import MapConfig

SIZES = (1, 2, 4, 8, 15, 30)


def raw_scores(
    pool: np.ndarray, raw: np.ndarray, score: np.ndarray, way: np.ndarray, cells: np.ndarray, k: int
) -> np.ndarray:
    """Mean score + log(k |mean way|^2) of cells and the k - 1 others of the pool of highest cosine similarity."""
    way = way - np.median(way[pool][score[pool] <= np.median(score[pool])], axis=0) * (k > 1)
    alike, out = cosine_similarity(raw, raw[pool]), []
    for cell in cells:
        others = [place for place in np.argsort(-alike[cell]) if pool[place] != cell][: k - 1]
        kin = [cell, *pool[others]]
        out.append(np.mean(score[kin]) + np.log(k * np.sum(np.mean(way[kin], axis=0) ** 2)))
    return np.array(out)


def expected(pool: np.ndarray, raw: np.ndarray, score: np.ndarray, way: np.ndarray, k: int) -> np.ndarray:
    """Those of all cells, above the lower quartile of the pool's."""
    parts = (pool, raw, score, way)
    return raw_scores(*parts, np.arange(len(raw)), k) - (np.quantile(raw_scores(*parts, pool, k), 0.25) if k > 1 else 0)


def evidence(score: np.ndarray, way: np.ndarray) -> Evidence:
    """Evidence of cells of which labels say nothing."""
    return Evidence.of_cells(score, np.zeros(len(score)), way)


def made_up(seed: int, n: int) -> tuple[np.ndarray, Evidence]:
    """Components of cells, and what tells how novel they are."""
    rng = np.random.default_rng(seed)
    raw, way = rng.normal(size=(n, 6)).astype(np.float32), rng.normal(size=(n, 4)) + np.array([0, 1, 0, 0])
    return raw, evidence(rng.normal(size=n), whitened(way, np.eye(4)))


@pytest.mark.parametrize(("size", "most"), [(1_000, 6), (999, 5), (105, 5), (104, 4), (55, 3), (20, 2), (19, 1)])
def test_a_cell_and_its_kin(size: int, most: int) -> None:
    n = max(300, size + 30)
    raw, own = made_up(0, n)
    rows = np.sort(np.random.default_rng(0).choice(n, size, replace=False))
    found = Pool.of_cells(rows, raw[rows], own[rows]).scores(np.arange(n), raw, own)
    for scores, k in zip(found[0], SIZES[:most], strict=True):
        np.testing.assert_allclose(scores, expected(rows, raw, own.score_cm[0], own.way_md, k), atol=1e-3)


def test_what_labels_say_is_a_score_of_its_own() -> None:
    """It is added to a cell's score three times; which cells say what the way of a batch is does not depend on it."""
    rng = np.random.default_rng(15)
    (raw, plain), odd, rows = made_up(3, 300), rng.exponential(size=300), np.arange(300)
    own = Evidence.of_cells(plain.score_cm[0], odd, plain.way_md)
    without, found = Pool.of_cells(rows, raw, own).scores(rows, raw, own)
    np.testing.assert_array_equal(without, Pool.of_cells(rows, raw, plain).scores(rows, raw, plain)[0])
    alike = cosine_similarity(raw)
    for place, k in enumerate(SIZES[:5]):
        kin = [[cell, *[i for i in np.argsort(-alike[cell]) if i != cell][: k - 1]] for cell in rows]
        more = np.array([odd[cells].mean() for cells in kin])
        raw_score = raw_scores(rows, raw, plain.score_cm[0], plain.way_md, rows, k) + 3 * more
        np.testing.assert_allclose(found[place], raw_score - (np.quantile(raw_score, 0.25) if k > 1 else 0), atol=1e-3)


def test_no_more_kin_than_is_calibrated() -> None:
    raw, own = made_up(0, 300)
    few, many = (Pool.of_cells(np.arange(300), raw, own, most).scores(np.arange(300), raw, own) for most in (2, 4))
    np.testing.assert_array_equal(few, many[:, :3])


def test_the_order_of_cells_decides_no_digit() -> None:
    rng = np.random.default_rng(4)
    raw, score, way = rng.normal(size=(300, 6)).astype(np.float32), rng.normal(size=300), rng.normal(size=(300, 9))
    turn, rows = rng.normal(size=(9, 9)), np.arange(300)

    def found(order: np.ndarray, block: int) -> np.ndarray:
        white = np.concatenate([whitened(way[order][i : i + block], turn) for i in range(0, 300, block)])
        own = Evidence.of_cells(score[order], np.abs(score[order]), white)
        return Pool.of_cells(rows, raw[order], own).scores(rows, raw[order], own)

    order = rng.permutation(300)
    np.testing.assert_array_equal(found(rows, 300)[..., order], found(order, 7))


def test_kin_is_of_the_own_batch() -> None:
    (raw, own), batch = made_up(1, 400), np.arange(400) % 2
    pools = []
    for code in (0, 1):
        rows = np.flatnonzero(batch == code)
        pools.append(Pool.of_cells(rows, raw[rows], own[rows]))
    part = np.r_[np.arange(30), 399]
    _, found = KinScores.of_cells(pools, batch[part], part, raw[part], own[part])
    for code in (0, 1):
        rows = np.flatnonzero(batch == code)
        here, among = batch[part] == code, np.isin(rows, part)
        parts = np.arange(200), raw[rows], own.score_cm[0, rows], own.way_md[rows]
        np.testing.assert_allclose(found.most[here], expected(*parts, 15)[among], atol=1e-3)
        np.testing.assert_allclose(found.fewer[here], expected(*parts, 4)[among], atol=1e-3)
        np.testing.assert_allclose(found.single[here], expected(*parts, 1)[among], atol=1e-3)
        np.testing.assert_allclose(found.plain[here], raw_scores(*parts, np.arange(200), 15)[among], atol=1e-3)
    assert (found.size == 4).all()


def test_cells_that_were_not_compared_have_what_the_three_most_like_them_have() -> None:
    """What expression adds to a cell's scores is not added to those of its kin, and what is known is taken as it is."""
    (raw, own), rng = made_up(6, 400), np.random.default_rng(17)
    pools = []
    for rows in (np.arange(150), np.arange(200, 350)):
        pools.append(Pool.of_cells(rows, raw[rows], own[rows], alike_cp=rng.exponential(size=(2, 150))))
    part, batch = np.r_[140:160, 340:360], np.repeat([0, 1], 20)
    adds = rng.exponential(size=(2, 40))
    unknown = np.arange(40) % 20 >= 10
    adds[:, unknown] = np.nan
    plain = KinScores.of_cells(pools, batch, part, raw[part], own[part])
    found = KinScores.of_cells(pools, batch, part, raw[part], own[part], alike_cm=adds)
    expected = adds.copy()
    for cell in np.flatnonzero(unknown):
        pool = pools[batch[cell]]
        near = np.argsort(-cosine_similarity(raw[part[cell]][None], raw[pool.rows])[0])[:3]
        expected[:, cell] = pool.alike_cp[:, near].mean(axis=1)
    for c in (0, 1):
        for name in ("single", "plain", "most", "fewer"):
            more = getattr(found[c], name) - getattr(plain[c], name)
            np.testing.assert_allclose(more, expected[c], atol=1e-9)


def test_the_mean_is_that_of_the_nearest() -> None:
    rng = np.random.default_rng(5)
    reference, cells = rng.normal(size=(100, 3)).astype(np.float32), rng.normal(size=(7, 3))
    near = np.argsort(((cells[:, None] - reference) ** 2).sum(axis=2), axis=1)[:, :30]
    found = mean_around(reference, near)
    for cell in range(7):
        np.testing.assert_allclose(found[cell], reference[near[cell, :7]].mean(axis=0), atol=1e-6)


def test_how_many_kin_labels_calibrate_is_no_matter_without_them() -> None:
    raw, plain = made_up(1, 200)
    own = Evidence.of_cells(plain.score_cm[0], np.arange(200) / 100, plain.way_md)
    rows, batch = np.arange(200), np.zeros(200, int)
    whole, small = (Pool.of_cells(rows, raw, own, most) for most in (4, 1))
    both = KinScores.of_cells([whole], batch, rows, raw, own)
    found = KinScores.of_cells([whole], batch, rows, raw, own, (4, 1))
    few = KinScores.of_cells([small], batch, rows, raw, own)
    for one, other in ((found[0], both[0]), (found[1], few[1])):
        for name in ("single", "plain", "most", "fewer", "size"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (found[0].size[0], found[1].size[0]) == (4, 1)


def test_ways_are_in_standard_deviations_within_batches() -> None:
    rng = np.random.default_rng(6)
    batch = np.repeat(np.arange(4), 5_000)
    within = rng.normal(size=(20_000, 3)) @ np.array([[2.0, 0, 0], [1.0, 0.5, 0], [0, 0, 1.0]])
    found = whitening(within + rng.normal(size=(4, 3))[batch] * 9, batch)
    np.testing.assert_allclose(found @ found.T, np.linalg.inv(np.cov(within.T)), rtol=0.1, atol=0.05)


def test_directions_of_few_batches_are_not_those_of_the_next() -> None:
    """What types do in a batch, and in no other, makes no direction count less."""
    rng = np.random.default_rng(7)
    batch, types = np.repeat([0, 1], 400), rng.integers(0, 8, 800)
    shifts = rng.normal(size=(2, 8, 30))
    found = whitening(rng.normal(size=(800, 30)) + shifts[batch, types], batch)
    assert np.abs(found - np.diag(np.diag(found))).max() < 1e-12
    one = whitening(rng.normal(size=(50, 30)), np.zeros(50, int))
    assert np.abs(one - np.diag(np.diag(one))).max() < 1e-12


def test_a_common_way_tells_more_than_how_far_cells_are() -> None:
    """All cells are as far away, but those of one type into one direction."""
    rng = np.random.default_rng(7)
    raw = np.repeat(np.eye(4), 100, axis=0) + rng.normal(scale=0.05, size=(400, 4))
    way = rng.normal(size=(400, 20))
    way[:100] = rng.normal(scale=0.3, size=(100, 20)) + np.eye(20)[0] * 4
    way *= np.sqrt(20) / np.linalg.norm(way, axis=1, keepdims=True)
    own = evidence(rng.normal(size=400), whitened(way, np.eye(20)))
    found = Pool.of_cells(np.arange(400), raw, own).scores(np.arange(400), raw, own)[0]
    assert found[4, :100].min() > found[4, 100:].max()
    assert np.median(found[0, :100]) < np.quantile(found[0, 100:], 0.8), "single cells do not tell it"


@pytest.mark.parametrize("count", [20, 120])
def test_a_type_of_any_size_stands_out_and_a_batch_as_a_whole_does_not(count: int) -> None:
    """The way of the batch, and what its cells usually score, are taken from those that look least novel."""
    rng = np.random.default_rng(8)
    raw = np.repeat(np.eye(2), [count, 200 - count], axis=0) + rng.normal(scale=0.05, size=(200, 2))
    score, way = rng.normal(size=200), rng.normal(size=(200, 4))
    score[:count] += 10
    way[:count] += 5

    def found(offset: float) -> np.ndarray:
        own = evidence(score + offset, whitened(way + offset, np.eye(4)))
        return Pool.of_cells(np.arange(200), raw, own).scores(np.arange(200), raw, own)[0, 4]

    plain = found(0)
    assert plain[:count].mean() - plain[count:].mean() > 10
    assert plain[:count].mean() > 9
    np.testing.assert_allclose(found(7), plain, atol=1e-3)


def test_a_batch_in_few_clusters_tells_nothing_of_a_batch() -> None:
    """A batch of one type is as far off as it is: neither its way nor its scores are what is usual."""
    rng = np.random.default_rng(11)
    raw, rows = rng.normal(size=(200, 6)), np.arange(200)
    own = evidence(rng.normal(size=200), whitened(rng.normal(size=(200, 4)) + 8, np.eye(4)))
    usual = Usual(20.0, np.stack([np.arange(5.0), np.zeros(5)]))
    none, half, whole, alone = (
        Pool.of_cells(rows, raw, own, usual=usual, spread=spread).scores(rows, raw, own)[0]
        for spread in (5.0, 7.5, 10.0, np.inf)
    )
    np.testing.assert_array_equal(whole, alone)
    np.testing.assert_array_equal(whole[0], none[0])
    kin = [np.argsort(-cosine_similarity(raw)[cell])[:15] for cell in rows]
    mean = [own.score_cm[0, near].mean() + np.log(15 * (own.way_md[near].mean(axis=0) ** 2).sum()) for near in kin]
    np.testing.assert_allclose(none[4], np.array(mean) - 4.0, atol=1e-3)
    assert np.quantile(whole[4], 0.25) == pytest.approx(0, abs=0.05)
    assert np.median(whole[4]) < np.median(half[4]) < np.median(none[4])


def test_expression_counts_for_a_cell_as_for_those_most_like_it() -> None:
    raw, own = made_up(21, 300)
    both = np.random.default_rng(22).exponential(size=(2, 300))
    left = both[0]
    rows = np.arange(300)
    near = np.argsort(-cosine_similarity(raw) + 9 * np.eye(300), axis=1)[:, :15]
    scores = own.score_cm[0] + left[near[:, :3]].mean(axis=1)
    way = own.way_md - np.median(own.way_md[own.score_cm[0] <= np.median(own.score_cm[0])], axis=0)
    found = Pool.of_cells(rows, raw, own, left_cp=both).scores(rows, raw, own)
    np.testing.assert_allclose(found[0, 0], scores + np.log((own.way_md**2).sum(axis=1)), atol=1e-3)
    of_kin = own.score_cm[0] + left
    theirs = np.array([scores[cell] + of_kin[near[cell, :7]].sum() for cell in rows]) / 8
    length = np.array([np.log(8 * (way[[cell, *near[cell, :7]]].mean(axis=0) ** 2).sum()) for cell in rows])
    np.testing.assert_allclose(found[0, 3], theirs + length - np.quantile(theirs + length, 0.25), atol=1e-3)
    other = Pool.of_cells(rows, raw, own, left_cp=both[::-1]).scores(rows, raw, own)
    np.testing.assert_array_equal(found[1], other[0], "labels say nothing else here")


def test_clusters_are_counted() -> None:
    assert spread_of(np.eye(7)[np.arange(700) % 7]) == pytest.approx(7, rel=0.01)
    assert spread_of(np.tile([0.5, 0.5, 0], (9, 1))) == pytest.approx(2)
    assert spread_of(np.eye(3)[[0]]) == 1
    rng = np.random.default_rng(12)
    small = np.mean([1 / spread_of(np.eye(20)[rng.integers(0, 20, 40)]) for _ in range(200)])
    assert 1 / small == pytest.approx(20, rel=0.1), "as many as of a large batch"


def test_tiny_batches_do_not_decide_the_covariance() -> None:
    """The way of a batch of one cell from its own is none: that is no likelihood."""
    rng = np.random.default_rng(14)
    found = whitening(rng.normal(size=(270, 30)), np.r_[np.repeat(np.arange(4), 60), np.arange(4, 34)])
    assert np.abs(found - np.diag(np.diag(found))).max() < 1e-12


def test_held_out_cells_have_kin_in_their_batch(reference: Reference) -> None:
    frozen: Frozen = reference.frozen
    held_out = hold_out(frozen, MapConfig())
    pools, rows = held_out.pools[0], held_out.rows
    pools = replace(pools, common_of=[common[:, :0] for common in pools.common_of], alike=pools.alike * 0)
    nothing = np.zeros(len(rows))
    scores, _ = pools.with_kin(held_out.raw, held_out.evidence(nothing), nothing)
    batch, raw = frozen.batch_n[rows], np.asarray(frozen.raw_na[rows])
    assert len(pools.kin_of) == 3, "all of a batch are in one pool, for this to be told"
    of_batch = [rows[batch == code] for code in np.unique(batch)]
    corrected = np.concatenate([_corrected(frozen, mine, mine) for mine in of_batch])
    ways = corrected - np.asarray(frozen.anchor_na)[held_out.indices[:, :7]].mean(axis=1)
    np.testing.assert_allclose(held_out.whitening, whitening(ways.astype(np.float64), batch), rtol=0.05, atol=0.02)
    for code in np.unique(batch):
        mine = np.flatnonzero(batch == code)
        width = frozen.widths(held_out.indices[mine, :7], int(code))
        around = corrected[mine] - ways[mine]
        alone = frozen.novelty(raw[mine], corrected[mine], around, held_out.distances[mine], width)
        parts = np.arange(len(mine)), raw[mine], alone, ways[mine] @ held_out.whitening
        for place, k in enumerate(SIZES[:5]):  # 160 cells are too few for more kin
            np.testing.assert_allclose(scores[0, place, mine], expected(*parts, k), rtol=2e-3, atol=5e-3)
