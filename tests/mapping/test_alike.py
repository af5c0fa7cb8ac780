"""What cells have in common with those most alike in what is left over, against loops in plain NumPy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import sparse

from schelix_scale.graph.vectors import unit_rows
from schelix_scale.mapping.alike import Alike, UsuallyAlike
from schelix_scale.mapping.leftover import LeftOver
from schelix_scale.mapping.profiles import Profiles, Scaling
from tests.mapping.test_profiles import RNG, sketch

GENES = 60


def pool(own: np.ndarray, seed: int = 0, likely: np.ndarray | None = None, unit: np.ndarray | None = None) -> LeftOver:
    """What is left over of cells whose neighbours are random ones: nothing but what is not noise is alike."""
    rng = RNG(seed)
    scaling = Scaling(np.arange(GENES), np.full(GENES, np.inf, np.float32), np.ones(GENES))
    anchor, batch = rng.normal(size=(400, 5)), rng.integers(3, size=400)
    profiles = Profiles.of_sketch(sketch(5 + rng.normal(size=(400, GENES)), batch), scaling, anchor, 0)
    unit = unit_rows(RNG(len(own)).normal(size=(len(own), 5))) if unit is None else unit
    likely = np.ones(len(own), bool) if likely is None else likely
    held = rng.uniform(0.3, 1.0, len(own))
    return LeftOver.of_pool(profiles, sparse.csr_matrix(own.astype(np.float32)), None, unit, likely, held)


def by_loops(left: LeftOver, most: int, others: LeftOver | None = None) -> np.ndarray:
    """The mean product of all pairs of a cell and those with which its product is highest, as far as it counts.

    Without the two that add most of the eight genes in which the cell is furthest off.
    """
    of = left if others is None else others
    values = np.clip(left.left_ph, -8, 8)
    out = []
    for cell in range(len(of.left_ph)):
        mine, count = np.clip(of.left_ph[cell], -8, 8), of.counts_p[cell]
        product = np.array([mine @ value for value in values])
        if others is None:
            product[cell] = -np.inf
        near = np.argsort(-product)[:most]
        furthest = np.argsort(-np.abs(mine))[:8]
        with_cell = np.mean([mine * values[a] for a in near], axis=0)
        among = np.mean([values[a] * values[b] for a, b in combinations(near, 2)], axis=0)
        own, pairs = (part.sum() - np.maximum(np.sort(part[furthest])[-2:], 0).sum() for part in (with_cell, among))
        out.append(count * (most * own + (most * (most - 1) / 2) * min(pairs, own)))
    return np.array(out) / (most * (most + 1) / 2)


@pytest.mark.parametrize(("cells", "most"), [(28, 3), (63, 8), (150, 12)])
def test_against_loops(cells: int, most: int) -> None:
    rng = RNG(1)
    own = 5 + rng.normal(size=(cells, GENES))
    own[:6, :10] += 4.0
    own[3, 5] += 90.0  # cut at eight standard deviations
    likely = np.arange(cells) >= 6
    left = pool(own, likely=likely)
    among, found = Alike.of_pool(left)
    assert among is not None
    expected = by_loops(left, most)
    usual = np.median(np.abs((expected / left.counts_p)[likely]))
    np.testing.assert_allclose(found, expected / usual, rtol=1e-4)
    new = pool(5 + rng.normal(size=(40, GENES)), seed=0)
    new.counts_p[:3] = 0.0
    others = among.of_others(new.left_ph, new.counts_p, new.unit_pa)
    assert (others[:3] == 0).all(), "neighbours of one batch"
    np.testing.assert_allclose(others * among.usual, by_loops(left, most, new), rtol=1e-4)
    np.testing.assert_allclose(
        among.of_others(new.left_ph[7:9], new.counts_p[7:9], new.unit_pa[7:9]), others[7:9], rtol=1e-12
    )


def test_cells_with_genes_of_their_own_are_alike_wherever_they_lie() -> None:
    """Scattered among all others, and of another batch's cells that are read later, too."""
    rng = RNG(2)
    own, mine = 5 + rng.normal(size=(300, GENES)), np.arange(0, 300, 25)
    own[np.ix_(mine, np.arange(5))] += 5.0
    among, found = Alike.of_pool(pool(own))
    assert among is not None
    assert found[mine].min() > 1.2 * np.delete(found, mine).max()
    later, more = 5 + rng.normal(size=(50, GENES)), np.arange(4)
    later[np.ix_(more, np.arange(5))] += 5.0
    new = pool(later)
    others = among.of_others(new.left_ph, new.counts_p, new.unit_pa)
    assert others[more].min() > 1.2 * np.delete(others, more).max()


def test_copies_of_a_cell_are_not_alike() -> None:
    """They share their noise: a batch with each cell twice looks as one with each cell once."""
    rng = RNG(3)
    own, unit = 5 + rng.normal(size=(80, GENES)), unit_rows(rng.normal(size=(80, 5)))
    own[:2], unit[:2] = own[0], unit[0]
    left = pool(own, unit=unit)
    among, found = Alike.of_pool(left)
    assert among is not None
    values = np.clip(left.left_ph, -4, 4)
    assert values[0] @ values[1] > 3 * np.sort(values[2:] @ values[0])[-1]
    assert found[:2].max() < np.quantile(found, 0.99)
    again = among.of_others(left.left_ph, left.counts_p, left.unit_pa)
    np.testing.assert_allclose(again, found, rtol=1e-5)


def test_pools_that_are_too_small_or_have_nothing_in_common_say_nothing() -> None:
    for own in (5 + RNG(4).normal(size=(27, GENES)), np.full((40, GENES), 5.0)):
        left = pool(own)
        if len(own) == 40:
            left.left_ph[:] = 0.0
        among, found = Alike.of_pool(left)
        assert among is None
        np.testing.assert_array_equal(found, np.zeros(len(own)))


def test_what_is_usual_is_the_median_over_batches() -> None:
    """One batch of which much looks new (it alone has many types) does not decide what is usual."""
    parts = [np.linspace(0, 1, 101), np.linspace(0, 2, 101), np.linspace(0, 300, 101)]
    usually = UsuallyAlike.fit(parts)
    assert usually.knee == pytest.approx(1.8)
    assert usually.high == pytest.approx(1.98)
    often = np.array([1.0, 1.0, 0.5, 0.5])
    found = usually.adds(np.array([1.0, 3.6, 3.6, 9.0]), often)
    np.testing.assert_allclose(found, 5 * np.log([[1, 2, 2, 5], [1, 2, 1, 1.25]]), atol=2e-4)
    assert np.isnan(usually.adds(np.array([np.nan]), np.ones(1))).all(), "what is not known stays so"
    for nothing in ([], [np.zeros(50)]):
        assert (UsuallyAlike.fit(nothing).adds(np.array([0.0, 99.0]), np.ones(2)) == 0).all()


@pytest.mark.parametrize(("high", "again"), [(29, False), (30, True)])
def test_a_batch_is_looked_at_again_where_three_times_as_many_are_high(high: int, again: bool) -> None:
    usually = UsuallyAlike(1.5, 2.0)
    assert usually.looks_again(np.where(np.arange(1000) < high, 2.1, 2.0)) == again
    assert not usually.looks_again(np.zeros(0))
    assert [usually.looks_again(np.where(np.arange(60) < many, 2.1, 2.0)) for many in (4, 5)] == [False, True]
