"""Cells in lists -> their nearest neighbours: nearby lists are searched, then the neighbours of neighbours.

The neighbours of a neighbour are likely neighbours (nearest neighbour descent, Dong et al. 2011,
doi:10.1145/1963405.1963487). A round looks at those of all cells of a list at once, as one matrix product; it costs the
same a cell however many cells there are. Rounds go on until the neighbours of a few pilot cells, which are also
searched exactly, are found well enough. Nothing here compiles, and the number of threads does not change what is found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schelix_scale.graph.found import SPAN, FoundFiles
from schelix_scale.graph.lists import CellIndex
from schelix_scale.graph.nearest import BLOCK_CANDIDATES, distinct, nearest_among, nearest_in_blocks
from schelix_scale.graph.vectors import forget, row_blocks, taken
from schelix_scale.progress import Reporter
from schelix_scale.publish import write_json
from schelix_scale.scheduling import run_tasks

PROBES = 128  # lists that are searched for each list
EXPAND = 20  # neighbours of a cell whose neighbours are looked at
GROUP_CELLS = 256  # cells of a list that are searched for at once
MAX_ROUNDS, SLOW_GAIN, LEAST_GAIN = 12, 0.01, 0.002
PILOT_CELLS, PILOT_BLOCK = 600, 300  # and how many are searched in a task
ROUNDING = 2e-6  # of a product of two rows, computed among others
ORDERED = 100_000  # cells a task: their neighbours lie all over the files, which each task maps anew
STATE = "state.json"


@dataclass(frozen=True)
class Probe:
    """A task: search the lists near each list of a span of positions."""

    index: Path
    files: FoundFiles
    probes: int

    def __call__(self, span: tuple[int, int]) -> int:
        """Write the neighbours of the cells at ``span``; return how many cells those are."""
        index, files = CellIndex.open(self.index), self.files
        neighbours, scores, fresh = files.neighbours(0, "r+"), files.scores(0, "r+"), files.fresh(0, "r+")
        for chosen, start, stop in groups(index, span):
            candidates = index.around(chosen, self.probes, files.k)
            columns, values = nearest_among(index.vectors_nd[start:stop], index.vectors_nd, candidates, files.k, start)
            neighbours[start:stop], scores[start:stop] = candidates[columns], values
        fresh[slice(*span)] = True
        files.written(neighbours, scores, fresh)
        return span[1] - span[0]


@dataclass(frozen=True)
class Expand:
    """A task: look at the neighbours of the neighbours of a span of positions.

    Attributes
    ----------
    number
        The round, from 1; it reads what the one before wrote.
    expand
        Neighbours of a cell whose neighbours are looked at.
    everything
        Look at those too that were looked at before.
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
        index, files, last = CellIndex.open(self.index), self.files, self.number - 1
        before, fresh = files.neighbours(last), files.fresh(last)
        after, now_fresh = files.neighbours(self.number, "r+"), files.fresh(self.number, "r+")
        scores, now_scores = files.scores(last), files.scores(self.number, "r+")
        for chosen, start, stop in groups(index, span):
            mine = np.asarray(before[start:stop])
            around = self._around(before, fresh, mine, fresh[start:stop])
            candidates = self._not_searched(index, chosen, around)
            known = np.asarray(scores[start:stop])
            rows, found, values = better(index, start, candidates, mine, known[:, -1])
            after[start:stop], now_scores[start:stop], now_fresh[start:stop] = merged(mine, known, rows, found, values)
        files.written(after, now_scores, now_fresh)
        return span[1] - span[0]

    def _around(self, before: np.ndarray, fresh: np.ndarray, mine: np.ndarray, mine_fresh: np.ndarray) -> np.ndarray:
        """All neighbours of fresh neighbours, and the fresh ones of the others; sorted positions."""
        first, new = mine[:, : self.expand], np.asarray(mine_fresh[:, : self.expand])
        if self.everything:
            new = np.ones_like(new)
        old = distinct(first[~new])
        theirs = taken(before, old)[taken(fresh, old)]
        return distinct(np.concatenate([taken(before, distinct(first[new])).ravel(), theirs]))

    def _not_searched(self, index: CellIndex, chosen: int, positions: np.ndarray) -> np.ndarray:
        """Leave out of sorted positions those in lists that were searched for a list: most are."""
        if not self.probes:
            return positions
        near = index.lists.near(chosen, self.probes)
        change = np.zeros(len(positions) + 1, np.int64)
        np.add.at(change, np.searchsorted(positions, index.starts[near]), 1)
        np.add.at(change, np.searchsorted(positions, index.starts[near + 1]), -1)
        return np.asarray(positions[np.cumsum(change[:-1]) == 0])


def better(
    index: CellIndex, start: int, candidates: np.ndarray, mine_qk: np.ndarray, floor_q: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the candidates (c,) that are nearer to cells than the k-th of their neighbours, and not among them.

    The cells are those at ``start`` and following. Returns hits by cell: number of the cell, position, score.
    """
    unit_qd, parts = np.asarray(index.vectors_nd[start : start + len(mine_qk)]), []
    for a, b in row_blocks(len(candidates), BLOCK_CANDIDATES):
        block = candidates[a:b]
        scores = unit_qd @ taken(index.vectors_nd, block).T
        places = np.flatnonzero(scores > floor_q[:, None])
        row_h, column_h = np.divmod(places, len(block))
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


@dataclass(frozen=True)
class Pilot:
    """Cells whose neighbours are known exactly.

    Attributes
    ----------
    positions
        (m,) where they are.
    limit
        (m,) cosine similarity of the k-th neighbour.
    """

    positions: np.ndarray
    limit: np.ndarray

    @classmethod
    def search(cls, index: CellIndex, k: int, seed: int, workers: int) -> Pilot:
        """Draw cells and search their neighbours exactly."""
        n = index.n_cells
        positions = np.sort(np.random.default_rng([seed, 0x9170]).choice(n, min(PILOT_CELLS, n), replace=False))
        limit = np.empty(len(positions), np.float32)

        def search(span: tuple[int, int]) -> int:
            mine = positions[slice(*span)]
            blocks = ((start, np.asarray(index.vectors_nd[start:stop])) for start, stop in row_blocks(n))
            limit[slice(*span)] = 1 - nearest_in_blocks(index.vectors_nd[mine], blocks, k, mine)[1][:, -1]
            return len(mine)

        run_tasks(search, list(row_blocks(len(positions), PILOT_BLOCK)), workers)
        return cls(positions, limit)

    def recall(self, scores: np.ndarray) -> float:
        """Return how many of the neighbours that were found, with these (n, k) scores, are exact ones."""
        return float((scores[self.positions] >= self.limit[:, None] - ROUNDING).mean())


def descend(
    index: CellIndex,
    k: int,
    folder: Path,
    seed: int,
    aim: float,
    enough: float,
    workers: int,
    reporter: Reporter,
    scheduler: str | None = None,
    start: Callable[[CellIndex, FoundFiles], None] | None = None,
    probes: int = PROBES,
) -> tuple[FoundFiles, int]:
    """Search the k nearest neighbours of all cells; go on where an interrupted search of the same folder stopped.

    Parameters
    ----------
    aim
        Recall of the pilot cells at which the search ends.
    enough
        Recall of the pilot cells at which it ends when another round will bring little more.
    workers
        Threads, without a cluster.
    scheduler
        A dask.distributed cluster, see `scheduling.run_tasks`.
    start
        Writes neighbours to start from as those of round 0; None to search nearby lists.
    probes
        How many lists are searched for each list at the start.

    Returns
    -------
    The files of the search, and the number of its last round.
    """
    files, pilot = FoundFiles(folder, index.n_cells, k, scheduler is not None), Pilot.search(index, k, seed, workers)
    path = folder / STATE

    def go(name: str, task: Probe | Expand) -> None:
        with reporter.stage(name, index.n_cells) as progress:
            run_tasks(task, files.spans(), workers, scheduler, progress.advance)

    def keep(number: int, recall: float, gain: float, expand: int, everything: bool, done: bool) -> None:
        files.sync(number)
        done = done or recall >= aim or number >= MAX_ROUNDS
        told = {"round": number, "recall": recall, "gain": gain}
        write_json(path, {**told, "expand": expand, "everything": everything, "done": done})

    if path.exists():
        state = json.loads(path.read_text())
        if not state["done"]:
            reporter.say(f"neighbour search goes on after round {state['round']} (recall {state['recall']:.3f})")
    else:
        files.create()
        if start is None:
            go("neighbours: nearby lists", Probe(index.folder, files, probes))
        else:
            start(index, files)
        keep(0, pilot.recall(files.scores(0)), 0.0, EXPAND, False, False)
    while not (state := json.loads(path.read_text()))["done"]:
        number, recall, expand = state["round"] + 1, state["recall"], state["expand"]
        searched = 0 if start is not None else probes
        task = Expand(index.folder, files, number, min(expand, k), state["everything"], searched)
        go(f"neighbours: round {number} (recall {recall:.3f})", task)
        now = pilot.recall(files.scores(number))
        gain, before = now - recall, state["gain"]
        expected = gain * min(1.0, max(gain, 0.0) / before) if before else gain  # each brings a like share of the last
        everything = gain < LEAST_GAIN
        done = (now >= enough and expected < SLOW_GAIN) or (everything and expand >= k)
        keep(number, now, gain, expand * 2 if everything else expand, everything, done)
    return files, int(state["round"])


def start_from(indices_nk: np.ndarray) -> Callable[[CellIndex, FoundFiles], None]:
    """Return what starts a search from known neighbours, (n, k) row numbers, such as those of other features."""

    def begin(index: CellIndex, files: FoundFiles) -> None:
        neighbours, scores, fresh = files.neighbours(0, "r+"), files.scores(0, "r+"), files.fresh(0, "r+")
        positions = index.positions()
        for start, stop in row_blocks(index.n_cells, SPAN):
            found = positions[taken(indices_nk, index.cells[start:stop])]
            near = taken(index.vectors_nd, found)
            values = np.einsum("qd,qkd->qk", index.vectors_nd[start:stop], near)
            order = np.argsort(-values, axis=1, kind="stable")
            neighbours[start:stop] = np.take_along_axis(found, order, axis=1)
            scores[start:stop] = np.take_along_axis(values, order, axis=1)
            fresh[start:stop] = True

    return begin


def in_cell_order(index: CellIndex, files: FoundFiles, number: int, out: Sequence[np.ndarray], workers: int) -> None:
    """Write the neighbours of a round by row number into two (n, k) arrays: row numbers and cosine distances."""
    indices, distances = out
    positions, neighbours, scores = index.positions(), files.neighbours(number), files.scores(number)

    def write(span: tuple[int, int]) -> int:
        here = positions[slice(*span)]
        indices[slice(*span)] = index.cells[taken(neighbours, here)]
        distances[slice(*span)] = np.maximum(1 - taken(scores, here), 0)
        forget(indices, distances, neighbours, scores)
        return len(here)

    run_tasks(write, list(row_blocks(index.n_cells, ORDERED)), workers)
