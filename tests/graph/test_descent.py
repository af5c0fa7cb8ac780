"""Tests of the rounds of the neighbour search, against sorted dense products."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from schelix_scale.graph import descent
from schelix_scale.graph.descent import Expand, Probe, better, groups, merged
from schelix_scale.graph.found import FoundFiles
from schelix_scale.graph.lists import CellIndex
from tests.synthetic import gaussian_cells

N, K, PROBES = 3_000, 8, 3


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> CellIndex:
    features_nd = np.asarray(gaussian_cells(n=N, d=10, n_types=5)[0], np.float32)
    return CellIndex.build(features_nd, tmp_path_factory.mktemp("index"), 0, 2, list_cells=20)


def test_hits_are_put_among_the_neighbours(index: CellIndex) -> None:
    """Neighbours among some cells, and then among others too, are those among all."""
    start, rows = 700, 40
    unit_nd = np.asarray(index.vectors_nd, np.float64)
    scores = unit_nd[start : start + rows] @ unit_nd.T
    scores[np.arange(rows), start + np.arange(rows)] = -np.inf
    some, others = np.arange(0, N, 3), np.arange(N)
    first = some[np.argsort(-scores[:, some], axis=1)[:, :K]]
    known = np.take_along_axis(scores, first, axis=1).astype(np.float32)
    hits = better(index, start, others, first, known[:, -1])
    found, values, fresh = merged(first, known, *hits)
    exact = np.argsort(-scores, axis=1)[:, :K]
    np.testing.assert_array_equal(found, exact)
    np.testing.assert_allclose(values, np.take_along_axis(scores, exact, axis=1), atol=2e-6)
    new = [np.isin(row, before, invert=True) for row, before in zip(exact, first, strict=True)]
    np.testing.assert_array_equal(fresh, new)
    assert fresh.any()
    assert not fresh.all()


def test_no_hits_change_nothing(index: CellIndex) -> None:
    mine, known = np.arange(K)[None] + 10, np.full((1, K), 2, np.float32)
    hits = better(index, 0, np.arange(N), mine, known[:, -1])
    found, values, fresh = merged(mine, known, *hits)
    assert (found == mine).all()
    assert (values == known).all()
    assert not fresh.any()
    assert len(better(index, 0, np.arange(0), mine, known[:, -1])[0]) == 0


def test_lists_that_were_searched_are_left_out_without_loss(index: CellIndex, tmp_path: Path) -> None:
    found = []
    for probes in (0, PROBES):
        files = FoundFiles(tmp_path / str(probes), N, K)
        files.create()
        Probe(index.folder, files, PROBES)((0, N))
        task = Expand(index.folder, files, 1, K, probes=probes)
        task((0, N))
        found.append(np.sort(files.neighbours(1), axis=1))
    assert (found[0] != np.sort(FoundFiles(tmp_path / "0", N, K).neighbours(0), axis=1)).any()
    np.testing.assert_array_equal(*found)


def test_a_round_compares_only_with_neighbours_of_neighbours_that_are_in_no_list_that_was_searched(
    index: CellIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, looked = FoundFiles(tmp_path, N, K), []
    files.create()
    Probe(index.folder, files, PROBES)((0, N))

    def recording(index: CellIndex, start: int, candidates: np.ndarray, *others: np.ndarray) -> object:
        looked.append((start, candidates))
        return better(index, start, candidates, *others)

    monkeypatch.setattr(descent, "better", recording)
    Expand(index.folder, files, 1, K, probes=PROBES)((0, N))
    before, expected = files.neighbours(0), []
    for chosen, start, stop in groups(index, (0, N)):
        theirs = np.unique(before[np.unique(before[start:stop])])
        searched = np.isin(
            np.repeat(np.arange(len(index.starts) - 1), np.diff(index.starts)), index.lists.near(chosen, PROBES)
        )
        expected.append((start, np.setdiff1d(theirs, np.flatnonzero(searched))))
    assert [start for start, _ in looked] == [start for start, _ in expected]
    for (_, candidates), (_, wanted) in zip(looked, expected, strict=True):
        np.testing.assert_array_equal(candidates, wanted)
    assert sum(len(wanted) for _, wanted in expected)


def test_the_first_round_leaves_lists_alone_whose_last_lists_brought_little(index: CellIndex, tmp_path: Path) -> None:
    """The others get what they would get anyway; in a round of everything nothing is left alone."""
    unit_nd, files = np.asarray(index.vectors_nd, np.float64), FoundFiles(tmp_path, N, K)
    files.create()
    late_n = np.empty(N)
    for chosen, start, stop in groups(index, (0, N)):
        cells = index.in_lists(chosen, index.lists.near(chosen, PROBES), K)
        scores = unit_nd[start:stop] @ unit_nd[cells].T
        scores[np.arange(start, stop)[:, None] == cells] = -np.inf
        late_n[start:stop] = np.mean(np.argsort(-scores, axis=1)[:, :K] >= len(cells) - len(cells) // 5)
    limit = float(np.median(late_n)) + 1e-9
    settled_n = late_n < limit
    assert 0.2 < settled_n.mean() < 0.8
    found = []
    for settled in (0.0, limit):
        Probe(index.folder, files, PROBES, settled)((0, N))
        before = np.array(files.neighbours(0))
        np.testing.assert_array_equal(files.fresh(0), np.repeat(~settled_n[:, None] | (settled == 0), K, axis=1))
        Expand(index.folder, files, 1, K)((0, N))
        found.append(np.array(files.neighbours(1)))
    assert (found[0][settled_n] != before[settled_n]).any()
    np.testing.assert_array_equal(found[1][settled_n], before[settled_n])
    np.testing.assert_array_equal(found[1][~settled_n], found[0][~settled_n])
    Expand(index.folder, files, 1, K, everything=True)((0, N))
    np.testing.assert_array_equal(files.neighbours(1), found[0])


def test_a_second_round_leaves_lists_alone_in_which_the_first_found_little(
    index: CellIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others get what they would get anyway; in a round of everything nothing is left alone."""
    files = FoundFiles(tmp_path, N, K)
    files.create()
    Probe(index.folder, files, PROBES)((0, N))
    Expand(index.folder, files, 1, K)((0, N))
    list_n = np.repeat(np.arange(len(index.starts) - 1), np.diff(index.starts))
    before, fresh = np.array(files.neighbours(1)), np.array(files.fresh(1))
    share = np.bincount(list_n, fresh.mean(axis=1)) / np.maximum(np.bincount(list_n), 1)
    limit = float(np.median(share[np.diff(index.starts) > 0]))
    left_n = (share < limit)[list_n]
    assert left_n.any()
    assert fresh[left_n].any(), "left alone although something was found"
    found = []
    for least, everything in ((0.0, False), (limit, False), (0.0, True), (limit, True)):
        monkeypatch.setattr(descent, "LEAST_FRESH", least)
        Expand(index.folder, files, 2, K, everything)((0, N))
        found.append((np.array(files.neighbours(2)), np.array(files.fresh(2))))
    for full, partial, old in zip(found[0], found[1], (before, fresh), strict=True):
        assert (full[left_n] != old[left_n]).any()
        np.testing.assert_array_equal(partial[left_n], old[left_n])
        np.testing.assert_array_equal(partial[~left_n], full[~left_n])
    np.testing.assert_array_equal(found[2][0], found[3][0])
    monkeypatch.setattr(descent, "LEAST_FRESH", 2 * limit)
    for kind in (files.neighbours, files.fresh, files.scores):
        kind(2, "r+")[:] = kind(1)
    Expand(index.folder, files, 3, K)((0, N))  # of the same as round 2, and leaves the same alone: half the share
    np.testing.assert_array_equal(files.neighbours(3), found[1][0])
    np.testing.assert_array_equal(files.fresh(3), found[1][1])
