"""Whether other batches have cells in which the same is left over, against loops in plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from schelix_scale.mapping.alike import Alike
from schelix_scale.mapping.strange import Strange, cut
from tests.mapping.test_alike import GENES, pool
from tests.mapping.test_profiles import RNG


def by_loops(values: np.ndarray, strange: np.ndarray, most: int) -> np.ndarray:
    """The mean product with those most alike, without the two that add most of the eight furthest genes."""
    out = []
    for mine in values:
        near = np.argsort(-(strange @ mine))[:most]
        by_gene = (mine * strange[near]).mean(axis=0)
        furthest = by_gene[np.argsort(-np.abs(mine))[:8]]
        out.append(by_gene.sum() - np.maximum(np.sort(furthest)[-2:], 0).sum())
    return np.array(out)


@pytest.mark.parametrize("most", [1, 12, 500])
def test_against_loops(most: int) -> None:
    rng = RNG(0)
    left, values = cut(3 * rng.normal(size=(100, GENES))), cut(6 * rng.normal(size=(30, GENES)))
    assert np.abs(values).max() == 8
    strange, likely = Strange(left, np.repeat([0, 1], 50)), np.arange(30) > 4
    expected = by_loops(values, left, most)
    np.testing.assert_allclose(strange.alike(values, most), expected, rtol=1e-5, atol=1e-4)
    usual = strange.usual(values, likely, most)
    assert usual == pytest.approx(np.median(np.abs(expected[likely])), rel=1e-5)
    more = strange.more(values, most, usual)
    np.testing.assert_allclose(more, np.maximum(expected / usual - 1, 0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        strange.without(0).alike(values, most), by_loops(values, left[50:], most), rtol=1e-5, atol=1e-4
    )


def test_a_tenth_of_each_pool_is_strange() -> None:
    rng = RNG(1)
    pools = [(batch, rng.normal(size=(cells, 7)), rng.normal(size=cells)) for batch, cells in ((4, 95), (2, 61))]
    strange = Strange.of_batches(pools)
    expected = [
        left[np.sort(np.argsort(-common)[:most])] for (_, left, common), most in zip(pools, (10, 7), strict=True)
    ]
    np.testing.assert_array_equal(strange.left_sh, np.vstack(expected).astype(np.float32))
    assert strange.batch_s.tolist() == [4] * 10 + [2] * 7


def test_without_strange_cells_nothing_is_taken_off() -> None:
    rng = RNG(2)
    values, likely, nothing = cut(rng.normal(size=(40, GENES))), np.ones(40, bool), Strange.of_batches([])
    usual = nothing.usual(values, likely, 12)
    assert (usual, nothing.more(values, 12, usual).any()) == (0.0, False)


def test_a_known_type_that_lies_scattered_is_told_from_a_new_one() -> None:
    """Both have genes of their own; another batch has cells of one of the two."""
    rng = RNG(3)
    own, known, new = 5 + rng.normal(size=(300, GENES)), np.arange(0, 300, 25), np.arange(5, 300, 25)
    own[np.ix_(known, np.arange(8))] += 4.0
    own[np.ix_(new, np.arange(10, 18))] += 4.0
    other = 5 + rng.normal(size=(200, GENES))
    other[:12, :8] += 4.0
    elsewhere = pool(other)
    strange = Strange.of_batches([(0, cut(elsewhere.left_ph), Alike.of_pool(elsewhere)[1])])
    left = pool(own)
    alone, (among, found) = Alike.of_pool(left)[1], Alike.of_pool(left, strange)
    high = np.quantile(np.delete(alone, [*known, *new]), 0.99)
    assert min(alone[known].min(), alone[new].min()) > high, "by the batch alone they are as far off"
    assert np.median(found[known]) < 0.5 < high < np.median(found[new])
    assert np.median(found[new] / alone[new]) > 0.9
    assert among is not None
    above = Alike.of_pool(left, strange, 3.0)[1]
    np.testing.assert_allclose(above, np.where(alone > 3, found, alone), rtol=1e-5)  # those below add nothing
    later = 5 + rng.normal(size=(40, GENES))
    later[:4, :8] += 4.0
    later[4:8, 10:18] += 4.0
    others = pool(later)
    again = among.of_others(others.left_ph, others.counts_p, others.unit_pa)
    assert np.median(again[:4]) < 0.5 < high < np.median(again[4:8])


def test_two_genes_are_no_type() -> None:
    """However far off some cells are in them."""
    rng = RNG(4)
    own, mine = 5 + rng.normal(size=(300, GENES)), np.arange(0, 300, 25)
    own[np.ix_(mine, [3, 4])] += 30.0
    found = Alike.of_pool(pool(own))[1]
    assert found[mine].max() < np.quantile(found, 0.9)
    own[np.ix_(mine, [5, 6, 7])] += 30.0
    assert Alike.of_pool(pool(own))[1][mine].min() > 1.5 * np.delete(found, mine).max()
