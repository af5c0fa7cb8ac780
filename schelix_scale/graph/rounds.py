"""Rounds of a search: nearby lists, then neighbours of neighbours, until pilot cells have enough of their neighbours.

The neighbours of a few pilot cells are also searched exactly. After the lists a round is made unless they found more
than enough, since it brings much; further ones only until what was asked for is found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from schelix_scale.graph.descent import PROBES, Expand, Probe
from schelix_scale.graph.found import FoundFiles
from schelix_scale.graph.lists import CellIndex
from schelix_scale.graph.nearest import nearest_in_blocks
from schelix_scale.graph.vectors import cell_dtype, forget, in_memory, row_blocks, taken
from schelix_scale.progress import Reporter
from schelix_scale.publish import write_json
from schelix_scale.scheduling import run_tasks

EXPAND = 30  # neighbours of a cell whose neighbours are looked at
MAX_ROUNDS, LEAST_GAIN = 12, 0.002
PILOT_CELLS, PILOT_BLOCK = 600, 300  # and how many are searched in a task
HELD_SHARE = 0.4  # of the budget, for what is read at random positions
ROUNDING = 2e-6  # of a product of two rows, computed among others
ORDERED = 100_000  # cells a task: their neighbours lie all over the files, which each task maps anew
STATE = "state.json"


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
    settled: float = 0.0,
    budget: int = 0,
    least: int = 0,
) -> tuple[FoundFiles, int]:
    """Search the k nearest neighbours of all cells; go on where an earlier search of the same folder stopped.

    Parameters
    ----------
    aim
        Recall of the pilot cells at which no round is made.
    enough
        Recall of the pilot cells at which no further round is made.
    workers
        Threads, without a cluster.
    scheduler
        A dask.distributed cluster, see `scheduling.run_tasks`.
    start
        Writes neighbours to start from as those of round 0; None to search nearby lists.
    probes
        How many lists are searched for each list at the start.
    settled
        Which lists need no round after that: see `Probe`.
    budget
        Bytes of memory. If there is room, what is read at random positions is copied into memory, where large
        pages make it quicker; else each task maps it anew.
    least
        Rounds that are made whatever the pilot cells say, unless no further one can find anything.

    Returns
    -------
    The files of the search, and the number of its last round.
    """
    files, path = FoundFiles(folder, index.n_cells, k, scheduler is not None), folder / STATE
    held = index.vectors_nd.itemsize * index.vectors_nd.shape[1] + k * (cell_dtype(index.n_cells).itemsize + 1)
    hold = scheduler is None and files.n_cells * held <= HELD_SHARE * budget
    if hold:
        index = index.in_memory()
    pilot = Pilot.search(index, k, seed, workers)

    def go(name: str, task: Probe | Expand) -> None:
        with reporter.stage(name, index.n_cells) as progress:
            if hold:
                copies = [in_memory(one) for one in task.maps()]
                run_tasks(
                    lambda span: task.search(span, index, *copies), files.spans(), workers, None, progress.advance
                )
            else:
                run_tasks(task, files.spans(), workers, scheduler, progress.advance)

    def keep(number: int, recall: float, expand: int, everything: bool, last: bool) -> None:
        files.sync(number)
        told = {"round": number, "recall": recall, "least": least}
        write_json(path, {**told, "expand": expand, "everything": everything, "last": last})

    def over(state: dict[str, Any]) -> bool:
        number = state["round"]
        found = number >= least and state["recall"] >= (enough if number else aim)
        return bool(found or state["last"] or number >= MAX_ROUNDS)

    if path.exists():
        state = json.loads(path.read_text())
        least = max(least, state["least"])
        if not over(state):
            reporter.say(f"neighbour search goes on after round {state['round']} (recall {state['recall']:.3f})")
    else:
        files.create()
        if start is None:
            go("neighbours: nearby lists", Probe(index.folder, files, probes, settled))
        else:
            start(index, files)
        keep(0, pilot.recall(files.scores(0)), EXPAND, False, False)
    while not over(state := json.loads(path.read_text())):
        number, recall, expand = state["round"] + 1, state["recall"], state["expand"]
        searched = 0 if start is not None else probes
        task = Expand(index.folder, files, number, min(expand, k), state["everything"], searched)
        go(f"neighbours: round {number} (recall {recall:.3f})", task)
        now = pilot.recall(files.scores(number))
        everything = now - recall < LEAST_GAIN
        keep(number, now, expand * 2 if everything else expand, everything, everything and expand >= k)
    return files, int(state["round"])


def in_cell_order(
    index: CellIndex, files: FoundFiles, number: int, out: Sequence[np.ndarray], workers: int, budget: int = 0
) -> None:
    """Write the neighbours of a round by row number into two (n, k) arrays: row numbers and cosine distances.

    Each of the two is copied into memory before, if the budget of bytes has room: see `descend`.
    """
    positions = index.positions()

    def write(found: np.ndarray, to: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> None:
        read = in_memory(found) if found.nbytes <= HELD_SHARE * budget else found

        def write_rows(span: tuple[int, int]) -> int:
            to[slice(*span)] = of(taken(read, positions[slice(*span)]))
            forget(to, read)
            return span[1] - span[0]

        run_tasks(write_rows, list(row_blocks(index.n_cells, ORDERED)), workers)

    write(files.neighbours(number), out[0], lambda rows: index.cells[rows])
    write(files.scores(number), out[1], lambda rows: np.maximum(1 - rows, 0))
