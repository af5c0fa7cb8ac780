"""What is novel by its expression, of whole runs: which held-out cells calibrate it, and what a run does not know."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from scipy import sparse

from schelix_scale import Reference, extend, integrate, map_cells
from schelix_scale.genes.sketch import Sketch
from schelix_scale.mapping import alike as alike_module
from schelix_scale.mapping import calibration, encode, held_out_pools, pools, query
from schelix_scale.mapping import held_out as held_out_module
from schelix_scale.mapping.held_out import hold_out
from schelix_scale.mapping.leftover import LeftOver
from schelix_scale.mapping.profiles import Profiles
from schelix_scale.mapping.reference import Frozen
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.progress import QuietReporter
from schelix_scale.stores.base import Measured
from tests.mapping.conftest import NOVEL, SETTINGS, Atlas, cells
from tests.mapping.test_profiles import RNG


@dataclass(frozen=True)
class Quiet:
    """A run, a new batch, and which of its cells are of a type that the run's components cannot tell from another.

    It has genes of its own, which are noise in the reference: a tenth of those that it uses.
    """

    run: Path
    new: anndata.AnnData
    mine: np.ndarray


@pytest.fixture(scope="module")
def quiet(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    rng, run = RNG(11), tmp_path_factory.mktemp("quiet") / "run"
    parts = [atlas.reference.X.toarray(), atlas.known.X.toarray()]
    more = [np.concatenate([part, rng.poisson(3.0, (len(part), 40))], axis=1) for part in parts]
    old, new = (
        anndata.AnnData(sparse.csr_matrix(x.astype(np.float32)), obs=cells.obs.copy())
        for x, cells in zip(more, (atlas.reference, atlas.known), strict=True)
    )
    integrate(old, batch_key="batch", out=run, reporter=QuietReporter(), **SETTINGS)
    mine = (new.obs["cell_type"] == "type1").to_numpy()
    x_ng = new.X.toarray()
    pattern = np.where(np.arange(40) % 2, 3.0, 1 / 3)
    x_ng[np.ix_(np.flatnonzero(mine), np.arange(40) + x_ng.shape[1] - 40)] = rng.poisson(3 * pattern, (mine.sum(), 40))
    new.X = sparse.csr_matrix(x_ng)
    return Quiet(run, new, mine)


def with_sketch(monkeypatch: pytest.MonkeyPatch, frozen: Frozen, sketch: Sketch) -> None:
    """Let all runs have this sketch."""
    monkeypatch.setattr(type(frozen), "sketch", lambda _: sketch)
    counts = np.bincount(sketch.batch_n, minlength=int(frozen.batch_n.max()) + 1)
    monkeypatch.setattr(type(frozen), "sketched_b", counts)


def test_what_a_type_has_beside_the_components_makes_it_novel(quiet: Quiet) -> None:
    """Two kinds of cells that have the same components, as far as the reference can tell."""
    found = map_cells(quiet.run, quiet.new, batch_key="batch", reporter=QuietReporter()).obs
    novel = (found["schelix_novelty_p"] <= 0.05).to_numpy()
    assert novel[quiet.mine].mean() > 0.8
    assert novel[~quiet.mine].mean() < 0.05


def test_cells_that_are_in_no_pool_are_read_again_where_a_pool_is_strange(
    quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 160 cells 60 are drawn: each of the others is read a second time, and only of a batch that has a new type."""
    monkeypatch.setattr(held_out_module, "LEAST_OF_BATCH", 60)
    known = quiet.new[~quiet.mine].copy()
    known.obs["batch"] = "known"
    query = anndata.concat([quiet.new, known], index_unique="-")
    new, mine = np.arange(query.n_obs) < quiet.new.n_obs, np.r_[quiet.mine, np.zeros(known.n_obs, bool)]
    read: list[np.ndarray] = []
    alike: list[np.ndarray] = []
    readers, finders = pools.read_values, encode.find_pools

    def remember(*parts: Any) -> Any:
        read.append(parts[2])
        return readers(*parts)

    def find(*parts: Any) -> Any:
        found = finders(*parts)
        alike.append(found[1])
        return found

    monkeypatch.setattr(pools, "read_values", remember)
    monkeypatch.setattr(encode, "find_pools", find)

    def novelty(cells: anndata.AnnData, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        options = {"threads": threads, "reporter": QuietReporter(), "calibration_cells": 100}
        found = map_cells(quiet.run, cells, batch_key="batch", **options).obs
        return found["schelix_novelty_p"].to_numpy(), found["schelix_novelty"].to_numpy()

    p, score = novelty(query, threads=2)
    assert len(read) == 2, "each thread reads half of them"
    assert abs(len(read[0]) - len(read[1])) <= 1
    again = np.sort(np.concatenate(read))
    assert len(again) == len(np.unique(again)) == new.sum() - 60
    assert new[again].all()
    assert np.isfinite(alike[0]).sum() == new.sum() + 60, "of the known ones those that were drawn"
    assert np.median(alike[0][again][mine[again]]) > 1.5 * np.quantile(alike[0][again][~mine[again]], 0.95)
    assert (p[mine & np.isin(np.arange(len(p)), again)] <= 0.05).mean() > 0.8
    assert (p[~mine] <= 0.05).mean() < 0.08
    monkeypatch.setattr(pools, "LOOK_CELLS", 7)
    monkeypatch.setattr(pools, "TOGETHER", 1)
    monkeypatch.setattr(alike_module, "PART", 3)
    backwards = novelty(query[::-1].copy())[0]
    np.testing.assert_allclose(backwards[::-1], p, atol=1e-6)
    np.testing.assert_allclose(alike[1][::-1], alike[0], rtol=1e-6)
    assert max(map(len, read[2:])) <= 7
    monkeypatch.setattr(alike_module, "WEIGHT", 0.0)
    more, known_p = score - novelty(query)[1], np.isfinite(alike[0])
    usually = (
        calibration.calibrate(Reference.open(quiet.run).frozen, [], MapConfig(calibration_cells=100))
        .of_pool(60)
        .usually_alike
    )
    expected = 5 * np.log(np.maximum(alike[0][known_p] / usually.knee, 1))
    np.testing.assert_allclose(more[known_p], expected, atol=1e-3)


@pytest.mark.parametrize(("asked", "cells", "silent"), [(60, 100, [1]), (60, 16_000, [1]), (400, 100, [0, 1, 2])])
def test_held_out_cells_are_those_of_the_sketch(
    reference: Reference, monkeypatch: pytest.MonkeyPatch, asked: int, cells: int, silent: list[int]
) -> None:
    """A run of twice as many cells as its sketch has, and one that was extended by a batch of which it has none.

    Where more are held out than the sketch has, fewer are; expression says nothing where it has too few of all.
    """
    monkeypatch.setattr(held_out_module, "LEAST_OF_BATCH", asked)
    monkeypatch.setattr(held_out_pools, "LEAST_BATCHES", 2)
    frozen, settings = reference.frozen, MapConfig(calibration_cells=cells)
    whole = frozen.sketch()
    part = whole.of_cells(np.flatnonzero((whole.batch_n != 1) & (np.arange(len(whole.rows)) % 2 == 0)))
    with_sketch(monkeypatch, frozen, part)
    held_out = hold_out(replace(frozen), settings)
    of_sketch = ~np.isin(held_out.batch, silent)
    assert np.isin(held_out.rows[of_sketch], part.rows).all()
    for of_size in held_out.pools[:-2]:  # in the last two expression does not count
        told = [common.shape[1] > 0 for common in of_size.common_of]
        np.testing.assert_array_equal(told, np.isin(of_size.batch_of, silent) == 0)
        np.testing.assert_array_equal(of_size.expressed, of_sketch if len(silent) < 3 else True)
        if len(silent) == 3:
            assert (of_size.shared.of_pool(np.ones((5, 3)), np.ones(5)) == 0).all()
    if len(silent) == 3:
        assert len(held_out.rows) == frozen.n_cells, "as many are held out as always"


def test_batches_whose_expression_is_known_are_held_out_first(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, whole = reference.frozen, reference.frozen.sketch()
    for lacking in range(3):
        part = whole.of_cells(np.flatnonzero(whole.batch_n != lacking))
        with_sketch(monkeypatch, frozen, part)
        held_out = hold_out(replace(frozen), MapConfig(calibration_batches=2))
        assert set(held_out.batch) == {0, 1, 2} - {lacking}
        assert all(of_size.expressed.all() for of_size in held_out.pools)


def test_a_type_that_only_an_extension_has_is_not_novel(atlas: Atlas, tmp_path: Path) -> None:
    """The run keeps no expression of its new batches: what is left over of a cell that is near these tells nothing."""
    made = cells()
    later = made[(made.obs["batch"] == "b3") | (made.obs["cell_type"] == NOVEL)]
    half = np.arange(later.n_obs) % 2 == 0
    extend(atlas.run, later[half].copy(), batch_key="batch", out=tmp_path / "run2", reporter=QuietReporter())
    reference = Reference.open(tmp_path / "run2")
    new_cells = later[~half].copy()
    found = reference.map(new_cells, batch_key="batch").obs["schelix_novelty_p"].to_numpy()
    new = (new_cells.obs["cell_type"] == NOVEL).to_numpy()
    assert (found[new] <= 0.01).mean() < 0.1
    before = Reference.open(atlas.run).map(new_cells, batch_key="batch").obs["schelix_novelty_p"].to_numpy()
    assert (before[new] <= 0.01).mean() > 0.5


def test_batches_without_expression_do_not_calibrate_novelty(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = reference.frozen
    held_out = hold_out(frozen, MapConfig())
    silent = held_out.batch == 1
    part = tuple(replace(of_size, expressed=~silent) for of_size in held_out.pools)
    monkeypatch.setattr(calibration, "hold_out", lambda *_: replace(held_out, pools=part))
    found = calibration.calibrate(frozen, frozen.labels(("cell_type",)), MapConfig())
    for told in found.of_pools.values():
        assert len(told.novelty.sizes[0].scores_s) == len(told.unlabelled.sizes[0].scores_s) == (~silent).sum()


@pytest.mark.parametrize("of", ["reference", "query"])
def test_what_was_measured_in_part_of_the_cells_is_passed_on(
    of: str, reference: Reference, atlas: Atlas, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, asked = reference.frozen, []

    whole_pool = LeftOver.of_pool

    def remember(*parts: Any) -> LeftOver:
        asked.append((parts[2], parts[6] if len(parts) > 6 else None))
        return whole_pool(*parts)

    g = len(frozen.genes)
    there_pg = np.ones((2, g), bool)
    there_pg[1, ::4] = False
    genes = frozen.scaling.genes
    if of == "reference":
        whole = frozen.sketch()
        group_n = (whole.batch_n == 1).astype(np.int32)
        part = replace(whole, measured=Measured(group_n, ("x", "y"), there_pg))
        with_sketch(monkeypatch, frozen, part)
        monkeypatch.setattr(LeftOver, "of_pool", remember)
        hold_out(replace(frozen), MapConfig())
        assert {batch for _, batch in asked} == {0, 1, 2}
        for known, batch in asked:
            np.testing.assert_array_equal(known, np.tile(there_pg[int(batch == 1), genes], (len(known), 1)))
        return
    group_n = (np.arange(atlas.known.n_obs) % 3 == 0).astype(np.int32)
    monkeypatch.setattr(query, "partly_measured", lambda _: Measured(group_n, ("x", "y"), there_pg))
    reference.map(atlas.known, batch_key="batch")  # calibrates
    monkeypatch.setattr(LeftOver, "of_pool", remember)
    reference.map(atlas.known, batch_key="batch")
    ((known, _),) = asked
    expected = there_pg[group_n][:, genes].sum(axis=1)
    np.testing.assert_array_equal(np.sort(known.sum(axis=1)), np.sort(expected))


def test_genes_that_a_query_lacks_are_not_taken_for_zeros(
    reference: Reference, atlas: Atlas, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    whole_pool = LeftOver.of_pool

    def remember(profiles: Profiles, own_ph: sparse.csr_matrix, *rest: Any) -> LeftOver:
        asked.append((own_ph.toarray(), rest[0]))
        return whole_pool(profiles, own_ph, *rest)

    reference.map(atlas.known, batch_key="batch")  # calibrates
    monkeypatch.setattr(LeftOver, "of_pool", remember)
    kept = np.flatnonzero(np.arange(atlas.known.n_vars) % 5 > 1)
    for cells_of in (atlas.known, atlas.known[:, kept]):
        reference.map(cells_of.copy(), batch_key="batch")
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
    assert (held_out.pools[0].shared.usual_z < np.inf).all()
    found = reference.map(atlas.query.copy(), batch_key="batch").obs["schelix_novelty_p"].to_numpy() <= 0.05
    novel = (atlas.query.obs["cell_type"] == NOVEL).to_numpy()
    assert found[~novel].mean() < 0.1
    assert found[novel].mean() > 0.9
