"""What is left over of expression when neighbours and batch are taken off, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import Ridge

from schelix_scale.graph.vectors import unit_rows
from schelix_scale.mapping.leftover import Baseline, LeftOver, of_noise
from schelix_scale.mapping.profiles import Profiles, Scaling
from tests.mapping.test_profiles import RNG, sketch


def left_over(own: np.ndarray, around: np.ndarray, known: np.ndarray | None, likely: np.ndarray) -> np.ndarray:
    """What is left over of the cells that the baseline is fitted to."""
    return Baseline.fit(own, around, known, likely)(own, around, known)


def test_what_is_left_over_against_ridge_regression() -> None:
    """Each gene: above the neighbours', less the batch's mean, less the slope that scikit-learn finds."""
    rng = RNG(3)
    around = rng.gamma(2.0, size=(60, 12))
    own = 0.3 + 1.4 * around + rng.normal(size=(60, 12))
    likely = np.arange(60) % 2 == 0
    found = left_over(own, around, None, likely)
    spread = around - around.mean(axis=0)
    for gene in range(12):
        left = (own - around)[:, gene]
        left = left - left[likely].mean()
        ridge = Ridge(alpha=10 * (spread**2).mean(), fit_intercept=False).fit(spread[:, [gene]], left)
        left = left - ridge.predict(spread[:, [gene]])
        np.testing.assert_allclose(found[:, gene], left - left[likely].mean(), atol=1e-6)


def test_what_a_batch_is_off_by_is_not_left_over() -> None:
    """A batch that measures genes twice as well, or adds to all of them, says nothing; a type of its own does."""
    rng = RNG(4)
    kind = np.repeat(np.arange(4), 100)
    around = rng.gamma(2.0, size=(4, 50))[kind]
    own = around * rng.uniform(0.5, 2.0, 50) + rng.normal(size=50)
    likely = np.ones(400, bool)
    calm = np.abs(left_over(own, around, None, likely)).mean()
    assert calm < 0.05
    own[kind == 3] += rng.normal(size=50)
    left = np.abs(left_over(own, around, None, kind < 3)).mean(axis=1)
    assert left[kind == 3].mean() > 5 * left[kind < 3].mean()


def test_genes_that_are_not_known_leave_nothing() -> None:
    rng = RNG(5)
    own, around, known = rng.gamma(2.0, size=(40, 8)), rng.gamma(2.0, size=(40, 8)), np.ones((40, 8), bool)
    likely = np.arange(40) < 25
    known[:, [1, 5]] = False
    found, without = (
        left_over(own, around, known, likely),
        left_over(own[:, known[0]], around[:, known[0]], None, likely),
    )
    assert (found[:, [1, 5]] == 0).all()
    all_genes = np.sqrt(8 / 6)  # what is left of those that are known stands for all
    np.testing.assert_allclose(found[:, known[0]], without * all_genes, rtol=1e-5)
    none = left_over(own, around, np.zeros((40, 8), bool), likely)
    assert (none == 0).all()
    some = np.ones((40, 8), bool)
    some[:10, 3] = False
    left = left_over(own, around, some, likely)
    assert (left[:10, 3] == 0).all()
    assert left[10:25, 3].mean() == pytest.approx(0, abs=1e-6), "the mean of those in which it is known"


@pytest.mark.parametrize("cells", [28, 105, 600])
def test_noise_has_nothing_in_common(cells: int) -> None:
    """Nor has it where means and slopes were fitted to few cells; what some of them share is seen beside it."""
    rng, h = RNG(7), 2_000
    kind = np.arange(cells) % 4
    around = rng.gamma(2.0, size=(4, h))[kind] + rng.normal(size=(cells, h)) * 0.1
    likely = np.arange(cells) < cells // 2
    same = kind[:, None] == kind
    found = {name: [] for name in ("likely", "not", "likely, same", "not, same")}
    for _ in range(20):
        left = left_over(around + rng.normal(size=(cells, h)), around, None, likely)
        products = left @ left.T - of_noise(left, around, None, likely)
        np.fill_diagonal(products, np.nan)
        for name, half in (("likely", likely), ("not", ~likely)):
            pairs = half[:, None] & half
            found[name].append(np.nanmean(products[pairs & ~same]))
            found[f"{name}, same"].append(np.nanmean(products[pairs & same]))
    of_mean = h / (cells // 2)
    for name, values in found.items():
        assert abs(np.mean(values)) < 0.2 * of_mean + 2, name


def test_other_cells_of_the_batch_are_as_those_of_the_pool() -> None:
    """The same cells have the same left over, whether they are the pool or come later; others do not change it."""
    rng = RNG(21)
    scaling = Scaling(np.arange(30), np.full(30, np.inf, np.float32), np.ones(30))
    anchor, batch = rng.normal(size=(300, 4)), np.arange(300) % 3
    profiles = Profiles.of_sketch(sketch(5 + rng.normal(size=(300, 30)), batch), scaling, anchor, 0)
    unit = unit_rows(rng.normal(size=(90, 4)))
    own = sparse.csr_matrix((5 + rng.normal(size=(90, 30))).astype(np.float32))
    held, likely, known = rng.uniform(size=90), np.arange(90) % 2 == 0, rng.uniform(size=(90, 30)) < 0.8
    for measured in (None, known):
        for out in (None, 1):
            pool = LeftOver.of_pool(profiles, own, measured, unit, likely, held, out)
            for cells in (np.arange(90), np.array([7, 3, 80])):
                mine = None if measured is None else measured[cells]
                left, counts = pool.told.left_over(own[cells], mine, unit[cells], held[cells])
                np.testing.assert_allclose(left, pool.left_ph[cells], atol=1e-5)
                np.testing.assert_allclose(counts, pool.counts_p[cells])
    assert np.abs(pool.left_ph[known].mean()) > 1e-4
    assert (pool.left_ph[~known] == 0).all()
