"""Searches end to end: neighbours against exact ones, whatever the method, the tasks and the interruptions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from schelix_scale.config import GraphConfig
from schelix_scale.errors import ConfigError, GraphError
from schelix_scale.graph import build, descent
from schelix_scale.graph.build import build_neighbors
from schelix_scale.graph.descent import Expand, FoundFiles, start_from
from schelix_scale.graph.knn import Neighbors
from schelix_scale.graph.lists import CellIndex
from schelix_scale.graph.partitions import merge, partitions, room_for
from schelix_scale.graph.vectors import cell_dtype
from schelix_scale.progress import QuietReporter
from tests.synthetic import gaussian_cells

N, K, D = 6_000, 15, 12
IVF = GraphConfig(method="ivf", k=K, audit_cells=400)
LOTS = 10**12


@pytest.fixture(scope="module")
def features_nd() -> np.ndarray:
    z_nd = np.asarray(gaussian_cells(n=N, d=D, n_types=6)[0], np.float32)
    z_nd[-40:] = z_nd[0]  # more equal cells than neighbours
    z_nd[5] = 0
    return z_nd


@pytest.fixture(scope="module")
def exact(features_nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine distances to the K nearest other cells, and which those are, by scikit-learn in double precision."""
    rows = features_nd.astype(np.float64)
    search = NearestNeighbors(n_neighbors=K + 1, metric="cosine", algorithm="brute").fit(rows)
    distances, indices = search.kneighbors(rows)
    return distances[:, 1:], indices[:, 1:]


def recall(found: Neighbors, features_nd: np.ndarray, exact: tuple[np.ndarray, np.ndarray]) -> float:
    """Share of found neighbours that are no farther than the K-th exact one; each row is checked to be sound."""
    indices = np.asarray(found.indices_nk)
    assert not (indices == np.arange(N)[:, None]).any()
    assert all(len(set(row)) == K for row in indices.tolist())
    unit = features_nd / np.maximum(np.linalg.norm(features_nd, axis=1, keepdims=True), 1e-12)
    named = 1 - np.einsum("nd,nkd->nk", unit, unit[indices])
    np.testing.assert_allclose(found.distances_nk, np.maximum(named, 0), atol=3e-6)
    assert (np.diff(found.distances_nk, axis=1) >= -1e-6).all()
    return float((named <= exact[0][:, -1:] + 2e-6).mean())


def test_ivf_finds_nearly_all_and_knows_it(
    features_nd: np.ndarray, exact: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    found, audit = build_neighbors(features_nd, tmp_path, IVF, 0, 2, LOTS)
    share = recall(found, features_nd, exact)
    assert share >= 0.95
    assert audit.low - 0.002 <= share <= audit.high + 0.002
    assert audit.method == found.method == "ivf"
    assert found.indices_nk.dtype == np.int32
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "distances.npy", "index", "index.json", "indices.npy", "neighbours.json",
    ]  # fmt: skip


def test_neither_threads_nor_an_interruption_matter(
    features_nd: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a few lists at the start, so that rounds are needed; the first search stops in the middle of the second."""
    monkeypatch.setattr(build, "PROBES", 2)
    monkeypatch.setattr(descent, "MIN_CANDIDATES", 2 * K)
    one, _ = build_neighbors(features_nd, tmp_path / "one", IVF, 0, 1, LOTS)
    two, _ = build_neighbors(features_nd, tmp_path / "two", IVF, 0, 2, LOTS)
    np.testing.assert_array_equal(one.indices_nk, two.indices_nk)
    np.testing.assert_array_equal(one.distances_nk, two.distances_nk)

    calls: list[int] = []

    def interrupted(self: Expand, span: tuple[int, int]) -> int:
        calls.append(self.number)
        if self.number == 2:
            raise KeyboardInterrupt
        return original(self, span)

    original = Expand.__call__
    monkeypatch.setattr(Expand, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_neighbors(features_nd, tmp_path / "three", IVF, 0, 1, LOTS)
    assert set(calls) == {1, 2}
    monkeypatch.setattr(Expand, "__call__", original)
    reporter = QuietReporter()
    three, _ = build_neighbors(features_nd, tmp_path / "three", IVF, 0, 1, LOTS, reporter)
    assert any("goes on after round 1" in message for message in reporter.messages)
    np.testing.assert_array_equal(one.indices_nk, three.indices_nk)


def test_neighbours_of_neighbours_repair_a_poor_start(
    features_nd: np.ndarray, exact: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    """From neighbours of which half are random cells; as the graph of slightly other features would be."""
    start = exact[1].copy()
    rng = np.random.default_rng(0)
    start[:, ::2] = rng.integers(0, N, start[:, ::2].shape)
    for row in range(N):
        others = np.setdiff1d(np.arange(row - 60, row + 60) % N, [row])
        distinct = list(dict.fromkeys(int(j) for j in start[row] if j != row))
        start[row] = (distinct + [j for j in others.tolist() if j not in distinct])[:K]
    found, _ = build_neighbors(features_nd, tmp_path, IVF, 0, 2, LOTS, start=start_from(start))
    assert recall(found, features_nd, exact) >= 0.95


def test_a_low_recall_makes_the_search_go_wider(
    features_nd: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "PROBES", 1)
    monkeypatch.setattr(build, "MORE_PROBES", 100)
    monkeypatch.setattr(descent, "MIN_CANDIDATES", 2 * K)
    monkeypatch.setattr(descent, "MAX_ROUNDS", 0)
    reporter = QuietReporter()
    _, audit = build_neighbors(features_nd, tmp_path / "wider", IVF, 0, 2, LOTS, reporter)
    assert audit.recall >= 0.95
    assert any("repeated more widely" in message for message in reporter.messages)
    monkeypatch.setattr(build, "MORE_PROBES", 1)
    with pytest.raises(GraphError, match=r"found 0\.\d+ of the exact .* Raise graph\.k"):
        build_neighbors(features_nd, tmp_path / "fails", IVF, 0, 2, LOTS)


def test_features_that_are_not_finite(features_nd: np.ndarray, tmp_path: Path) -> None:
    broken = features_nd.copy()
    broken[77, 3] = np.nan
    with pytest.raises(GraphError, match="features of cell 77 are not finite"):
        build_neighbors(broken, tmp_path, IVF, 0, 1, LOTS)


def test_too_few_cells(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="k = 15 neighbours need more than 15 cells, got 9"):
        build_neighbors(gaussian_cells(n=9)[0], tmp_path, IVF, 0, 1, LOTS)


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


def _small_partitions(index: CellIndex, room: int) -> list[np.ndarray]:
    from schelix_scale.graph import partitions as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LEAST_CELLS", 100)
        return [part.positions for part in module.partitions(index, room)]


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


def test_numbers_of_more_cells_are_wider() -> None:
    assert cell_dtype(2**31 - 1) == np.int32
    assert cell_dtype(2**31) == np.int64
    assert FoundFiles(Path(), 2**31 + 1, 2)._dtype("neighbours-0") == np.int64


@pytest.mark.slow  # pynndescent compiles for half a minute
def test_pynndescent_in_partitions(
    features_nd: np.ndarray, exact: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In partitions that overlap, and in one; interrupted after some partitions, the others alone are searched."""
    from schelix_scale.graph import partitions as module

    config, features_nd = IVF.model_copy(update={"method": "pynndescent"}), features_nd.copy()
    features_nd[5] = features_nd[6] + 0.01  # pynndescent puts a cell at the origin halfway between all others
    monkeypatch.setattr(module, "LEAST_CELLS", 100)
    monkeypatch.setattr(build, "room_for", lambda *_: 2_500)
    found, audit = build_neighbors(features_nd, tmp_path / "parts", config, 0, 2, LOTS)
    share = recall(found, features_nd, exact)
    assert share >= 0.95
    assert audit.low - 0.002 <= share <= audit.high + 0.002
    assert audit.method == "pynndescent"
