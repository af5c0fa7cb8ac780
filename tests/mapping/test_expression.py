"""What is left over of expression, and what kin have in common of it, against dense computations of other libraries."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from schelix_scale import Reference, integrate, map_cells
from schelix_scale.genes.sketch import Sketch
from schelix_scale.graph.vectors import unit_rows
from schelix_scale.mapping import calibration, encode, profiles
from schelix_scale.mapping.drawn import Drawing, Drawn
from schelix_scale.mapping.expression import (
    Shared,
    in_common,
    left_over,
    pool_in_common,
    usual_common,
)
from schelix_scale.mapping.held_out import hold_out
from schelix_scale.mapping.odd_votes import often
from schelix_scale.mapping.profiles import Around, Profiles, Scaling
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.progress import QuietReporter
from schelix_scale.stores.base import Measured
from schelix_scale.stores.values import ValueDecision
from schelix_scale.transfer import Labels
from tests.mapping.conftest import NOVEL, SETTINGS, Atlas
from tests.synthetic import dense_log_normalize

RNG = np.random.default_rng


def sketch(x_ng: np.ndarray, batch_n: np.ndarray, measured: Measured | None = None) -> Sketch:
    values = ValueDecision("counts", "made up")
    return Sketch(np.arange(len(x_ng)), batch_n, sparse.csr_matrix(x_ng.astype(np.float32)), values, measured)


def test_expression_is_scaled_as_the_reference_scales_it(reference: Reference, atlas: Atlas) -> None:
    frozen = reference.frozen
    log = dense_log_normalize(atlas.reference.X.toarray())
    genes = np.flatnonzero(frozen.genes["role"] != "unused")
    x_ng = log[:, genes]
    capped = np.minimum(x_ng, x_ng.mean(axis=0) + 10 * x_ng.std(axis=0))
    np.testing.assert_array_equal(frozen.scaling.genes, genes)
    expected = capped / x_ng.std(axis=0) ** frozen.config.features.scale_power
    np.testing.assert_allclose(frozen.profiles.x_ph.toarray(), expected, rtol=2e-3, atol=1e-4)
    np.testing.assert_array_equal(frozen.profiles.batch_p, frozen.batch_n)


@pytest.mark.parametrize("batch", [None, 1])
def test_around_is_the_mean_of_neighbours(batch: int | None) -> None:
    rng = RNG(0)
    x_ng, anchor, batch_n = rng.poisson(1.0, (400, 9)) * 1.0, rng.normal(size=(400, 5)), np.arange(400) % 3
    scaling = Scaling(np.arange(9), np.full(9, np.inf, np.float32), np.ones(9))
    profiles = Profiles.of_sketch(sketch(x_ng, batch_n), scaling, anchor, 0)
    new = rng.normal(size=(20, 5))
    found = profiles.around(unit_rows(new), batch)
    there = np.flatnonzero(batch_n != batch) if batch is not None else np.arange(400)
    near = NearestNeighbors(n_neighbors=30, metric="cosine").fit(anchor[there]).kneighbors(new)[1]
    np.testing.assert_allclose(found.mean_mh, x_ng[there[near]].mean(axis=1), rtol=1e-5)
    assert found.known_mh is None
    np.testing.assert_array_equal(found.count_mb.T, [(batch_n[there[near]] == code).sum(axis=1) for code in range(3)])


def test_genes_that_were_not_measured_have_no_part_in_the_mean() -> None:
    rng = RNG(1)
    anchor, batch_n, group_n = rng.normal(size=(90, 3)), np.zeros(90, int), np.arange(90) % 2
    there_pg = np.array([[True, True, False, False], [True, False, True, False]])
    x_ng = rng.uniform(1, 2, (90, 4)) * there_pg[group_n]
    measured = Measured(group_n.astype(np.int32), ("a", "b"), there_pg)
    scaling = Scaling(np.arange(4), np.full(4, np.inf, np.float32), np.ones(4))
    profiles = Profiles.of_sketch(sketch(x_ng, batch_n, measured), scaling, anchor, 0)
    found = profiles.around(unit_rows(anchor[:5]))
    near = NearestNeighbors(n_neighbors=30, metric="cosine").fit(anchor).kneighbors(anchor[:5])[1]
    values = np.where(there_pg[group_n], x_ng, np.nan)[near]
    np.testing.assert_allclose(found.mean_mh[:, :3], np.nanmean(values[:, :, :3], axis=1), rtol=1e-5)
    assert found.known_mh is not None
    np.testing.assert_array_equal(found.known_mh, np.tile([True, True, True, False], (5, 1)))


def test_of_many_cells_some_are_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "CELLS", 50)
    rng = RNG(2)
    x_ng, anchor, batch_n = rng.poisson(1.0, (400, 3)) * 1.0, rng.normal(size=(400, 5)), np.arange(400) % 3
    scaling = Scaling(np.array([0, 2]), np.array([2.0, 1.0], np.float32), np.array([1.0, 4.0]))
    one, again, other = (Profiles.of_sketch(sketch(x_ng, batch_n), scaling, anchor, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.unit_pa, again.unit_pa)
    assert not np.array_equal(one.unit_pa, other.unit_pa)
    place = cosine_similarity(one.unit_pa, anchor).argmax(axis=1)
    assert len(np.unique(place)) == 50
    expected = np.minimum(x_ng[place][:, [0, 2]], [2, 1]) / [1, 4]
    np.testing.assert_allclose(one.x_ph.toarray(), expected, rtol=1e-6)
    np.testing.assert_array_equal(one.batch_p, batch_n[place])


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


def test_what_kin_have_in_common_is_the_mean_product_of_two_of_them() -> None:
    rng = RNG(6)
    left = rng.normal(size=(30, 7))
    kin = np.array([rng.permutation(np.delete(np.arange(30), cell))[:14] for cell in range(30)])
    found = in_common(left, kin, (4, 8, 15))
    for place, size in enumerate((4, 8, 15)):
        for cell in range(30):
            pairs = combinations([cell, *kin[cell, : size - 1]], 2)
            expected = np.mean([(left[a] * left[b]).sum() for a, b in pairs])
            assert found[cell, place] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_noise_has_nothing_in_common() -> None:
    rng = RNG(7)
    left = rng.normal(size=(500, 400)) * 3
    left[:50] += 0.5  # a sixth of what is noise in single cells
    kin = np.array([np.delete(np.arange(50), cell)[:14] if cell < 50 else np.arange(51, 65) for cell in range(500)])
    kin[50:] = (kin[50:] + np.arange(450)[:, None]) % 450 + 50
    found = in_common(left, kin, (15,))[:, 0]
    assert found[50:].mean() == pytest.approx(0, abs=15)
    assert found[:50].mean() == pytest.approx(400 * 0.25, rel=0.3)
    assert found[:50].min() > np.quantile(found[50:], 0.98)


def test_weights_are_of_what_varies_between_neighbours() -> None:
    """Types differ in the first genes, which do not vary within them; noise is in the others."""
    rng = RNG(8)
    kind = np.repeat(np.arange(2), 600)
    anchor = np.eye(2)[kind] + rng.normal(size=(1200, 2)) * 0.01
    spread = np.array([0.5, 1.0, 2.0])
    x_ng = np.c_[kind * 5.0, 9 + rng.normal(size=(1200, 3)) * spread]
    scaling = Scaling(np.arange(4), np.full(4, np.inf, np.float32), np.ones(4))
    weight = Profiles.of_sketch(sketch(x_ng, kind * 0), scaling, anchor, 0).weight_h
    variance = np.array([0, *spread**2]) * (1 + 1 / 30)
    np.testing.assert_allclose(weight, 1 / np.sqrt(variance + 0.1 * variance.mean()), rtol=0.1)


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
    found = pool_in_common(profiles, values, None, unit_rows(anchor[cells]), raw, likely)[:, -1]
    assert found[off & (kind[cells] == 0)].mean() > 20 * abs(found[off & (kind[cells] == 1)]).mean()


def test_how_far_neighbours_are_mixed() -> None:
    """As often as two of them are of one batch, against how often that is so of the reference's own."""
    rng = RNG(13)
    batch = np.repeat(np.arange(4), [400, 100, 100, 100])
    anchor = rng.normal(size=(700, 3))
    scaling = Scaling(np.arange(2), np.full(2, np.inf, np.float32), np.ones(2))
    found = Profiles.of_sketch(sketch(rng.poisson(1.0, (700, 2)) * 1.0, batch), scaling, anchor, 0)
    new = unit_rows(rng.normal(size=(50, 3)))
    nearest = NearestNeighbors(n_neighbors=30, metric="cosine")

    def number(of: np.ndarray) -> np.ndarray:
        """One over the share of pairs that are of the same batch."""
        alike = [[one == other for one, other in combinations(row, 2)] for row in of]
        return np.mean(alike, axis=1)

    for left_out in (None, 0, 1):
        there = np.flatnonzero(batch != left_out) if left_out is not None else np.arange(700)
        index = nearest.fit(anchor[there])
        near = batch[there][index.kneighbors(new)[1]]
        usual = 1 / number(batch[there][index.kneighbors(anchor[there])[1]]).mean() - 1
        expected = np.clip((1 / number(near) - 1) / usual, 0, 1)
        mixed = found.mixed(found.around(new, left_out), left_out)
        np.testing.assert_allclose(mixed, expected, atol=0.06)
    alone = Around(np.zeros((2, 2)), None, np.array([[30, 0, 0, 0], [1, 0, 0, 0]]))
    assert (found.mixed(alone) == 0).all()
    one = replace(found, count_sb=np.array([[30, 0, 0, 0]]), batch_s=np.zeros(1, int))
    assert (one.mixed(alone) == 1).all()
    assert (one.mixed(alone, 0) == 1).all()


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
    np.testing.assert_allclose(usual_common(parts), [3.5, 4.0, 4.0])
    for nothing in (np.zeros((9, 0)), np.zeros((9, 3))):
        assert (Shared(usual_common([nothing])).of_pool(np.array([[1.0, 5.0]]), np.ones(1)) == 0).all(), (
            "that tells nothing"
        )
    shared = Shared(np.array([3.5, 4.0, 4.0]))
    often = np.array([1, 0.5, 0.2])
    expected = 2 * np.log1p(np.array([[0, 0.5, 1.5], [0, 0.125, 0.06]]))
    np.testing.assert_allclose(shared.of_pool(parts[0], often), expected)
    np.testing.assert_allclose(shared.of_pool(parts[1], often[:2])[0], 2 * np.log1p(np.array([4, 6]) / 3.5))
    assert (shared.of_pool(parts[2], np.ones(9)) == 0).all()


@pytest.mark.parametrize(("cells", "columns"), [(27, 0), (28, 1), (55, 1), (56, 2), (104, 2), (105, 3)])
def test_kin_are_one_in_seven_of_a_pool(cells: int, columns: int) -> None:
    rng = RNG(9)
    scaling = Scaling(np.arange(6), np.full(6, np.inf, np.float32), np.ones(6))
    anchor, x_ng = rng.normal(size=(200, 4)), rng.poisson(1.0, (200, 6)) * 1.0
    profiles = Profiles.of_sketch(sketch(x_ng, np.arange(200) % 2), scaling, anchor, 0)
    new, own = rng.normal(size=(cells, 4)), sparse.csr_matrix(rng.poisson(1.0, (cells, 6)).astype(np.float32))
    likely = np.arange(cells) % 2 == 0
    found = pool_in_common(profiles, own, None, unit_rows(new), new, likely)
    assert found.shape == (cells, columns)
    if columns:
        around = profiles.around(unit_rows(new))
        left = left_over(own.toarray(), around.mean_mh, None, likely) * profiles.weight_h
        left *= profiles.mixed(around)[:, None]
        kin = np.argsort(-cosine_similarity(new) + 9 * np.eye(cells), axis=1)[:, :14]
        np.testing.assert_allclose(found, in_common(left, kin, (4, 8, 15)[:columns]), rtol=1e-4, atol=1e-4)


def test_the_first_cells_of_each_batch_are_kept(tmp_path: Path) -> None:
    """Whatever the order in which blocks pass by: the least by number, and of the same ones the first row."""
    rng = RNG(10)
    x_ng, genes = sparse.random(3_000, 12, 0.3, "csr", np.float32, rng), np.array([0, 1, 3, 4, 6, 7, 9, 11])
    seen = rng.random(3_000) < 0.9
    batch = rng.integers(0, 4, 3_000) % 3  # the fourth batch has no cell
    order = rng.integers(0, 400, 3_000).astype(np.uint64)
    known = np.array([[True] * 8, [False] * 8])
    for name, turn in (("one", 1), ("other", -1)):
        with Drawing(4, 100, genes, tmp_path) as drawing:
            for start in range(0, 3_000, 500)[::turn]:
                rows = np.arange(start, start + 500)
                drawing.offer(rows, batch[rows], order[rows], x_ng[rows], seen[rows])
            drawing.write(tmp_path / name, known)
        drawn = Drawn.open(tmp_path / name)
        for code in range(3):
            mine = np.flatnonzero((batch == code) & seen)
            first = mine[np.lexsort((mine, order[mine]))]
            for count in (7, 100, 1_000):
                rows, values = drawn.of_batch(code, count)
                np.testing.assert_array_equal(rows, first[: min(count, 100)])
                np.testing.assert_array_equal(values.toarray(), x_ng[rows][:, genes].toarray())
        rows, values = drawn.of_batch(3, 100)
        assert (len(rows), values.shape) == (0, (0, 8))
        np.testing.assert_array_equal(drawn.known_gh, known)


def test_no_cell_at_all_is_kept(tmp_path: Path) -> None:
    with Drawing(2, 100, np.arange(8), tmp_path) as drawing:
        none = np.zeros(0, int)
        drawing.offer(none, none, none.astype(np.uint64), sparse.csr_matrix((0, 8)), none.astype(bool))
        blind = np.zeros(2, bool)
        drawing.offer(np.arange(2), np.arange(2), np.arange(2, dtype=np.uint64), sparse.csr_matrix((2, 8)), blind)
        drawing.write(tmp_path / "none", np.ones((1, 8), bool))
    assert Drawn.open(tmp_path / "none").of_batch(1, 5)[1].shape == (0, 8)


def test_what_a_type_has_beside_the_components_makes_it_novel(atlas: Atlas, tmp_path: Path) -> None:
    """Two kinds of cells that have the same components, as far as the reference can tell: one has genes of its own.

    The genes are noise in the reference, a tenth of those that it uses.
    """
    rng = RNG(11)
    parts = [atlas.reference.X.toarray(), atlas.known.X.toarray()]
    quiet = [np.concatenate([part, rng.poisson(3.0, (len(part), 40))], axis=1) for part in parts]
    old, new = (
        anndata.AnnData(sparse.csr_matrix(x.astype(np.float32)), obs=cells.obs.copy())
        for x, cells in zip(quiet, (atlas.reference, atlas.known), strict=True)
    )
    integrate(old, batch_key="batch", out=tmp_path / "run", reporter=QuietReporter(), **SETTINGS)
    mine = np.flatnonzero((new.obs["cell_type"] == "type1").to_numpy())
    x_ng = new.X.toarray()
    pattern = np.where(np.arange(40) % 2, 3.0, 1 / 3)
    x_ng[np.ix_(mine, np.arange(40) + x_ng.shape[1] - 40)] = rng.poisson(3.0 * pattern, (len(mine), 40))
    new.X = sparse.csr_matrix(x_ng)
    found = map_cells(tmp_path / "run", new, batch_key="batch", reporter=QuietReporter()).obs
    novel = (found["schelix_novelty_p"] <= 0.05).to_numpy()
    others = np.setdiff1d(np.arange(len(novel)), mine)
    assert novel[mine].mean() > 0.8
    assert novel[others].mean() < 0.05


def test_held_out_cells_are_those_of_the_sketch(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of more cells than its sketch, and one that was extended by a batch of which it has no cell."""
    frozen = reference.frozen
    whole = frozen.sketch()
    some = np.flatnonzero((whole.batch_n != 1) & (np.arange(len(whole.rows)) % 2 == 0))
    part = replace(whole, rows=whole.rows[some], batch_n=whole.batch_n[some], x_ng=whole.x_ng[some])
    other = replace(frozen)
    monkeypatch.setattr(type(frozen), "sketch", lambda _: part)
    held_out = hold_out(other, MapConfig())
    silent = held_out.batch == 1
    assert silent.sum() == (frozen.batch_n == 1).sum()
    assert np.isin(held_out.rows[~silent], part.rows).all()
    np.testing.assert_array_equal(held_out.expressed, ~silent)
    assert [common.shape[1] > 0 for common in held_out.common_of] == [True, False, True]


def test_batches_without_expression_do_not_calibrate_novelty(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = reference.frozen
    held_out = hold_out(frozen, MapConfig())
    silent = held_out.batch == 1
    monkeypatch.setattr(calibration, "hold_out", lambda *_: replace(held_out, expressed=~silent))
    found = calibration.calibrate(frozen, frozen.labels(("cell_type",)), MapConfig())
    assert len(found.novelty.sizes[0].scores_s) == len(found.unlabelled.sizes[0].scores_s) == (~silent).sum()
    monkeypatch.setattr(calibration, "hold_out", lambda *_: replace(held_out, expressed=np.zeros_like(silent)))
    found = calibration.calibrate(frozen, [], MapConfig())
    assert len(found.unlabelled.sizes[0].scores_s) == len(silent), "where there is none at all, all do"


def test_genes_that_a_query_lacks_are_not_taken_for_zeros(
    reference: Reference, atlas: Atlas, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def remember(profiles: Profiles, own_ph: sparse.csr_matrix, *rest: Any) -> np.ndarray:
        asked.append((own_ph.toarray(), rest[0]))
        return pool_in_common(profiles, own_ph, *rest)

    monkeypatch.setattr(encode, "pool_in_common", remember)
    kept = np.flatnonzero(np.arange(atlas.known.n_vars) % 5 > 1)
    for query in (atlas.known, atlas.known[:, kept]):
        reference.map(query.copy(), batch_key="batch")
    (whole, all_known), (part, known) = asked
    there = np.isin(reference.frozen.scaling.genes, kept)
    assert all_known is None
    np.testing.assert_array_equal(known, np.tile(there, (len(part), 1)))
    assert (part[:, ~there] == 0).all()
    assert np.corrcoef(whole[:, there].mean(axis=0), part[:, there].mean(axis=0))[0, 1] > 0.99


def test_a_reference_of_two_batches_tells_what_is_novel(atlas: Atlas, tmp_path: Path) -> None:
    """When one is held out all that is left is of one batch, which must not count for nothing."""
    two = atlas.reference[atlas.reference.obs["batch"] != "b2"].copy()
    integrate(two, batch_key="batch", out=tmp_path / "run", reporter=QuietReporter(), **SETTINGS)
    reference = Reference.open(tmp_path / "run")
    held_out = hold_out(reference.frozen, MapConfig())
    assert (held_out.shared.usual_z[:3] < np.inf).all()
    found = reference.map(atlas.query.copy(), batch_key="batch").obs["schelix_novelty_p"].to_numpy() <= 0.05
    novel = (atlas.query.obs["cell_type"] == NOVEL).to_numpy()
    assert found[~novel].mean() < 0.1
    assert found[novel].mean() > 0.9
