"""Neighbours of new cells: against exact ones, alone and in company, from several threads at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_info, threadpool_limits

from schelix_scale.config import GraphConfig
from schelix_scale.errors import GraphError
from schelix_scale.graph.build import build_neighbors
from schelix_scale.graph.query import EXPAND, QueryIndex
from schelix_scale.graph.scratch import INDEX
from schelix_scale.graph.threads import one_thread_each
from tests.synthetic import gaussian_cells

N, M, K, D = 5_000, 300, 12, 12


@pytest.fixture(scope="module")
def cells() -> tuple[np.ndarray, np.ndarray]:
    """Features of the graph's cells, and of new ones of the same kinds."""
    z_nd = np.asarray(gaussian_cells(n=N + M, d=D, n_types=6)[0], np.float32)
    return z_nd[:N], z_nd[N:]


@pytest.fixture(scope="module", params=["ivf", "exact"])
def reference(
    request: pytest.FixtureRequest, cells: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> QueryIndex:
    building, graph = (tmp_path_factory.mktemp(request.param) for _ in range(2))
    found, _ = build_neighbors(cells[0], building, GraphConfig(method=request.param, k=15), 0, 2, 10**12)
    np.save(graph / "indices.npy", found.indices_nk)
    if request.param == "ivf":
        shutil.copytree(building / INDEX, graph / INDEX)
    return QueryIndex.open(graph, cells[0])


def test_new_cells_find_their_neighbours(reference: QueryIndex, cells: tuple[np.ndarray, np.ndarray]) -> None:
    rows, distances = reference.query(cells[1], K, threads=2)
    search = NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute").fit(cells[0].astype(np.float64))
    exact, indices = search.kneighbors(cells[1].astype(np.float64))
    recall = (distances <= exact[:, -1:] + 1e-6).mean()
    assert recall >= (1 if reference.exact else 0.97)
    if reference.exact:
        np.testing.assert_array_equal(rows, indices)
    a, b = cells[1] / np.linalg.norm(cells[1], axis=1, keepdims=True), cells[0][rows]
    named = 1 - np.einsum("md,mkd->mk", a, b / np.linalg.norm(b, axis=2, keepdims=True))
    np.testing.assert_allclose(distances, named, atol=1e-6)
    assert (np.diff(distances, axis=1) >= 0).all()


def test_cells_of_the_graph_find_themselves(reference: QueryIndex, cells: tuple[np.ndarray, np.ndarray]) -> None:
    rows, distances = reference.query(cells[0][:200], 3)
    assert (rows[:, 0] == np.arange(200)).mean() == 1
    assert distances[:, 0].max() < 1e-6


def test_answers_do_not_depend_on_the_company(reference: QueryIndex, cells: tuple[np.ndarray, np.ndarray]) -> None:
    together, distances = reference.query(cells[1], K)
    shuffled = np.random.default_rng(0).permutation(M)
    rows, _ = reference.query(cells[1][shuffled], K, threads=2)
    np.testing.assert_array_equal(rows, together[shuffled])
    alone = [reference.query(cells[1][[i]], K) for i in range(0, M, 10)]
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in alone]), together[::10])
    np.testing.assert_array_equal(np.concatenate([away for _, away in alone]), distances[::10])


def test_threads_get_their_own_answers(reference: QueryIndex, cells: tuple[np.ndarray, np.ndarray]) -> None:
    parts = np.array_split(np.arange(M), 12)
    expected = [reference.query(cells[1][part], K)[0] for part in parts]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda part: reference.query(cells[1][part], K)[0], parts * 3))
    for one, other in zip(found, expected * 3, strict=True):
        np.testing.assert_array_equal(one, other)


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


@pytest.fixture
def three_threads() -> Iterator[None]:
    """Libraries that use three threads, as a thread that has ended has set them: any other one may change that."""
    before = max(blas_threads())
    for number in (3, before):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(threadpool_limits, number, "blas").result()
        if number == 3:
            yield


@pytest.mark.usefixtures("three_threads")
def test_queries_that_overlap_leave_the_threads_as_they_were() -> None:
    """The first one to come is the first one to go."""
    first_in, both_in, first_gone = Event(), Barrier(2), Event()

    def first() -> set[int]:
        with one_thread_each():
            first_in.set()
            both_in.wait(10)
            found = blas_threads()
        first_gone.set()
        return found

    def last() -> None:
        assert first_in.wait(10)
        with one_thread_each():
            both_in.wait(10)
            assert first_gone.wait(10)

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(first), pool.submit(last)]
    assert [future.result() for future in found] == [{1}, None]
    assert blas_threads() == {3}
    with pytest.raises(RuntimeError, match="fails"), one_thread_each():
        raise RuntimeError("fails")
    assert blas_threads() == {3}


@pytest.mark.usefixtures("three_threads")
def test_queries_from_many_threads_leave_the_threads_as_they_were(
    reference: QueryIndex, cells: tuple[np.ndarray, np.ndarray]
) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: reference.query(cells[1][i : i + 9], K), range(0, 90, 3)))
    assert blas_threads() == {3}


def test_what_cannot_be_asked(reference: QueryIndex, cells: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="were asked of 5000 cells with 12"):
        reference.query(cells[1][:, :5], K)
    assert reference.query(cells[1][:0], K)[0].shape == (0, K)
    np.save(tmp_path / "indices.npy", np.asarray(reference.indices_nk))
    if reference.index is not None:
        shutil.copytree(reference.index.folder, tmp_path / INDEX)
        with pytest.raises(GraphError, match="is a graph of other features"):
            QueryIndex.open(tmp_path, cells[0][::-1])
    with pytest.raises(GraphError, match="graph of 5,000 cells, and the features are those of 4,000"):
        QueryIndex.open(tmp_path, cells[0][:4_000])


class Counting(np.ndarray):
    """An array that counts the rows that are read of it."""

    rows = 0

    def __getitem__(self, key: object) -> np.ndarray:
        return self._counted(np.asarray(self).__getitem__(key))

    def take(self, rows: np.ndarray, axis: int) -> np.ndarray:
        return self._counted(np.asarray(self).take(rows, axis))

    def _counted(self, found: np.ndarray) -> np.ndarray:
        Counting.rows += found.size // self.shape[1]
        return np.asarray(found)


@pytest.mark.parametrize("reference", ["ivf"], indirect=True)  # an exact search has no lists
def test_the_graph_adds_its_neighbours_and_only_those_are_scored(
    reference: QueryIndex, cells: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one cell at a time, in float64, by sets of cells."""
    index = reference.index
    assert index is not None
    unit_n, unit_m = (part / np.linalg.norm(part.astype(float), axis=1, keepdims=True) for part in cells)
    counted, read = replace(reference, index=replace(index, vectors_nd=index.vectors_nd.view(Counting))), 0
    monkeypatch.setattr(Counting, "rows", 0)
    rows, _ = counted.query(cells[1], K, probes=1)
    better = 0
    groups = reference._groups(np.asarray(unit_m, np.float32), 1)
    for chosen, queries in groups:
        searched = index.cells[index.in_lists(chosen, index.lists.near(chosen, 1), K)]
        read += len(searched)
        for query in queries:
            first = searched[np.argsort(-(unit_n[searched] @ unit_m[query]))[:K]]
            new = np.setdiff1d(reference.indices_nk[first[:EXPAND]], searched)
            both = np.r_[first, new]
            expected = both[np.argsort(-(unit_n[both] @ unit_m[query]))[:K]]
            assert set(rows[query]) == set(expected)
            better += len(set(expected) - set(first))
            read += K + len(new) + K  # the last ones once more, to order them
    assert Counting.rows == read
    assert better > 0
