"""Among how many cells of a batch its cells have kin, and pools of held-out cells that are as large."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from schelix_scale import Reference
from schelix_scale.graph.vectors import unit_rows
from schelix_scale.mapping.alike import Alike
from schelix_scale.mapping.expression import pool_in_common
from schelix_scale.mapping.held_out import _corrected, hold_out
from schelix_scale.mapping.kin import Pool
from schelix_scale.mapping.leftover import LeftOver
from schelix_scale.mapping.pool_sizes import nearest_size, parts, pool_sizes
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.records import read_json
from tests.mapping.conftest import Atlas


@pytest.mark.parametrize(
    ("cells", "sizes"),
    [
        ([100, 100, 642, 82, 100], (100, 50, 25, 19)),
        ([642, 100], (642, 321, 160, 80, 40, 20, 19)),
        ([9_000] * 3, (2_000, 1_000, 500, 250, 125, 62, 31, 19)),
        ([15, 15, 15, 700], (19,)),
        ([20], (20, 19)),
    ],
)
def test_half_of_the_batches_have_the_largest_pool(cells: list[int], sizes: tuple[int, ...]) -> None:
    assert pool_sizes(cells) == sizes


def test_the_nearest_size_is_so_as_a_multiple() -> None:
    sizes = (400, 200, 100, 50, 25, 19)
    found = {cells: nearest_size(sizes, cells) for cells in (1, 19, 20, 35, 36, 141, 142, 282, 283, 400)}
    assert found == {1: 19, 19: 19, 20: 25, 35: 25, 36: 50, 141: 100, 142: 200, 282: 200, 283: 400, 400: 400}
    assert nearest_size((19,), 300) == 19


@pytest.mark.parametrize("cells", [1, 7, 99, 149, 150, 151, 180, 642, 2_000])
def test_parts_are_about_as_large_as_the_size(cells: int) -> None:
    found = parts(5, 5 + cells, 100)
    assert [start for start, _ in found] == [5, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == 5 + cells
    length = np.diff(found).ravel()
    assert np.ptp(length) <= 1
    assert length.max() <= 150
    assert len(found) == 1 or length.min() >= 66


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
    for pools in held_out.pools[:3]:
        for place in (0, len(pools.kin_of) - 1):
            kin, batch = pools.kin_of[place], pools.batch_of[place]
            rows = held_out.rows[kin]
            corrected = _corrected(frozen, held_out.rows[held_out.batch == batch], rows)
            own = frozen.scaling(sketch.x_ng[np.searchsorted(sketch.rows, rows)])
            likely, told = held_out.score[kin] <= np.median(held_out.score[kin]), frozen.told(held_out.indices[kin])
            left = LeftOver.of_pool(frozen.profiles, own, None, unit_rows(corrected), likely, told, batch)
            np.testing.assert_allclose(pools.alike[kin], Alike.of_pool(left)[1], rtol=1e-4, atol=1e-5)
            common = pool_in_common(left, held_out.raw[kin])
            np.testing.assert_allclose(pools.common_of[place], common, rtol=1e-3, atol=1e-3)
    alone = held_out.pools[-1]
    assert not alone.alike.any()
    assert all(common.shape[1] == 0 for common in alone.common_of)
    asked: list[int] = []
    whole_pool = LeftOver.of_pool

    def remember(*parts: Any) -> LeftOver:
        asked.append(parts[1].shape[0])
        return whole_pool(*parts)

    monkeypatch.setattr(LeftOver, "of_pool", remember)
    (only,) = hold_out(frozen, MapConfig(), wanted=sizes[1:2]).pools
    assert only.size == sizes[1]
    assert sorted(asked) == sorted(map(len, only.kin_of)), "nothing is computed for sizes that are not wanted"
    for one, other in zip(only.kin_of, held_out.pools[1].kin_of, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_usual_is_the_median_over_batches_of_means_over_their_pools(reference: Reference) -> None:
    held_out = hold_out(reference.frozen, MapConfig())
    pools, nothing = held_out.pools[2], np.zeros(len(held_out.rows))
    silent = replace(pools, common_of=[common[:, :0] for common in pools.common_of])
    own = held_out.evidence(nothing)
    _, usual = silent.with_kin(held_out.raw, own, nothing + 1)
    told = [Pool.of_cells(kin, held_out.raw[kin], own[kin]).usual_cz for kin in pools.kin_of]
    of_batch = [
        np.mean([cz for cz, of in zip(told, pools.batch_of, strict=True) if of == batch], axis=0) for batch in range(3)
    ]
    np.testing.assert_allclose(usual.score_cz[:, : told[0].shape[1]], np.median(of_batch, axis=0))
    assert len(told) > 9


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
