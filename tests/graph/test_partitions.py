"""Partitions: every cell is in one, none is too large, and what they find is merged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from schelix_scale.config import GraphConfig
from schelix_scale.errors import ConfigError
from schelix_scale.graph.build import build_neighbors, circumstances
from schelix_scale.graph.lists import CellIndex
from schelix_scale.graph.partitions import OVERLAPS, Partition, SearchPartition, breadths, merge, partitions, room_for
from tests.synthetic import gaussian_cells

N, K = 6_000, 15


@pytest.fixture(scope="module")
def features_nd() -> np.ndarray:
    return np.asarray(gaussian_cells(n=N, d=12, n_types=6)[0], np.float32)


def test_partitions_overlap_and_lose_no_cell(features_nd: np.ndarray, tmp_path: Path) -> None:
    index = CellIndex.build(features_nd, tmp_path, 0, 2, list_cells=20)
    parts = partitions(index, 10_000)
    assert len(parts) == 1
    found = _small_partitions(index, 2_500)
    assert len(found) >= 4
    assert max(map(len, found)) <= 2_500
    np.testing.assert_array_equal(np.unique(np.concatenate(found)), np.arange(N))
    assert sum(map(len, found)) > 1.05 * N
    with pytest.raises(ConfigError, match=r"room for partitions of 5,000 cells.*--max-memory.*ivf"):
        partitions(index, 5_000)
    tight = GraphConfig(method="pynndescent")
    with pytest.raises(ConfigError, match=r"room for partitions of 0 cells.*--max-memory.*ivf"):
        build_neighbors(features_nd, tmp_path / "none", tight, 0, 1, 10**6)
    assert not (tmp_path / "none").exists(), "before anything is computed"


def _small_partitions(index: CellIndex, room: int, overlap: int = OVERLAPS[0]) -> list[np.ndarray]:
    from schelix_scale.graph import partitions as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LEAST_CELLS", 100)
        return [part.positions for part in module.partitions(index, room, overlap, K)]


def test_a_list_larger_than_a_partition_is_split(features_nd: np.ndarray, tmp_path: Path) -> None:
    """Half the cells are the same one; they are in very few lists."""
    features_nd = features_nd.copy()
    features_nd[: N // 2] = features_nd[0]
    index = CellIndex.build(features_nd, tmp_path, 0, 2, list_cells=20)
    assert np.diff(index.starts).max() > 1_000, "more than the partitions below have room for"
    for overlap in (1, 3, 9):
        found = _small_partitions(index, 1_000, overlap)
        assert max(map(len, found)) <= 1_000
        assert min(map(len, found)) > 2 * K
        np.testing.assert_array_equal(np.unique(np.concatenate(found)), np.arange(N))
        assert all(len(np.unique(part)) == len(part) for part in found)


def test_a_repeated_search_is_wider(features_nd: np.ndarray, tmp_path: Path) -> None:
    """More lists around each list, more neighbours; what budgets change is known, and they all have room for few."""
    index = CellIndex.build(features_nd, tmp_path, 0, 2, list_cells=20)
    narrow, wide = (sum(map(len, _small_partitions(index, 2_500, overlap))) for overlap in OVERLAPS)
    assert wide > 1.2 * narrow
    first, second = breadths(10**9, 10**6, 30, 30)
    assert (first.neighbours, second.neighbours) == (30, 60)
    assert second.overlap > first.overlap
    assert 10_000 < second.room < first.room < 10**6
    tight, again = breadths(400_000_000 + 12_000 * 1_600, 10**6, 30, 30)
    assert tight.room > 10_000
    assert (again.neighbours, again.room) == (30, tight.room), "no room for more neighbours"
    config = GraphConfig(method="pynndescent")
    known = [circumstances((10**6, 30), config, 2, budget) for budget in (10**9, 2 * 10**9, 10**11, 10**12)]
    assert known[0] != known[1] != known[2] == known[3]
    assert known[0] != circumstances((10**6, 30), config, 3, 10**9)
    assert circumstances((10**6, 30), GraphConfig(method="ivf"), 2, 10**9) == {}


def test_row_numbers_of_partitions_may_be_large(tmp_path: Path) -> None:
    positions = np.arange(50) * 3 + 2**40
    task = SearchPartition(tmp_path, tmp_path, 4, 6, 0, 1)
    columns = np.random.default_rng(0).integers(0, 50, (50, 6))
    part = Partition(0, positions)
    assert not task.done(part)
    task.write(part, columns, np.zeros((50, 6), np.float32))
    assert task.done(part)
    assert not task.done(Partition(0, positions + 1))
    with np.load(task.path(part)) as found:
        np.testing.assert_array_equal(found["positions"], columns[:, :4] * 3 + 2**40)


def test_room_grows_with_the_budget() -> None:
    assert room_for(10**9, 30, 30) == pytest.approx(600e6 / 1_600, rel=0.05)
    assert room_for(2 * 10**9, 30, 30) > 2 * room_for(10**9, 30, 30)


@pytest.mark.parametrize("offset", [0, 2**24, 2**31, 2**40])
def test_merged_lists_are_the_best_of_both(offset: int) -> None:
    """Numbers beyond what a float32 or an int32 holds stay what they are; the same number counts once."""
    rng = np.random.default_rng(1)
    rows, k, pool = 50, 6, 25
    truth = rng.uniform(-1, 1, (rows, pool)).astype(np.float32)
    lists = []
    for _ in range(2):
        chosen = np.argsort(rng.random((rows, pool)), axis=1)[:, :k]
        lists.append((chosen + offset, np.take_along_axis(truth, chosen, axis=1)))
    numbers, scores = merge(*lists[0], *lists[1])
    for row in range(rows):
        known = set(lists[0][0][row].tolist()) | set(lists[1][0][row].tolist())
        expected = sorted(known, key=lambda j: -truth[row, j - offset])[:k]
        assert numbers[row].tolist() == expected
        np.testing.assert_array_equal(scores[row], truth[row, np.array(expected) - offset])
    empty = np.full((rows, k), -1, np.int64), np.full((rows, k), -np.inf, np.float32)
    np.testing.assert_array_equal(np.sort(merge(*empty, *lists[0])[0], axis=1), np.sort(lists[0][0], axis=1))
