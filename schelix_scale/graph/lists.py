"""Features -> lists of cells that point in similar directions: the index in which neighbours are searched.

Two levels of k-means on a sample give the lists (an inverted file, Jegou et al. 2011, doi:10.1109/TPAMI.2010.57);
cells are stored list after list, so that what a search reads lies together on disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from threadpoolctl import threadpool_limits

from schelix_scale.arrays import create_array, load_array, map_array
from schelix_scale.graph.vectors import cell_dtype, forget, in_memory, positions_of, row_blocks, taken, unit_rows
from schelix_scale.scheduling import run_tasks

LIST_CELLS, MAX_LISTS = 64, 65_536
SAMPLE_A_LIST, ROUNDS = 20, 8
SAMPLE_A_GROUP = 256
NEAR_GROUPS, ASSIGN_GROUPS = 12, 3  # groups that are looked through for the lists near a list, and for that of a cell
MIN_CANDIDATES = 256
ASSIGN_CELLS, WRITE_CELLS = 100_000, 100_000
ASSIGN_BLOCK = 8_192  # cells that are compared with all groups at once
ARRAYS = ("centroids", "groups", "starts", "cells", "vectors")


@dataclass(frozen=True)
class Lists:
    """Centroids of lists, in groups of lists that are near each other.

    Attributes
    ----------
    centroids_md
        (m, d) float32, those of a group side by side.
    groups
        (g + 1,) where the groups start among the centroids.
    """

    centroids_md: np.ndarray
    groups: np.ndarray

    @cached_property
    def _halves(self) -> np.ndarray:
        return np.asarray(0.5 * np.square(self.centroids_md).sum(axis=1))

    @cached_property
    def _coarse(self) -> tuple[np.ndarray, np.ndarray]:
        """Means of the groups (g, d), and of each the groups nearest to it (g, NEAR_GROUPS), itself first."""
        spans = zip(self.groups[:-1], self.groups[1:], strict=True)
        means = np.stack([self.centroids_md[start:stop].mean(axis=0) for start, stop in spans])
        scores = means @ means.T - 0.5 * np.square(means).sum(axis=1)
        np.fill_diagonal(scores, np.inf)
        return means, np.argsort(-scores, axis=1, kind="stable")[:, :NEAR_GROUPS]

    def _lists_near(self, group: int) -> np.ndarray:
        spans = [np.arange(self.groups[g], self.groups[g + 1]) for g in self._coarse[1][group]]
        return np.concatenate(spans)

    def near(self, chosen: int, most: int | None = None) -> np.ndarray:
        """Return lists from the nearest to list ``chosen``, which is the first, to the farthest that is considered.

        No more than ``most`` of them, if given: quicker than to order all.
        """
        return np.asarray(self.near_each(chosen, chosen + 1, most)[0])

    def near_each(self, first: int, last: int, most: int | None = None) -> np.ndarray:
        """Return what `near` does of each list from ``first`` to ``last``, all of one group: (last - first, p)."""
        group = int(np.searchsorted(self.groups, first, side="right")) - 1
        others = np.sort(self._lists_near(group))
        distances = self._halves[others] - self.centroids_md[first:last] @ self.centroids_md[others].T
        rows = np.arange(last - first)
        distances[rows, np.searchsorted(others, first + rows)] = -np.inf
        kept = np.broadcast_to(np.arange(len(others)), distances.shape)
        if most is not None and most < len(others):
            kept = np.sort(np.argpartition(distances, most - 1, axis=1)[:, :most], axis=1)
        order = np.argsort(np.take_along_axis(distances, kept, axis=1), axis=1, kind="stable")
        return np.asarray(others[np.take_along_axis(kept, order, axis=1)])

    def assign(self, unit_md: np.ndarray) -> np.ndarray:
        """Return the list (m,) int32 whose centroid is nearest to each of the unit rows (m, d)."""
        best_m, chosen = np.full(len(unit_md), -np.inf, np.float32), np.zeros(len(unit_md), np.int32)
        for group_m in self._groups_near(unit_md):
            order = np.argsort(group_m, kind="stable")
            found, begin = np.unique(group_m[order], return_index=True)
            for group, rows in zip(found, np.split(order, begin[1:]), strict=True):
                start, stop = self.groups[group], self.groups[group + 1]
                scores = taken(unit_md, rows) @ self.centroids_md[start:stop].T - self._halves[start:stop]
                nearest = scores.argmax(axis=1)
                values = scores[np.arange(len(rows)), nearest]
                better = values > best_m[rows]
                best_m[rows[better]], chosen[rows[better]] = values[better], start + nearest[better]
        return chosen

    def _groups_near(self, unit_md: np.ndarray) -> np.ndarray:
        """Return the groups (ASSIGN_GROUPS, m) whose means are nearest to each of the unit rows, nearest first."""
        means, _ = self._coarse
        halves = 0.5 * np.square(means).sum(axis=1)
        near = np.empty((min(ASSIGN_GROUPS, len(means)), len(unit_md)), np.int16)
        for start, stop in row_blocks(len(unit_md), ASSIGN_BLOCK):
            scores, rows = unit_md[start:stop] @ means.T - halves, np.arange(stop - start)
            for groups in near[:, start:stop]:
                groups[:] = scores.argmax(axis=1)
                scores[rows, groups] = -np.inf
        return near


class NearLists:
    """The lists near each list, computed for a group of lists at once: most of it is overhead.

    They are the same whichever lists are asked for, and are quickest asked for in order. Not safe from several threads.

    Parameters
    ----------
    lists
        All lists.
    probes
        How many near each one.
    """

    def __init__(self, lists: Lists, probes: int) -> None:
        self._lists, self._probes = lists, probes
        self._first, self._near = 0, np.empty((0, probes), np.int64)

    def of(self, chosen: int) -> np.ndarray:
        """Return the lists nearest to one, itself first."""
        if not 0 <= chosen - self._first < len(self._near):
            group = int(np.searchsorted(self._lists.groups, chosen, side="right"))
            self._first, stop = self._lists.groups[group - 1 : group + 1].tolist()
            self._near = self._lists.near_each(self._first, stop, self._probes)
        return np.asarray(self._near[chosen - self._first])


def fit_lists(features_nd: np.ndarray, seed: int, workers: int, list_cells: int = LIST_CELLS) -> Lists:
    """Cluster a sample of the rows of (n, d) features, by direction, into about n / ``list_cells`` lists."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    n = len(features_nd)
    wanted = min(MAX_LISTS, max(1, n // list_cells))
    rng = np.random.default_rng([seed, 0x115])
    size = min(n, SAMPLE_A_LIST * wanted)
    sample = unit_rows(taken(features_nd, np.sort(rng.choice(n, size, replace=False))))
    group_s = np.empty(size, np.int32)

    def cluster(rows: np.ndarray, k: int) -> KMeans:
        return KMeans(k, init="random", n_init=1, max_iter=ROUNDS, random_state=seed).fit(rows)

    n_groups = max(1, round(wanted**0.5))
    parts: list[np.ndarray] = [np.empty(0)] * n_groups

    def place(span: tuple[int, int]) -> int:
        with threadpool_limits(1, user_api="openmp"):  # limits of OpenMP hold for the thread that sets them
            group_s[slice(*span)] = groups.predict(sample[slice(*span)])
        return span[1] - span[0]

    def split(group: int) -> int:
        rows = sample[group_s == group]
        k = min(len(rows), max(1, round(wanted * len(rows) / size)))
        with threadpool_limits(1, user_api="openmp"):
            parts[group] = cluster(rows, k).cluster_centers_.astype(np.float32) if k else rows
        return len(rows)

    with warnings.catch_warnings():  # identical cells make fewer clusters: a list without cells does no harm
        warnings.simplefilter("ignore", ConvergenceWarning)
        groups = cluster(sample[:: max(1, size // (SAMPLE_A_GROUP * n_groups))], n_groups)
        run_tasks(place, list(row_blocks(size, ASSIGN_CELLS)), workers)
        run_tasks(split, range(n_groups), workers)
    parts = [part for part in parts if len(part)]
    return Lists(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))


@dataclass(frozen=True)
class CellIndex:
    """Cells in the order of their lists.

    Attributes
    ----------
    folder
        Where it is stored.
    lists
        The lists' centroids.
    starts
        (m + 1,) position at which each list starts.
    cells
        (n,) row number of the cell at each position.
    vectors_nd
        (n, d) memory map of the features of the cells at each position, scaled to norm 1.
    """

    folder: Path
    lists: Lists
    starts: np.ndarray
    cells: np.ndarray
    vectors_nd: np.ndarray

    @property
    def n_cells(self) -> int:
        """Number of cells, n."""
        return len(self.cells)

    def in_memory(self) -> CellIndex:
        """Return the same with the vectors in memory."""
        return replace(self, vectors_nd=in_memory(self.vectors_nd))

    def positions(self) -> np.ndarray:
        """Return the position (n,) of each row number."""
        return positions_of(self.cells)

    def members(self, lists: np.ndarray) -> np.ndarray:
        """Return the positions of the cells in lists, list after list as they are given."""
        begin = self.starts[lists]
        sizes = self.starts[lists + 1] - begin
        before = np.cumsum(sizes) - sizes
        return np.asarray(np.repeat(begin - before, sizes) + np.arange(sizes.sum()))

    def in_lists(self, chosen: int, near: np.ndarray, k: int) -> np.ndarray:
        """Return positions of the cells of ``near``, the lists nearest to one, or of more lists if k need that."""
        probes, least = len(near), max(4 * k, MIN_CANDIDATES)
        if (self.starts[near + 1] - self.starts[near]).sum() < least:
            near = self.lists.near(chosen)
            held = np.cumsum(self.starts[near + 1] - self.starts[near])
            near = near[: max(probes, int(np.searchsorted(held, least)) + 1)]
        candidates = self.members(near)
        return candidates if len(candidates) > k else np.arange(self.n_cells)

    @classmethod
    def build(
        cls,
        features_nd: np.ndarray,
        folder: Path,
        seed: int,
        workers: int,
        advance: Callable[[int], None] = lambda _: None,
        list_cells: int = LIST_CELLS,
    ) -> Self:
        """Write the index of (n, d) features into ``folder``; ``advance`` goes through 2 n cells."""
        folder.mkdir(parents=True, exist_ok=True)
        n, d = features_nd.shape
        lists = fit_lists(features_nd, seed, workers, list_cells)
        list_n = np.empty(n, np.int32)

        def assign(span: tuple[int, int]) -> int:
            start, stop = span
            list_n[start:stop] = lists.assign(unit_rows(features_nd[start:stop]))
            return stop - start

        run_tasks(assign, list(row_blocks(n, ASSIGN_CELLS)), workers, advance=advance)
        cells = np.argsort(list_n, kind="stable").astype(cell_dtype(n))
        starts = np.searchsorted(list_n[cells], np.arange(len(lists.centroids_md) + 1))
        vectors = create_array(folder / "vectors.npy", (n, d), np.float32)

        def write(span: tuple[int, int]) -> int:
            start, stop = span
            vectors[start:stop] = unit_rows(taken(features_nd, cells[start:stop]))
            forget(vectors, features_nd)
            return stop - start

        run_tasks(write, list(row_blocks(n, WRITE_CELLS)), workers, advance=advance)
        vectors.flush()
        small = {"centroids": lists.centroids_md, "groups": lists.groups, "starts": starts, "cells": cells}
        for name, values in small.items():
            np.save(folder / f"{name}.npy", values)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open the index in ``folder``; vectors stay on disk."""
        centroids, groups, starts = (load_array(folder / f"{name}.npy") for name in ARRAYS[:3])
        cells, vectors = (map_array(folder / f"{name}.npy") for name in ARRAYS[3:])
        return cls(folder, Lists(centroids, groups), starts, np.asarray(cells), vectors)
