"""Expression that is kept of a reference, and of new batches, against dense means and other libraries' neighbours."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from schelix_scale import Reference
from schelix_scale.genes.sketch import Sketch
from schelix_scale.graph.vectors import unit_rows
from schelix_scale.mapping import profiles
from schelix_scale.mapping.drawn import Drawing, Drawn
from schelix_scale.mapping.profiles import Around, Profiles, Scaling
from schelix_scale.stores.base import Measured
from schelix_scale.stores.values import ValueDecision
from tests.mapping.conftest import Atlas
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
    np.testing.assert_array_equal(np.sort(found.batch_mk), np.sort(batch_n[there[near]]))


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
    alone = Around(np.zeros((2, 2)), None, np.zeros((2, 30), int))
    assert (found.mixed(alone) == 0).all()
    one = replace(found, around_sk=np.zeros((1, 30), int), batch_s=np.zeros(1, int))
    assert (one.mixed(alone) == 1).all()
    assert (one.mixed(alone, 0) == 1).all()


@pytest.mark.parametrize(("numbers", "most"), [(400, 100), (2**50, 100), (2**50, 2)])
def test_the_first_cells_of_each_batch_are_kept(tmp_path: Path, numbers: int, most: int) -> None:
    """Whatever the order in which blocks pass by: the least by number, and of the same ones the first row."""
    rng = RNG(10)
    x_ng, genes = sparse.random(3_000, 12, 0.3, "csr", np.float32, rng), np.array([0, 1, 3, 4, 6, 7, 9, 11])
    seen = rng.random(3_000) < 0.9
    batch = rng.integers(0, 4, 3_000) % 3  # the fourth batch has no cell
    order = rng.integers(0, numbers, 3_000).astype(np.uint64)
    known = np.array([[True] * 8, [False] * 8])
    for name, turn in (("one", 1), ("other", -1)):
        with Drawing(4, most, genes, tmp_path) as drawing:
            for start in range(0, 3_000, 50)[::turn]:
                rows = np.arange(start, start + 50)
                drawing.offer(rows, batch[rows], order[rows], x_ng[rows], seen[rows])
            drawing.write(tmp_path / name, known)
        drawn = Drawn.open(tmp_path / name)
        for code in range(3):
            mine = np.flatnonzero((batch == code) & seen)
            first = mine[np.lexsort((mine, order[mine]))]
            for count in (2, 7, 100, 1_000):
                rows, values = drawn.of_batch(code, count)
                np.testing.assert_array_equal(rows, first[: min(count, most)])
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
