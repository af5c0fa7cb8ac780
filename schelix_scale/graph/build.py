"""Features -> audited neighbours: the search that fits the number of cells and the memory, until recall is enough."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from schelix_scale.arrays import create_array, map_array
from schelix_scale.compute import reused_memory
from schelix_scale.config import GraphConfig
from schelix_scale.graph.audit import Audit, audit_recall, require_recall
from schelix_scale.graph.descent import PROBES
from schelix_scale.graph.found import FoundFiles
from schelix_scale.graph.knn import Neighbors, choose_method, find_neighbors, require_cells
from schelix_scale.graph.lists import CellIndex
from schelix_scale.graph.partitions import (
    Breadth,
    SearchPartition,
    breadths,
    partitions,
    require_room,
    search_partitions,
)
from schelix_scale.graph.rounds import descend, in_cell_order
from schelix_scale.graph.scratch import DONE, FOUND, INDEX, claim, content_hash, search_version
from schelix_scale.graph.search import SearchProcess
from schelix_scale.graph.threads import one_thread_each
from schelix_scale.graph.vectors import cell_dtype, forget
from schelix_scale.progress import QuietReporter, Reporter
from schelix_scale.publish import sync, write_json

ATTEMPTS = 2
MORE_PROBES = 8
MANY_CELLS, GROWTH = 1_000_000, 1 / 6  # above so many cells more lists are searched at the start, by this power
SETTLED = 0.02  # and lists need no round in which the last lists brought less than this share of the neighbours
TASK_BYTES, TASK_SHARE = 150_000_000, 0.5  # of a task of the method ivf, and of the budget for all that run at once
Begin = Callable[[CellIndex, FoundFiles], None]


def build_neighbors(
    features_nd: np.ndarray,
    folder: Path,
    config: GraphConfig,
    seed: int,
    threads: int,
    budget: int,
    reporter: Reporter | None = None,
    scheduler: str | None = None,
    search: SearchProcess | None = None,
) -> tuple[Neighbors, Audit]:
    """Find the ``config.k`` nearest other cells of every cell by cosine, and measure how many were found.

    Parameters
    ----------
    features_nd
        (n, d) features, in memory or a memory map of an .npy file.
    folder
        Where files go: what is found, the index, and the state of a search that is under way, which is continued if it
        is one of the same features and settings. Exact neighbours of few cells stay in memory.
    config
        Neighbours, method, the recall that is asked for, and the cells it is measured on.
    budget
        Bytes of memory; pynndescent searches partitions where all cells do not fit into it, and fewer tasks of the
        method ivf run at once.
    scheduler
        A dask.distributed cluster for the tasks; else threads of this process.
    search
        A process in which pynndescent has compiled already; it is ended with the search.

    Returns
    -------
    Neighbours, memory maps in ``folder`` if it was used, and their audit. An audit below ``config.min_recall`` makes
    the search go wider, once, by the same method.

    Raises
    ------
    GraphError
        Too few cells, features that are not finite, or a recall below ``config.min_recall`` whatever was tried.
    """
    reporter = reporter or QuietReporter()
    n, k = len(features_nd), config.k
    require_cells(n, k)
    content = content_hash(features_nd)
    method = choose_method(n, config)
    if method == "exact":
        with reporter.stage("neighbours (exact)", n) as progress:
            exact = find_neighbors(features_nd, k, method, seed, threads, progress.advance)
        return exact, _required(audit_recall(features_nd, exact, config.audit_cells, seed, threads), config)
    made_from = {
        "features": content,
        "settings": [n, k, method, seed, config.min_recall, config.audit_cells],
        "circumstances": circumstances(features_nd.shape, config, threads, budget),
        **search_version(method),
    }
    if method == "pynndescent":
        require_room(breadths(budget, n, features_nd.shape[1], k)[0].room, n)
    claim(folder, made_from)
    audit = None
    if not (folder / DONE).exists():
        with one_thread_each(), ExitStack() as processes:
            if method == "ivf":  # beside the process of pynndescent there is no room for what is kept
                processes.enter_context(reused_memory())
            if search is not None:
                processes.enter_context(search)
            builder = _Builder(
                features_nd, folder, config, seed, threads, budget, reporter, scheduler, search, processes
            )
            audit = builder.build(method)
    indices, distances = (map_array(folder / f"{name}.npy") for name in ("indices", "distances"))
    neighbors = Neighbors(indices, distances, method)
    audit = audit or audit_recall(features_nd, neighbors, config.audit_cells, seed, threads)
    return neighbors, _required(audit, config)


def circumstances(shape: tuple[int, ...], config: GraphConfig, threads: int, budget: int) -> dict[str, object]:
    """Return what else than features and settings changes which neighbours of (n, d) features are found.

    With pynndescent these are the threads, and how many cells the budget of bytes has room for.
    """
    n, dims = shape
    if choose_method(n, config) != "pynndescent":
        return {}
    rooms = [[breadth.neighbours, breadth.room] for breadth in breadths(budget, n, dims, config.k)]
    return {"threads": threads, "rooms": rooms}


def tasks_at_once(threads: int, budget: int) -> int:
    """Return how many tasks of the method ivf run at once: as many as there are threads, and the budget has room for.

    The memory of a task is bounded whatever the cells are, and what is found does not depend on their number.
    """
    return max(1, min(threads, int(TASK_SHARE * budget) // TASK_BYTES))


def probes_at_start(n_cells: int) -> int:
    """Return how many lists are searched for each list: of more cells they find fewer of the neighbours."""
    return round(PROBES * math.pow(max(1.0, n_cells / MANY_CELLS), GROWTH))


def _required(audit: Audit, config: GraphConfig) -> Audit:
    require_recall(audit, config.min_recall)
    return audit


class _Builder:
    """A search with files in a folder."""

    def __init__(
        self,
        features_nd: np.ndarray,
        folder: Path,
        config: GraphConfig,
        seed: int,
        threads: int,
        budget: int,
        reporter: Reporter,
        scheduler: str | None,
        search: SearchProcess | None,
        processes: ExitStack,
    ) -> None:
        self.features, self.folder, self.config, self.seed = features_nd, folder, config, seed
        self.threads, self.budget, self.reporter = threads, budget, reporter
        self.scheduler, self.search, self.processes = scheduler, search, processes
        self.aim = (1 + config.min_recall) / 2
        self.enough = config.min_recall + 0.1 * (1 - config.min_recall)  # the pilot's error, roughly, above the least

    def build(self, method: str) -> Audit:
        """Search, measure, and search again more widely if that was not enough."""
        index = self._index()
        names = "indices", "distances"
        kinds = cell_dtype(index.n_cells), np.dtype(np.float32)
        shape = (index.n_cells, self.config.k)
        out = [create_array(self.folder / f"{name}.npy", shape, kind) for name, kind in zip(names, kinds, strict=True)]
        for attempt in range(ATTEMPTS):
            audit, number = self._attempt(index, out, attempt, method)
            if audit.recall >= self.config.min_recall or attempt + 1 == ATTEMPTS:
                break
            self.reporter.warn(f"{self._too_few(audit)}; it is repeated more widely")
        for name in names:
            sync(self.folder / f"{name}.npy")
        write_json(self.folder / DONE, {"method": method, "rounds": number, "attempts": attempt + 1})
        for left in self.folder.glob(f"{FOUND}*"):
            shutil.rmtree(left)
        return audit

    def _attempt(self, index: CellIndex, out: list[np.memmap], attempt: int, method: str) -> tuple[Audit, int]:
        """Search and measure, with further rounds while too little was found; return the audit and the last round."""
        room = self.budget if method == "ivf" else 0  # beside the process of pynndescent nothing is held

        def search(least: int) -> tuple[FoundFiles, int]:
            return descend(
                index,
                self.config.k,
                self.folder / f"{FOUND}-{attempt}",
                self.seed + attempt,
                self.aim,
                self.enough,
                tasks_at_once(self.threads, self.budget),
                self.reporter,
                self.scheduler,
                self._by_pynndescent(attempt) if method == "pynndescent" else None,
                probes_at_start(index.n_cells) * MORE_PROBES**attempt,
                SETTLED if index.n_cells > MANY_CELLS else 0.0,
                room,
                least,
            )

        files, number = search(0)
        while True:
            in_cell_order(index, files, number, out, self.threads, room)
            for array in out:
                array.flush()
            found = Neighbors(out[0], out[1], method)
            audit, last = audit_recall(self.features, found, self.config.audit_cells, self.seed, self.threads), number
            if audit.recall < self.config.min_recall:
                self.reporter.say(f"{self._too_few(audit)}; it goes on for a round, if one can find more")
                files, number = search(last + 1)
            if number == last:
                return audit, number

    def _too_few(self, audit: Audit) -> str:
        return (
            f"the neighbour search found {audit.recall:.3f} of the exact neighbours of {audit.cells} cells, less "
            f"than graph.min_recall = {self.config.min_recall}"
        )

    def _index(self) -> CellIndex:
        """Build the index, or open it if that was done."""
        folder, done = self.folder / INDEX, self.folder / f"{INDEX}.json"
        if done.exists():
            return CellIndex.open(folder)
        with self.reporter.stage("neighbours: index", 2 * len(self.features)) as progress:
            index = CellIndex.build(self.features, folder, self.seed, self.threads, progress.advance)
        for file in folder.iterdir():
            sync(file)
        sync(folder)
        write_json(done, {"lists": len(index.lists.centroids_md)})
        return index

    def _by_pynndescent(self, attempt: int) -> Begin:
        """Return what searches all cells, or partitions of them, by pynndescent, and writes what it found."""
        breadth: Breadth = breadths(self.budget, len(self.features), self.features.shape[1], self.config.k)[attempt]
        folder, k, seed = self.folder / f"{FOUND}-parts-{attempt}", self.config.k, self.seed + attempt

        def process() -> SearchProcess:
            if self.search is None:
                self.search = SearchProcess(breadth.neighbours, self.features.shape[1], self.threads)
                self.processes.enter_context(self.search)
            return self.search

        def begin(index: CellIndex, files: FoundFiles) -> None:
            parts = partitions(index, breadth.room, breadth.overlap, breadth.neighbours)
            forget(index.vectors_nd)
            task = SearchPartition(index.folder, folder, k, breadth.neighbours, seed, self.threads)
            search_partitions(parts, task, process, self.scheduler, self.reporter)(index, files)

        return begin
