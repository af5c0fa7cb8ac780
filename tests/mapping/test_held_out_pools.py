"""Among how many cells of a batch its cells have kin, and pools of held-out cells that are as large."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pytest

from schelix_scale import Reference
from schelix_scale.graph.vectors import unit_rows
from schelix_scale.mapping import encode, held_out
from schelix_scale.mapping.alike import Alike
from schelix_scale.mapping.calibration import calibrate
from schelix_scale.mapping.expression import pool_in_common
from schelix_scale.mapping.held_out import _corrected, held_out_batches, hold_out
from schelix_scale.mapping.held_out_pools import _Found, _together
from schelix_scale.mapping.kin import Pool
from schelix_scale.mapping.leftover import LeftOver
from schelix_scale.mapping.pool_sizes import EXPRESSED, nearest_size, parts, pool_sizes, workers
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.mapping.strange import Strange
from schelix_scale.records import read_json
from tests.mapping.conftest import Atlas


def cells_of_pools(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list of how many cells each pool has of which expression is read from now on."""
    asked: list[int] = []
    whole_pool = LeftOver.of_pool

    def remember(*parts: Any) -> LeftOver:
        asked.append(parts[1].shape[0])
        return whole_pool(*parts)

    monkeypatch.setattr(LeftOver, "of_pool", remember)
    return asked


@pytest.mark.parametrize(
    ("cells", "sizes"),
    [
        ([100, 100, 642, 82, 100], (100, 60, 30, 19)),
        ([642, 100], (642, 240, 120, 60, 30, 19)),
        ([9_000] * 3, (2_000, 960, 480, 240, 120, 60, 30, 19)),
        ([15, 15, 15, 700], (19,)),
        ([15] * 31 + [700] * 3, (700, 480, 240, 120, 60, 30, 19)),
        ([99, 99, 99, 700, 700], (99, 60, 30, 19)),
        ([20], (20, 19)),
        ([39], (30, 19)),
        ([40], (40, 30, 19)),
        ([], (19,)),
    ],
)
def test_half_of_the_batches_have_the_largest_pool(cells: list[int], sizes: tuple[int, ...]) -> None:
    assert pool_sizes(cells) == sizes


@pytest.mark.parametrize(
    ("cells_b", "sketched_b", "k", "at_most", "expected"),
    [
        ([5_000, 5_000, 300, 50], [600, 300, 300, 40], 10, 50, {0: 600, 1: 1_000, 2: 300, 3: 50}),
        ([5_000, 5_000, 5_000], [2_000, 1_334, 400], 10, 50, {0: 1_333, 1: 1_333, 2: 400}),
        ([100, 5], [100, 5], 10, 50, {1: 5}),
        ([500] * 4, [0, 500, 399, 500], 10, 2, {1: 500, 3: 500}),
    ],
)
def test_cells_of_the_sketch_are_held_out_where_it_has_enough(
    cells_b: list[int], sketched_b: list[int], k: int, at_most: int, expected: dict[int, int]
) -> None:
    """400 of a batch, or all that it has; as many of the others as are asked for, and none beside which k are left."""
    codes = np.repeat(np.arange(len(cells_b)), cells_b)
    frozen: Any = SimpleNamespace(
        batch_n=codes,
        n_cells=len(codes),
        sketched_b=np.array(sketched_b),
        config=SimpleNamespace(seed=0, graph=SimpleNamespace(k=k)),
    )
    settings = MapConfig(calibration_cells=4_000, calibration_batches=at_most)
    batches, counts = held_out_batches(frozen, settings)
    assert dict(zip(batches.tolist(), counts.tolist(), strict=True)) == expected


def test_the_nearest_size_is_so_as_a_multiple() -> None:
    sizes = (400, 240, 120, 60, 30, 19)
    found = {cells: nearest_size(sizes, cells) for cells in (1, 19, 20, 39, 40, 84, 85, 169, 170, 309, 310, 400)}
    expected = [19, 19, 30, 30, 60, 60, 120, 120, 240, 240, 400, 400]
    assert list(found.values()) == expected, "expression does not count in pools of less than 40, old or new"
    assert nearest_size((19,), 300) == 19
    assert nearest_size((400, 240, 120, 30, 19), 41) == 120


def test_fewer_pools_are_worked_on_at_once_where_memory_is_scarce() -> None:
    gb = 10**9
    assert workers(16 * gb, 2_000, 2_000, 8) == 8
    assert workers(4 * gb, 2_000, 2_000, 8) == 4
    assert workers(gb // 10, 2_000, 2_000, 8) == 1


@pytest.mark.parametrize("cells", [1, 7, 99, 149, 150, 151, 180, 642, 2_000])
def test_parts_are_about_as_large_as_the_size(cells: int) -> None:
    found = parts(5, 5 + cells, 100)
    assert [start for start, _ in found] == [5, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == 5 + cells
    length = np.diff(found).ravel()
    assert np.ptp(length) <= 1
    assert length.max() <= 150
    assert len(found) == 1 or length.min() >= 66


def test_cells_of_the_sketch_are_counted_by_batch(reference: Reference) -> None:
    frozen = reference.frozen
    expected = [(frozen.batch_n[frozen.sketch().rows] == batch).sum() for batch in range(frozen.batch_n.max() + 1)]
    np.testing.assert_array_equal(frozen.sketched_b, expected)


def test_held_out_cells_are_compared_within_pools_of_each_size(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against what is left over of the cells of one pool alone."""
    frozen = reference.frozen
    held_out, sketch = hold_out(frozen, MapConfig()), frozen.sketch()
    size_b = np.unique(held_out.batch, return_counts=True)[1]
    sizes = [pools.size for pools in held_out.pools]
    assert sizes[0] == np.sort(size_b)[1], "half of the batches have as many"
    assert sizes[-1] == 19
    for pools in held_out.pools[:-1]:
        every = np.concatenate(pools.kin_of)
        np.testing.assert_array_equal(np.sort(every), np.arange(len(held_out.rows)))
        for kin, batch in zip(pools.kin_of, pools.batch_of, strict=True):
            assert (held_out.batch[kin] == batch).all()
            assert len(kin) == size_b[batch] or 2 / 3 <= len(kin) / pools.size <= 1.5
    for pools in held_out.pools[:-2]:
        share = sum(np.ceil(len(kin) / 10) for kin in pools.kin_of)
        assert len(pools.strange.batch_s) == share, "a tenth of the cells of each pool"
        for place in (0, len(pools.kin_of) - 1):
            kin, batch = pools.kin_of[place], pools.batch_of[place]
            rows = held_out.rows[kin]
            corrected = _corrected(frozen, held_out.rows[held_out.batch == batch], rows)
            own = frozen.scaling(sketch.x_ng[np.searchsorted(sketch.rows, rows)])
            likely, told = held_out.score[kin] <= np.median(held_out.score[kin]), frozen.told(held_out.indices[kin])
            left = LeftOver.of_pool(frozen.profiles, own, None, unit_rows(corrected), likely, told, batch)
            among, alone = Alike.of_pool(left)
            assert among is not None
            half = among.left_ph.astype(np.float16).astype(np.float32)
            others = pools.strange.without(batch)
            more = others.more(half, among.most, others.usual(half, likely, among.most))
            assert (left.counts_p * more > 0.01).any()
            np.testing.assert_allclose(pools.alike[kin], alone - left.counts_p * more, rtol=1e-4, atol=1e-4)
            common = pool_in_common(left, held_out.raw[kin])
            np.testing.assert_allclose(pools.common_of[place], common, rtol=1e-3, atol=1e-3)
    assert sum(size >= EXPRESSED for size in sizes) == len(sizes) - 2 >= 2
    for few in held_out.pools[-2:]:
        assert not few.alike.any()
        assert all(common.shape[1] == 0 for common in few.common_of)
        assert few.usually_alike.knee == np.inf
        assert not len(few.strange.batch_s)
        assert few.expressed.all()
    asked = cells_of_pools(monkeypatch)
    (only,) = hold_out(frozen, MapConfig(), wanted=sizes[1:2]).pools
    assert only.size == sizes[1]
    assert sorted(asked) == sorted(map(len, only.kin_of)), "nothing is computed for sizes that are not wanted"
    for one, other in zip(only.kin_of, held_out.pools[1].kin_of, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_usual_is_the_median_over_batches_of_means_over_their_pools(reference: Reference) -> None:
    held_out = hold_out(reference.frozen, MapConfig())
    pools, nothing = held_out.pools[1], np.zeros(len(held_out.rows))
    silent = replace(pools, common_of=[common[:, :0] for common in pools.common_of])
    own = held_out.evidence(nothing)
    _, usual = silent.with_kin(held_out.raw, own, nothing + 1)
    told = [Pool.of_cells(kin, held_out.raw[kin], own[kin]).usual_cz for kin in pools.kin_of]
    of_batch = [
        np.mean([cz for cz, of in zip(told, pools.batch_of, strict=True) if of == batch], axis=0) for batch in range(3)
    ]
    np.testing.assert_allclose(usual.score_cz[:, : told[0].shape[1]], np.median(of_batch, axis=0))
    assert len(told) > 6


@pytest.mark.parametrize("small", [30, 45, 82])
def test_pools_of_few_cells_do_not_say_what_is_usual(
    reference: Reference, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    """One small batch among large ones: expression counts in all pools of a size that calibrate, or in none."""
    frozen = reference.frozen
    batches, counts = held_out_batches(frozen, MapConfig())
    monkeypatch.setattr(held_out, "held_out_batches", lambda *_: (batches, np.r_[counts[:-1], small]))
    monkeypatch.setattr(held_out, "sizes_of_pools", lambda *_: (160, 60, 30, 19))
    for pools in hold_out(frozen, MapConfig()).pools:
        counted = {common.shape[1] > 0 for kin, common in zip(pools.kin_of, pools.common_of, strict=True)}
        calibrating = {
            common.shape[1] > 0
            for kin, common in zip(pools.kin_of, pools.common_of, strict=True)
            if pools.expressed[kin].all()
        }
        assert calibrating == {pools.size >= EXPRESSED}
        assert (pools.usually_alike.knee < np.inf) == (pools.size >= EXPRESSED)
        assert counted == ({True, False} if small < EXPRESSED <= pools.size else {pools.size >= EXPRESSED})


def test_batches_too_small_for_expression_are_not_asked_for_it() -> None:
    """Two of the two batches that are large enough say what is usual; a third of 30 cells does not say."""
    rng, counts = np.random.default_rng(0), (50, 60, 30)
    kin = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    found = [[_Found(part, rng.gamma(2.0, size=(len(part), 2)), rng.gamma(2.0, size=len(part)))] for part in kin[:2]]
    known_b = np.array([True, True, False])
    pools = _together(
        60, np.arange(3), [*found, [_Found(kin[2])]], known_b, sum(counts), lambda _: 1.0, Strange.of_batches([])
    )
    assert pools.usually_alike.knee < np.inf
    np.testing.assert_array_equal(pools.expressed, np.arange(sum(counts)) < 110)


def test_only_sizes_that_are_not_known_are_calibrated(atlas: Atlas, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that maps queries of all sizes calibrates each once."""
    asked: list[Any] = []

    def remember(*parts: Any) -> Any:
        asked.append(list(parts[-1]))
        return calibrate(*parts)

    monkeypatch.setattr(encode, "calibrate", remember)
    reference, few = Reference.open(atlas.run), atlas.known[:24].copy()
    few.obs["batch"] = "few"
    both = anndata.concat([atlas.known, few], index_unique="-")
    alone = [reference.map(cells.copy(), batch_key="batch").obs for cells in (few, atlas.known, few)]
    together = reference.map(both, batch_key="batch").obs["schelix_novelty_p"].to_numpy()
    assert asked == [[30], [160]]
    np.testing.assert_array_equal(alone[0]["schelix_novelty_p"], alone[2]["schelix_novelty_p"])
    apart = np.r_[alone[1]["schelix_novelty_p"], alone[0]["schelix_novelty_p"]]
    np.testing.assert_allclose(together, apart, rtol=1e-5)


@pytest.mark.parametrize(("cells", "counts"), [(36, False), (44, True)])
def test_expression_of_new_pools_counts_from_40_cells_on(
    atlas: Atlas, monkeypatch: pytest.MonkeyPatch, cells: int, counts: bool
) -> None:
    asked = cells_of_pools(monkeypatch)
    Reference.open(atlas.run).map(atlas.known[:cells].copy(), batch_key="batch")
    assert (cells in asked) == bool(asked) == counts


def test_new_pools_are_compared_with_strange_cells_of_all_batches(
    reference: Reference, atlas: Atlas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is found of them is less than by their own batch alone, as far as the reference's held-out cells tell."""
    seen: list[tuple[LeftOver, np.ndarray]] = []
    finders = Alike.of_pool

    def remember(left: LeftOver, *strange: Any) -> Any:
        found = finders(left, *strange)
        if left.told.batch is None:
            seen.append((left, found[1]))
        return found

    monkeypatch.setattr(Alike, "of_pool", remember)
    Reference.open(atlas.run).map(atlas.query.copy(), batch_key="batch")
    ((left, found),) = seen
    (pools,) = hold_out(
        reference.frozen, MapConfig(), wanted=held_out.sizes_of_pools(reference.frozen, MapConfig())[:1]
    ).pools
    among, alone = finders(left)
    assert among is not None
    usual = pools.strange.usual(among.left_ph, left.likely_p, among.most)
    less = left.counts_p * pools.strange.more(among.left_ph, among.most, usual) * (alone > pools.usually_alike.knee)
    assert (less > 0.1).any()
    np.testing.assert_allclose(found, alone - less, rtol=1e-4, atol=1e-4)


def test_batches_of_all_sizes_are_told_together_as_they_are_alone(
    reference: Reference, atlas: Atlas, tmp_path: Path
) -> None:
    """A batch's p-values are of its own size, and of no other's that is mapped with it."""
    counts = {"whole": atlas.known.n_obs, "part": 70, "few": 24, "alone": 9}
    batches = []
    for name, count in counts.items():
        batch = atlas.known[np.linspace(0, atlas.known.n_obs - 1, count).astype(int)].copy()
        batch.obs["batch"] = name
        batch.obs_names = [f"{name}{i}" for i in range(count)]
        batches.append(batch)
    both = reference.map(anndata.concat(batches), batch_key="batch", label_key="cell_type", out=tmp_path / "both")
    sizes = [read_json(tmp_path / "both" / "stages" / "calibrate.json")["details"]["pools"]]
    for batch in batches:
        name = batch.obs["batch"].iloc[0]
        found = reference.map(batch, batch_key="batch", label_key="cell_type", out=tmp_path / name)
        told = both.obs[both.obs["batch"] == name]
        for column in ("schelix_novelty", "schelix_novelty_p"):
            np.testing.assert_allclose(told[column], found.obs[column], rtol=1e-5)
        sizes.append(read_json(tmp_path / name / "stages" / "calibrate.json")["details"]["pools"])
    assert all(len(of_one) == 1 for of_one in sizes[1:])
    assert sizes[0] == [size for (size,) in sizes[1:]]
    assert sizes[0] == sorted(set(sizes[0]), reverse=True)
