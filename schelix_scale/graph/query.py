"""Neighbours of new cells among the cells of a graph, in its index: opened in no time, and safe from several threads.

Nothing is prepared or compiled, and a query changes nothing: what a cell gets does not depend on other queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from schelix_scale.arrays import map_array
from schelix_scale.errors import GraphError
from schelix_scale.graph.descent import GROUP_CELLS
from schelix_scale.graph.lists import CellIndex, NearLists
from schelix_scale.graph.nearest import Hits, distinct, nearest_among, nearest_in_blocks
from schelix_scale.graph.scratch import INDEX
from schelix_scale.graph.threads import one_thread_each
from schelix_scale.graph.vectors import row_blocks, taken, unit_rows
from schelix_scale.scheduling import run_tasks

EXACT_QUERIES, CHECKED_CELLS = 1_000, 64
PROBES = 32  # lists that are searched for a cell
TASK_GROUPS = 64  # groups of queries a task: each is too little work for one
RANKED = 262_144  # neighbours that are ordered in a task
EXPAND = 10  # neighbours whose neighbours in the graph are looked at


@dataclass(frozen=True)
class QueryIndex:
    """The cells of a graph, ready to be searched.

    Attributes
    ----------
    features_nd
        (n, d) features of the graph's cells.
    indices_nk
        (n, k) neighbours in the graph.
    index
        The index of the graph; None if its search was exact: so are queries.
    position_n
        (n,) position of each cell in the index.
    """

    features_nd: np.ndarray
    indices_nk: np.ndarray
    index: CellIndex | None
    position_n: np.ndarray

    @classmethod
    def open(cls, graph: Path, features_nd: np.ndarray) -> Self:
        """Open what was stored with the operator in ``graph`` (``RUN/graph/<operator id>``).

        Parameters
        ----------
        features_nd
            (n, d) features that the graph was built from, in memory or a memory map.

        Raises
        ------
        GraphError
            The features are not those of the graph.
        """
        indices = map_array(graph / "indices.npy")
        index = CellIndex.open(graph / INDEX) if (graph / INDEX).is_dir() else None
        shape = features_nd.shape if index is None else index.vectors_nd.shape
        if len(indices) != len(features_nd) or shape != features_nd.shape:
            raise GraphError(
                f"{graph} is a graph of {len(indices):,} cells, and the features are those of {len(features_nd):,} "
                f"with {features_nd.shape[1]} dimensions. Check the run: schelix verify."
            )
        if index is not None:
            looked = np.linspace(0, index.n_cells - 1, CHECKED_CELLS).astype(np.int64)
            if not np.allclose(index.vectors_nd[looked], unit_rows(features_nd[index.cells[looked]]), atol=1e-6):
                raise GraphError(f"{graph} is a graph of other features. Check the run: schelix verify.")
        return cls(features_nd, indices, index, np.zeros(0, np.int32) if index is None else index.positions())

    @property
    def exact(self) -> bool:
        """Whether queries are searched exactly."""
        return self.index is None

    def query(
        self, features_md: np.ndarray, k: int, threads: int = 1, probes: int = PROBES
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k cells nearest to each of (m, d) features by cosine: row numbers and distances, nearest first.

        ``probes`` lists are searched for a cell: more find more of the nearest, and take longer.

        Returns
        -------
        (m, k) int64 row numbers of cells of the graph, and (m, k) float32 cosine distances.

        Raises
        ------
        GraphError
            There are not k cells, the features have other dimensions, or some are not finite.
        """
        n, d = self.features_nd.shape
        if k > n or features_md.shape[1] != d:
            raise GraphError(
                f"{k} neighbours with {features_md.shape[1]} dimensions were asked of {n} cells with {d}: ask for "
                "fewer neighbours, or make the features with the reference's own projection."
            )
        if not np.isfinite(features_md).all():
            raise GraphError("features that are not finite have no neighbours: check the source of the queries.")
        unit, places = unit_rows(features_md), np.empty((len(features_md), k), np.int64)

        def exactly(span: tuple[int, int]) -> int:
            chosen = slice(*span)
            blocks = ((start, unit_rows(self.features_nd[start:stop])) for start, stop in row_blocks(n))
            places[chosen] = nearest_in_blocks(unit[chosen], blocks, k)[0]
            return span[1] - span[0]

        def in_lists(groups: Sequence[tuple[int, np.ndarray]]) -> int:
            assert self.index is not None
            seen_n, near = np.zeros(n, bool), NearLists(self.index.lists, probes)
            for chosen, queries in groups:
                candidates = self.index.in_lists(chosen, near.of(chosen), k)
                places[queries] = self._search(candidates, unit[queries], k, seen_n)
            return len(groups)

        with one_thread_each():
            if self.index is None:
                run_tasks(exactly, list(row_blocks(len(unit), EXACT_QUERIES)), threads)
            elif len(unit):
                groups = self._groups(unit, threads)
                run_tasks(in_lists, [groups[a:b] for a, b in row_blocks(len(groups), TASK_GROUPS)], threads)
            return self._ranked(unit, places, threads)

    def _groups(self, unit_md: np.ndarray, threads: int) -> list[tuple[int, np.ndarray]]:
        """Return the queries by the list that they are nearest to."""
        assert self.index is not None
        lists, list_m = self.index.lists, np.empty(len(unit_md), np.int32)

        def assign(span: tuple[int, int]) -> int:
            list_m[slice(*span)] = lists.assign(unit_md[slice(*span)])
            return span[1] - span[0]

        run_tasks(assign, list(row_blocks(len(unit_md))), threads)
        order = np.argsort(list_m, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(list_m[order])) + 1)
        return [
            (int(list_m[rows[0]]), rows[start:stop])
            for rows in groups
            for start, stop in row_blocks(len(rows), GROUP_CELLS)
        ]

    def _search(self, candidates: np.ndarray, unit_qd: np.ndarray, k: int, seen_n: np.ndarray) -> np.ndarray:
        """Search candidates, those of the lists near one, then the neighbours in the graph of what was found.

        Candidates and what is returned, (q, k) in no order, are positions in the index.
        ``seen_n`` (n,) is False everywhere, before and after: it tells which positions were searched in the lists, most
        of those neighbours among them, which are not scored again.
        """
        index = self.index
        assert index is not None
        columns, _ = nearest_among(unit_qd, index.vectors_nd, candidates, k)
        found = candidates[columns]
        around = self.position_n[taken(self.indices_nk, index.cells[found[:, :EXPAND]])].reshape(len(found), -1)
        seen_n[candidates] = True
        row_h, place_h = np.nonzero(~seen_n[around])
        seen_n[candidates] = False
        row_h, position_h = np.divmod(distinct(row_h * index.n_cells + around[row_h, place_h]), index.n_cells)
        score_h = np.einsum("hd,hd->h", unit_qd[row_h], taken(index.vectors_nd, position_h))
        score_qk = np.einsum("qd,qkd->qk", unit_qd, taken(index.vectors_nd, found))
        nearer = score_h > score_qk.min(axis=1)[row_h]
        if not nearer.any():
            return np.asarray(found)
        hits = Hits(len(found), k, np.repeat(np.arange(len(found)), k), found.ravel(), score_qk.ravel())
        best = hits.and_more(row_h[nearer], position_h[nearer], score_h[nearer]).best()
        return best.column_h.reshape(found.shape)

    def _ranked(self, unit_md: np.ndarray, places_mk: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
        """Order neighbours by their distances, computed one by one: so they are the same in any company.

        ``places_mk`` are their positions in the index if there is one, else their row numbers.
        """
        index, rows, distances = self.index, np.empty_like(places_mk), np.empty(places_mk.shape, np.float32)

        def rank(span: tuple[int, int]) -> int:
            part = slice(*span)
            found, places = places_mk[part], places_mk[part].ravel()
            if index is None:
                near = unit_rows(taken(self.features_nd, places))
            else:
                near, found = taken(index.vectors_nd, places), taken(index.cells, places).reshape(found.shape)
            away = np.maximum(1 - np.einsum("md,mkd->mk", unit_md[part], near.reshape(*found.shape, -1)), 0)
            order = np.lexsort((found, away), axis=1)
            rows[part] = np.take_along_axis(found, order, axis=1)
            distances[part] = np.take_along_axis(away, order, axis=1)
            return len(found)

        run_tasks(rank, list(row_blocks(len(rows), max(1, RANKED // rows.shape[1]))), threads)
        return rows, distances
