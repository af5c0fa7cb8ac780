"""What kin have in common of what is left over of expression, against dense computations of other libraries."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics.pairwise import cosine_similarity

from schelix_scale import Reference
from schelix_scale.graph.vectors import unit_rows
from schelix_scale.mapping.expression import Shared, in_common, pool_in_common, usual_common
from schelix_scale.mapping.leftover import LeftOver, of_noise
from schelix_scale.mapping.odd_votes import often
from schelix_scale.mapping.profiles import Profiles, Scaling
from schelix_scale.transfer import Labels
from tests.mapping.test_leftover import left_over
from tests.mapping.test_profiles import RNG, sketch


def test_what_kin_have_in_common_is_the_mean_product_of_two_of_them() -> None:
    rng = RNG(6)
    left = rng.normal(size=(30, 7))
    kin = np.array([rng.permutation(np.delete(np.arange(30), cell))[:14] for cell in range(30)])
    found = in_common(left @ left.T * (1 - np.eye(30)), kin, (4, 8, 15))
    for place, size in enumerate((4, 8, 15)):
        for cell in range(30):
            pairs = combinations([cell, *kin[cell, : size - 1]], 2)
            expected = np.mean([(left[a] * left[b]).sum() for a, b in pairs])
            assert found[cell, place] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_neighbours_of_one_batch_tell_nothing() -> None:
    """One batch alone has the second type: what it is off by in it cannot be told from what is new."""
    rng = RNG(12)
    kind, batch = np.repeat([0, 1], [600, 200]), np.r_[np.arange(600) % 4, np.full(200, 3)]
    anchor = np.eye(2)[kind] + rng.normal(size=(800, 2)) * 0.05
    x_ng = 5 + rng.normal(size=(800, 60))
    scaling = Scaling(np.arange(60), np.full(60, np.inf, np.float32), np.ones(60))
    profiles = Profiles.of_sketch(sketch(x_ng, batch), scaling, anchor, 0)
    own = 5 + rng.normal(size=(800, 60)) + rng.normal(size=60) * 2 * (np.arange(800) % 8 < 2)[:, None]
    cells = np.r_[:200, 600:800]
    off, likely = np.arange(800)[cells] % 8 < 2, np.ones(400, bool)
    raw = np.c_[anchor[cells], off * 3.0]
    values = sparse.csr_matrix(own[cells].astype(np.float32))
    found = pool_in_common(
        LeftOver.of_pool(profiles, values, None, unit_rows(anchor[cells]), likely, np.ones(400)), raw
    )[:, -1]
    assert found[off & (kind[cells] == 0)].mean() > 20 * abs(found[off & (kind[cells] == 1)]).mean()


def test_types_with_few_cells_are_not_held_beside_others(reference: Reference) -> None:
    """Of 30 neighbours no more can be of a label than there are cells of it among the profiles."""
    profiles, n = reference.frozen.profiles, reference.frozen.n_cells
    rng = RNG(14)
    code = rng.choice(3, n, p=[0.93, 0.05, 0.02]).astype(np.int32)
    code[:50] = -1
    column = Labels("type", ("a", "b", "c"), code)
    near = np.array([np.flatnonzero(code == 0)[:15], np.flatnonzero(code == 1)[:15], np.arange(15), np.arange(15)])
    near[3, 0] = np.flatnonzero(code == 2)[0]
    far = np.tile(np.linspace(0.1, 0.5, 15), (4, 1))
    known = n / (n - 50)  # what is not labelled is taken for the same mixture
    for batch in (None, 1):
        there = reference.frozen.batch_n != batch if batch is not None else np.ones(n, bool)
        known = there.sum() / (there & (code >= 0)).sum()
        few, fewer = ((there & (code == label)).sum() * known / 30 for label in (1, 2))
        assert fewer < min(few, 1)
        found = often([column], profiles, near, far, batch)
        np.testing.assert_allclose(found, [1, min(few, 1), 1, fewer])
    other = Labels("other", ("x", "y"), np.zeros(n, np.int32))
    none = Labels("none", ("x", "y"), np.full(n, -1, np.int32))
    np.testing.assert_array_equal(
        often([other, column, none], profiles, near, far), often([column], profiles, near, far)
    )
    np.testing.assert_array_equal(often([], profiles, near, far), np.ones(4))


def test_usual_is_the_mean_of_medians_of_batches() -> None:
    parts = [np.array([[1.0, -4.0], [-3.0, 2.0], [2.0, 6.0]]), np.array([[4.0], [6.0]]), np.zeros((9, 0))]
    np.testing.assert_allclose(usual_common([parts[:1], parts[1:2], parts[2:]]), [3.5, 4.0, 4.0, 4.0])
    np.testing.assert_allclose(usual_common([parts, parts[1:]]), [4.0, 4.0, 4.0, 4.0]), "of all pools of a batch"
    for nothing in (np.zeros((9, 0)), np.zeros((9, 3))):
        assert (Shared(usual_common([[nothing]])).of_pool(np.array([[1.0, 5.0]]), np.ones(1)) == 0).all(), (
            "that tells nothing"
        )
    shared = Shared(np.array([3.5, 4.0, 4.0]))
    often = np.array([1, 0.5, 0.2])
    expected = 2 * np.log1p(np.array([[0, 0.5, 1.5], [0, 0.125, 0.06]]))
    np.testing.assert_allclose(shared.of_pool(parts[0], often), expected, atol=2e-4)
    np.testing.assert_allclose(shared.of_pool(parts[1], often[:2])[0], 2 * np.log1p(np.array([4, 6]) / 3.5), atol=2e-4)
    assert (shared.of_pool(parts[2], np.ones(9)) == 0).all()


@pytest.mark.parametrize(
    ("cells", "columns"), [(27, 0), (28, 1), (55, 1), (56, 2), (104, 2), (105, 3), (999, 3), (1_000, 4)]
)
def test_kin_are_one_in_seven_of_a_pool(cells: int, columns: int) -> None:
    rng = RNG(9)
    scaling = Scaling(np.arange(6), np.full(6, np.inf, np.float32), np.ones(6))
    anchor, x_ng = rng.normal(size=(200, 4)), rng.poisson(1.0, (200, 6)) * 1.0
    profiles = Profiles.of_sketch(sketch(x_ng, np.arange(200) % 2), scaling, anchor, 0)
    new, own = rng.normal(size=(cells, 4)), sparse.csr_matrix(rng.poisson(1.0, (cells, 6)).astype(np.float32))
    likely = np.arange(cells) % 2 == 0
    found = pool_in_common(LeftOver.of_pool(profiles, own, None, unit_rows(new), likely, np.full(cells, 0.5)), new)
    assert found.shape == (cells, columns)
    if columns:
        around = profiles.around(unit_rows(new))
        left = left_over(own.toarray(), around.mean_mh, None, likely) * profiles.weight_h
        products = left @ left.T - of_noise(left, around.mean_mh, None, likely)
        mixed = profiles.mixed(around)
        products *= 0.25 * mixed[:, None] * mixed * (1 - np.eye(cells))
        kin = np.argsort(-cosine_similarity(new) + 9 * np.eye(cells), axis=1)[:, :29]
        np.testing.assert_allclose(found, in_common(products, kin, (4, 8, 15, 30)[:columns]), rtol=1e-4, atol=1e-4)


def test_copies_of_a_cell_share_their_noise_and_nothing_else() -> None:
    rng = RNG(15)
    scaling = Scaling(np.arange(300), np.full(300, np.inf, np.float32), np.ones(300))
    anchor = rng.normal(size=(400, 4))
    known = Profiles.of_sketch(sketch(5 + rng.normal(size=(400, 300)), np.arange(400) % 3), scaling, anchor, 0)
    cell = np.r_[np.zeros(20, int), np.arange(1, 181)]
    new, own = rng.normal(size=(181, 4))[cell], (5 + rng.normal(size=(181, 300)))[cell]
    likely, every = np.arange(200) >= 20, np.ones(200)
    values = sparse.csr_matrix(own.astype(np.float32))
    found = pool_in_common(LeftOver.of_pool(known, values, None, unit_rows(new), likely, every), new)[:, -1]
    np.testing.assert_array_equal(found[:20], 0)
    assert np.abs(found[20:]).max() > 1
