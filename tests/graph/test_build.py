"""Searches end to end: neighbours against exact ones, whatever the method, the tasks and the interruptions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from schelix_scale.config import GraphConfig
from schelix_scale.errors import GraphError
from schelix_scale.graph import build, found, lists, rounds
from schelix_scale.graph.build import TASK_BYTES, build_neighbors, tasks_at_once
from schelix_scale.graph.descent import Expand, Probe
from schelix_scale.graph.found import FoundFiles
from schelix_scale.graph.knn import Neighbors
from schelix_scale.graph.lists import CellIndex
from schelix_scale.graph.partitions import Breadth
from schelix_scale.graph.rounds import descend, in_cell_order
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
        "distances.npy", "index", "index.json", "indices.npy", "neighbours.json", "search.json",
    ]  # fmt: skip


def test_neither_threads_nor_an_interruption_matter(
    features_nd: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a few lists at the start, so that rounds are needed; the first search stops in the middle of the second.

    Some of its cells are searched by then, and are searched again.
    """
    monkeypatch.setattr(build, "PROBES", 2)
    monkeypatch.setattr(found, "SPANS_A_TASK", 1)
    monkeypatch.setattr(lists, "MIN_CANDIDATES", 2 * K)
    one, _ = build_neighbors(features_nd, tmp_path / "one", IVF, 0, 1, LOTS)
    two, _ = build_neighbors(features_nd, tmp_path / "two", IVF, 0, 2, LOTS)
    np.testing.assert_array_equal(one.indices_nk, two.indices_nk)
    np.testing.assert_array_equal(one.distances_nk, two.distances_nk)

    calls: list[int] = []

    def interrupted(self: Expand, span: tuple[int, int], *maps: Any) -> int:
        calls.append(self.number)
        done = original(self, span, *maps)
        if calls.count(2) == 1:
            raise KeyboardInterrupt
        return done

    original = Expand.search
    monkeypatch.setattr(Expand, "search", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_neighbors(features_nd, tmp_path / "three", IVF, 0, 1, LOTS)
    assert set(calls) == {1, 2}
    monkeypatch.setattr(Expand, "search", original)
    reporter = QuietReporter()
    three, _ = build_neighbors(features_nd, tmp_path / "three", IVF, 0, 1, LOTS, reporter)
    assert any("goes on after round 1" in message for message in reporter.messages)
    np.testing.assert_array_equal(one.indices_nk, three.indices_nk)
    np.testing.assert_array_equal(one.distances_nk, three.distances_nk)


@pytest.mark.parametrize(("enough", "least_gain"), [(0.0, 0.0), (2.0, 2.0)], ids=["enough", "nothing left to widen"])
def test_a_search_that_ended_stays_ended(
    features_nd: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enough: float, least_gain: float
) -> None:
    """Killed before its result was written, it is not searched any further when it goes on."""
    monkeypatch.setattr(rounds, "LEAST_GAIN", least_gain)
    monkeypatch.setattr(rounds, "EXPAND", K)
    index = CellIndex.build(features_nd, tmp_path / "index", 0, 2)
    files, number = descend(index, K, tmp_path / "found", 0, 1.1, enough, 2, QuietReporter(), probes=2)
    assert number == 1
    before = np.array(files.neighbours(1)), np.array(files.scores(1))
    monkeypatch.delattr(Expand, "search")
    files, number = descend(index, K, tmp_path / "found", 0, 1.1, enough, 2, QuietReporter(), probes=2)
    assert number == 1
    for got, expected in zip((files.neighbours(1), files.scores(1)), before, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("budget", "opened"), [(LOTS, 0), (0, 4)], ids=["room", "no room"])
def test_what_is_read_anywhere_is_in_memory_while_the_budget_has_room(
    features_nd: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, opened: int
) -> None:
    """Two tasks for the lists and two for the round open maps each, or share copies in memory; both find the same."""
    monkeypatch.setattr(found, "SPANS_A_TASK", 1)
    index = CellIndex.build(features_nd, tmp_path / "index", 0, 2)
    calls: list[Path] = []
    original = CellIndex.open

    def counted(folder: Path) -> CellIndex:
        calls.append(folder)
        return original(folder)

    looked_at: list[bool] = []

    def watched(task: Expand, span: tuple[int, int], *read: Any) -> int:
        looked_at.extend(isinstance(array, np.memmap) for array in (read[0].vectors_nd, *read[1:]))
        return search(task, span, *read)

    search = Expand.search
    monkeypatch.setattr(CellIndex, "open", counted)
    monkeypatch.setattr(Expand, "search", watched)
    files, number = descend(index, K, tmp_path / "found", 0, 1.1, 0.0, 2, QuietReporter(), probes=2, budget=budget)
    assert (number, len(files.spans()), len(calls)) == (1, 2, opened)
    assert looked_at == [opened > 0] * 6  # of two tasks
    for task in (Probe(index.folder, files, 2), Expand(index.folder, files, 1, rounds.EXPAND, probes=2)):
        round_number = getattr(task, "number", 0)
        before = np.array(files.neighbours(round_number))
        files.neighbours(round_number, "r+")[:] = 0
        for span in files.spans():
            task(span)
        np.testing.assert_array_equal(files.neighbours(round_number), before)


def test_what_a_state_vouches_for_is_on_disk_before_it(
    features_nd: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    build_neighbors(features_nd, tmp_path, IVF, 0, 1, LOTS)
    vouching = {
        "index.partial.json": {"vectors.npy", "centroids.npy", "groups.npy", "starts.npy", "cells.npy", "index"},
        "state.partial.json": {"neighbours-0.bin", "scores-0.bin", "fresh-0.bin"},
        "neighbours.partial.json": {"indices.npy", "distances.npy"},
    }
    for state, files in vouching.items():
        assert files <= set(synced[: synced.index(state)]), state


def test_a_folder_is_that_of_one_search(features_nd: np.ndarray, tmp_path: Path) -> None:
    """Of other features, or another seed, whether it was finished or not: it starts anew; other files stay."""
    (tmp_path / "kept.txt").write_text("")
    build_neighbors(features_nd, tmp_path, IVF, 0, 2, LOTS)
    others = np.roll(features_nd, 1, axis=0)
    found, audit = build_neighbors(others, tmp_path, IVF, 0, 2, LOTS)
    assert audit.recall >= 0.95
    fresh, _ = build_neighbors(others, tmp_path / "fresh", IVF, 0, 2, LOTS)
    np.testing.assert_array_equal(found.indices_nk, fresh.indices_nk)
    (tmp_path / "neighbours.json").unlink()
    index = (tmp_path / "index.json").stat().st_mtime_ns
    build_neighbors(others, tmp_path, IVF, 0, 2, LOTS)
    assert (tmp_path / "index.json").stat().st_mtime_ns == index, "the same search goes on"
    build_neighbors(others, tmp_path, IVF, 1, 2, LOTS)
    assert (tmp_path / "index.json").stat().st_mtime_ns != index
    assert (tmp_path / "kept.txt").exists()


def test_tasks_at_once_fit_into_the_budget() -> None:
    assert tasks_at_once(8, LOTS) == 8
    assert tasks_at_once(8, 2 * 3 * TASK_BYTES) == 3
    assert tasks_at_once(8, 1) == 1


def test_more_lists_are_searched_among_more_cells() -> None:
    assert [build.probes_at_start(n) for n in (1_000, 1_000_000, 5_000_000, 64_000_000)] == [128, 128, 167, 256]


def test_neighbours_of_neighbours_repair_a_poor_start(
    features_nd: np.ndarray, exact: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    """From one of every two of the neighbours, and cells anywhere."""
    index = CellIndex.build(features_nd, tmp_path / "index", 0, 2)
    position_n, rng = np.argsort(index.cells), np.random.default_rng(0)

    def begin(index: CellIndex, files: FoundFiles) -> None:
        for position, row in enumerate(index.cells):
            near = position_n[exact[1][row, ::2]]
            near = near[near != position]  # among more equal cells than neighbours, any may be named
            others = np.setdiff1d(rng.permutation(N), [position, *near])
            found = np.concatenate([near, rng.choice(others, K - len(near), replace=False)])
            scores = index.vectors_nd[found] @ index.vectors_nd[position]
            order = np.argsort(-scores)
            files.neighbours(0, "r+")[position], files.scores(0, "r+")[position] = found[order], scores[order]
        files.fresh(0, "r+")[:] = True

    files, number = descend(index, K, tmp_path / "found", 0, 0.96, 0.96, 2, QuietReporter(), start=begin)
    assert number > 0
    out = np.empty((N, K), np.int32), np.empty((N, K), np.float32)
    in_cell_order(index, files, number, out, 2)
    assert recall(Neighbors(*out, "ivf"), features_nd, exact) >= 0.95


def test_a_low_recall_makes_the_search_go_wider(
    features_nd: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "PROBES", 1)
    monkeypatch.setattr(build, "MORE_PROBES", 100)
    monkeypatch.setattr(lists, "MIN_CANDIDATES", 2 * K)
    monkeypatch.setattr(rounds, "MAX_ROUNDS", 0)
    reporter = QuietReporter()
    _, audit = build_neighbors(features_nd, tmp_path / "wider", IVF, 0, 2, LOTS, reporter)
    assert audit.recall >= 0.95
    assert any("repeated more widely" in message for message in reporter.messages)
    monkeypatch.setattr(build, "MORE_PROBES", 1)
    with pytest.raises(GraphError, match=r"found 0\.\d+ of the exact .* Raise graph\.k"):
        build_neighbors(features_nd, tmp_path / "fails", IVF, 0, 2, LOTS)


def test_a_search_whose_audit_finds_too_little_goes_on_for_rounds(
    features_nd: np.ndarray, exact: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pilot cells may be lucky ones: here they are content with what the lists found."""
    monkeypatch.setattr(build, "PROBES", 6)
    monkeypatch.setattr(lists, "MIN_CANDIDATES", 2 * K)
    monkeypatch.setattr(lists, "LIST_CELLS", 32)
    honest = rounds.Pilot.recall
    monkeypatch.setattr(rounds.Pilot, "recall", lambda *given: honest(*given) + 1)
    reporter = QuietReporter()
    found, audit = build_neighbors(features_nd, tmp_path, IVF, 0, 2, LOTS, reporter)
    assert audit.recall >= 0.95
    assert recall(found, features_nd, exact) >= 0.95
    assert any("goes on for a round" in message for message in reporter.messages)
    assert not any("repeated more widely" in message for message in reporter.messages)


def test_features_that_are_not_finite(features_nd: np.ndarray, tmp_path: Path) -> None:
    broken = features_nd.copy()
    broken[77, 3] = np.nan
    with pytest.raises(GraphError, match="features of cell 77 are not finite"):
        build_neighbors(broken, tmp_path, IVF, 0, 1, LOTS)


def test_too_few_cells(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="k = 15 neighbours need more than 15 cells, got 9"):
        build_neighbors(gaussian_cells(n=9)[0], tmp_path, IVF, 0, 1, LOTS)


def test_numbers_of_more_cells_are_wider() -> None:
    assert cell_dtype(2**31 - 1) == np.int32
    assert cell_dtype(2**31) == np.int64
    assert FoundFiles(Path(), 2**31 + 1, 2)._dtype("neighbours-0") == np.int64


@pytest.mark.slow  # pynndescent compiles for half a minute
def test_pynndescent_in_partitions(
    features_nd: np.ndarray, exact: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In partitions that hardly overlap, and in wider ones as too little was found; by nothing else."""
    from schelix_scale.graph import partitions as module

    config, features_nd = IVF.model_copy(update={"method": "pynndescent"}), features_nd.copy()
    features_nd[5] = features_nd[6] + 0.01  # pynndescent puts a cell at the origin halfway between all others
    monkeypatch.setattr(module, "LEAST_CELLS", 100)
    monkeypatch.setattr(build, "breadths", lambda *_: [Breadth(K, 1, 800), Breadth(2 * K, 9, 2_500)])
    monkeypatch.setattr(rounds, "MAX_ROUNDS", 0)
    monkeypatch.delattr(Probe, "search")  # what is called pynndescent was found by it
    reporter = QuietReporter()
    found, audit = build_neighbors(features_nd, tmp_path / "wider", config, 0, 2, LOTS, reporter)
    assert any("repeated more widely" in message for message in reporter.messages)
    share = recall(found, features_nd, exact)
    assert share >= 0.95
    assert audit.method == "pynndescent"
    assert audit.low - 0.002 <= share <= audit.high + 0.002
