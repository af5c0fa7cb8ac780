"""Cells in lists -> nearer neighbours: nearby lists are searched, then the neighbours of neighbours.

The neighbours of a neighbour are likely neighbours (nearest neighbour descent, Dong et al. 2011,
doi:10.1145/1963405.1963487). A round looks at those of all cells of a list at once, as one matrix product; it costs the
same a cell however many cells there are. Nothing here compiles, and the number of threads does not change what is
found. What makes the rounds is in `rounds`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schelix_scale.graph.found import FoundFiles
from schelix_scale.graph.lists import CellIndex, NearLists
from schelix_scale.graph.nearest import BLOCK_CANDIDATES, distinct, nearest_among
from schelix_scale.graph.vectors import row_blocks, taken

PROBES = 128  # lists that are searched for each list
LEAST_FRESH = 0.2  # share of fresh neighbours in a list that the second round looks at; the next ones halve it
LATE = 5  # the last fifth of the cells that are searched for a list
GROUP_CELLS = 256  # cells of a list that are searched for at once


@dataclass(frozen=True)
class Probe:
    """A task: search the lists near each list of a span of positions.

    Attributes
    ----------
    probes
        How many lists are searched for each.
    settled
        A list is left alone by rounds, as if it had no fresh neighbours, if a smaller share of its neighbours than this
        was found in the last fifth of the cells that were searched: there is little that it lacks.
    """

    index: Path
    files: FoundFiles
    probes: int
    settled: float = 0.0

    def __call__(self, span: tuple[int, int]) -> int:
        """Write the neighbours of the cells at ``span``; return how many cells those are."""
        return self.search(span, CellIndex.open(self.index))

    def maps(self) -> tuple[()]:
        """Map what is read at any position, but for the index."""
        return ()

    def search(self, span: tuple[int, int], index: CellIndex) -> int:
        """Do the task with an index that is open."""
        files = self.files
        neighbours, scores, fresh = files.neighbours(0, "r+"), files.scores(0, "r+"), files.fresh(0, "r+")
        near = NearLists(index.lists, self.probes)
        for chosen, start, stop in groups(index, span):
            candidates = index.in_lists(chosen, near.of(chosen), files.k)
            columns, values = nearest_among(index.vectors_nd[start:stop], index.vectors_nd, candidates, files.k, start)
            neighbours[start:stop], scores[start:stop] = candidates[columns], values
            late = np.mean(columns >= len(candidates) - len(candidates) // LATE)
            fresh[start:stop] = late >= self.settled
        files.written(neighbours, scores, fresh)
        return span[1] - span[0]


@dataclass(frozen=True)
class Expand:
    """A task: look at the neighbours of the neighbours of a span of positions.

    Attributes
    ----------
    number
        The round, from 1; it reads what the one before wrote. Lists without fresh neighbours are left alone, and from
        the second round on those in whose cells the one before found little: most of what is left to be found is in
        the others. Their fresh neighbours stay so.
    expand
        Neighbours of a cell whose neighbours are looked at.
    everything
        Look at those too that were looked at before, and at all lists.
    probes
        Lists that were searched for each list at the start, if any: all their cells have been compared.
    """

    index: Path
    files: FoundFiles
    number: int
    expand: int
    everything: bool = False
    probes: int = 0

    def __call__(self, span: tuple[int, int]) -> int:
        """Write the neighbours of the cells at ``span``; return how many cells those are."""
        return self.search(span, CellIndex.open(self.index), *self.maps())

    def maps(self) -> tuple[np.ndarray, np.ndarray]:
        """Map what is read at any position, but for the index: neighbours, and which of them are fresh."""
        last = self.number - 1
        return self.files.neighbours(last), self.files.fresh(last)

    def search(self, span: tuple[int, int], index: CellIndex, before: np.ndarray, fresh: np.ndarray) -> int:
        """Do the task with an index that is open, and with `maps` or copies of them."""
        files, last = self.files, self.number - 1
        least = 0.0 if self.everything or self.number == 1 else LEAST_FRESH / 2 ** (self.number - 2)
        after, now_fresh = files.neighbours(self.number, "r+"), files.fresh(self.number, "r+")
        scores, now_scores = files.scores(last), files.scores(self.number, "r+")
        near, compared_n = NearLists(index.lists, self.probes) if self.probes else None, np.zeros(index.n_cells, bool)
        for chosen, start, stop in groups(index, span):
            mine, mine_fresh, known = (np.asarray(array[start:stop]) for array in (before, fresh, scores))
            if not self.everything and (mine_fresh.mean() < least or not mine_fresh.any()):
                after[start:stop], now_scores[start:stop], now_fresh[start:stop] = mine, known, mine_fresh
                continue
            compared = np.empty(0, np.int64) if near is None else index.members(near.of(chosen))
            compared_n[compared] = True
            around = self._around(before, fresh, mine, mine_fresh, compared_n)
            compared_n[compared] = False
            rows, found, values = better(index, start, around, mine, known[:, -1])
            after[start:stop], now_scores[start:stop], now_fresh[start:stop] = merged(mine, known, rows, found, values)
        files.written(after, now_scores, now_fresh)
        return span[1] - span[0]

    def _around(
        self,
        before: np.ndarray,
        fresh: np.ndarray,
        mine: np.ndarray,
        mine_fresh: np.ndarray,
        compared_n: np.ndarray,
    ) -> np.ndarray:
        """All neighbours of fresh neighbours, and the fresh ones of the others: sorted positions not yet compared."""
        first, new = mine[:, : self.expand], mine_fresh[:, : self.expand]
        if self.everything:
            new = np.ones_like(new)
        old = distinct(first[~new])
        theirs = taken(before, old)[taken(fresh, old)]
        around = np.concatenate([taken(before, distinct(first[new])).ravel(), theirs])
        return distinct(around[~taken(compared_n, around)])  # most were: to look that up is quicker than to sort them


def better(
    index: CellIndex, start: int, candidates: np.ndarray, mine_qk: np.ndarray, floor_q: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the candidates (c,) that are nearer to cells than the k-th of their neighbours, and not among them.

    The cells are those at ``start`` and following. Returns hits by cell: number of the cell, position, score.
    """
    unit_qd, parts = np.asarray(index.vectors_nd[start : start + len(mine_qk)]), []
    for a, b in row_blocks(len(candidates), BLOCK_CANDIDATES):
        block = candidates[a:b]
        scores = taken(index.vectors_nd, block) @ unit_qd.T
        places = np.flatnonzero(scores > floor_q)
        column_h, row_h = np.divmod(places, len(unit_qd))
        parts.append((row_h, block[column_h], scores.ravel()[places]))
    if not parts:
        return np.empty(0, np.int64), np.empty(0, mine_qk.dtype), np.empty(0, np.float32)
    rows, found, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    new = (found != start + rows) & ~_among(rows, found, mine_qk, index.n_cells)
    order = np.argsort(rows[new], kind="stable")
    return rows[new][order], found[new][order], values[new][order]


def merged(
    mine_qk: np.ndarray, known_qk: np.ndarray, rows: np.ndarray, found: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put hits, by row, among neighbours (q, k) and their scores, highest first; also return which are new."""
    k = mine_qk.shape[1]
    places, scores, fresh = np.array(mine_qk), np.array(known_qk), np.zeros(mine_qk.shape, bool)
    changed, first, count = np.unique(rows, return_index=True, return_counts=True)
    if len(changed):
        of_row = np.repeat(np.arange(len(changed)), count)
        column = k + np.arange(len(rows)) - first[of_row]
        wide = np.full((len(changed), k + count.max()), -np.inf, np.float32)
        which = np.zeros(wide.shape, mine_qk.dtype)
        wide[:, :k], which[:, :k] = known_qk[changed], mine_qk[changed]
        wide[of_row, column], which[of_row, column] = values, found
        order = np.argsort(-wide, axis=1, kind="stable")[:, :k]
        scores[changed] = np.take_along_axis(wide, order, axis=1)
        places[changed] = np.take_along_axis(which, order, axis=1)
        fresh[changed] = order >= k
    return places, scores, fresh


def groups(index: CellIndex, span: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """Cut a span of positions into parts of one list: yield the list, and where the part starts and stops."""
    start, stop = span
    chosen = int(np.searchsorted(index.starts, start, side="right")) - 1
    while start < stop:
        end = min(int(index.starts[chosen + 1]), stop)
        for a, b in row_blocks(max(end - start, 0), GROUP_CELLS):
            yield chosen, start + a, start + b
        start, chosen = max(start, end), chosen + 1


def _among(rows: np.ndarray, found: np.ndarray, mine_qk: np.ndarray, n_cells: int) -> np.ndarray:
    """Whether each hit, ``found`` for a row, is in that row of ``mine``."""
    known = np.sort(mine_qk + np.arange(len(mine_qk), dtype=np.int64)[:, None] * n_cells, axis=None)
    keys = found + rows * n_cells
    place = np.minimum(np.searchsorted(known, keys), known.size - 1)
    return np.asarray(known[place] == keys)
