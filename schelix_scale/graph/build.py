"""Features -> audited neighbours: the search that fits the number of cells and the memory, until recall is enough."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from schelix_scale.config import GraphConfig
from schelix_scale.errors import GraphError
from schelix_scale.graph.audit import Audit, audit_recall, require_recall
from schelix_scale.graph.descent import PROBES, FoundFiles, descend, in_cell_order
from schelix_scale.graph.knn import Neighbors, choose_method, find_neighbors, require_cells
from schelix_scale.graph.lists import CellIndex
from schelix_scale.graph.partitions import SearchPartition, partitions, room_for, search_partitions
from schelix_scale.graph.search import SearchProcess
from schelix_scale.graph.vectors import cell_dtype, row_blocks
from schelix_scale.progress import QuietReporter, Reporter
from schelix_scale.publish import create_array, write_json

INDEX, FOUND, DONE = "index", "found", "neighbours.json"
ATTEMPTS = 2
MORE_PROBES = 8
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
    start: Begin | None = None,
) -> tuple[Neighbors, Audit]:
    """Find the ``config.k`` nearest other cells of every cell by cosine, and measure how many were found.

    Parameters
    ----------
    features_nd
        (n, d) features, in memory or a memory map of an .npy file.
    folder
        Where files go: what is found, the index, and the state of a search that is under way, which is continued.
        Exact neighbours of few cells stay in memory.
    config
        Neighbours, method, the recall that is asked for, and the cells it is measured on.
    budget
        Bytes of memory; pynndescent searches partitions where all cells do not fit into it.
    scheduler
        A dask.distributed cluster for the tasks; else threads of this process.
    search
        A process in which pynndescent has compiled already.
    start
        Writes neighbours to start from (`descent.start_from`), for the method ivf.

    Returns
    -------
    Neighbours, memory maps in ``folder`` if it was used, and their audit. An audit below ``config.min_recall`` makes
    the search go wider, once.

    Raises
    ------
    GraphError
        Too few cells, or a recall below ``config.min_recall`` whatever was tried.
    """
    reporter = reporter or QuietReporter()
    n, k = len(features_nd), config.k
    require_cells(n, k)
    for first, last in row_blocks(n):
        finite = np.isfinite(features_nd[first:last]).all(axis=1)
        if not finite.all():
            raise GraphError(f"the features of cell {first + int(np.argmin(finite))} are not finite: check the source.")
    method = choose_method(n, config)
    if method == "exact":
        with reporter.stage("neighbours (exact)", n) as progress:
            exact = find_neighbors(features_nd, k, method, seed, threads, progress.advance)
        return exact, _audited(features_nd, exact, config, seed)
    if not (folder / DONE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with threadpool_limits(1):  # each task is one thread's work
            builder = _Builder(features_nd, folder, config, seed, threads, budget, reporter, scheduler, search)
            builder.build(method, start)
    indices, distances = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("indices", "distances"))
    neighbors = Neighbors(indices, distances, method)
    return neighbors, _audited(features_nd, neighbors, config, seed)


def _audited(features_nd: np.ndarray, neighbors: Neighbors, config: GraphConfig, seed: int) -> Audit:
    audit = audit_recall(features_nd, neighbors, config.audit_cells, seed)
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
    ) -> None:
        self.features, self.folder, self.config, self.seed = features_nd, folder, config, seed
        self.threads, self.budget, self.reporter = threads, budget, reporter
        self.scheduler, self.search = scheduler, search
        self.aim = (1 + config.min_recall) / 2
        self.enough = config.min_recall + 0.15 * (1 - config.min_recall)  # the pilot's error, roughly, above the least

    def build(self, method: str, start: Begin | None) -> None:
        """Search, measure, and search again more widely if that was not enough."""
        index = self._index()
        if method == "pynndescent":
            start = self._by_pynndescent(index)
        names = "indices", "distances"
        kinds = cell_dtype(index.n_cells), np.dtype(np.float32)
        shape = (index.n_cells, self.config.k)
        out = [create_array(self.folder / f"{name}.npy", shape, kind) for name, kind in zip(names, kinds, strict=True)]
        for attempt in range(ATTEMPTS):
            found, probes = self.folder / f"{FOUND}-{attempt}", PROBES * MORE_PROBES**attempt
            files, number = descend(
                index,
                self.config.k,
                found,
                self.seed + attempt,
                self.aim,
                self.enough,
                self.threads,
                self.reporter,
                self.scheduler,
                start,
                probes,
            )
            in_cell_order(index, files, number, out)
            for array in out:
                array.flush()
            audit = audit_recall(self.features, Neighbors(out[0], out[1], method), self.config.audit_cells, self.seed)
            if audit.recall >= self.config.min_recall or attempt + 1 == ATTEMPTS:
                break
            self.reporter.warn(
                f"the neighbour search found {audit.recall:.3f} of the exact neighbours of {audit.cells} cells, less "
                f"than graph.min_recall = {self.config.min_recall}; it is repeated more widely"
            )
            start = None
        write_json(self.folder / DONE, {"method": method, "rounds": number})
        for left in self.folder.glob(f"{FOUND}*"):
            shutil.rmtree(left)

    def _index(self) -> CellIndex:
        """Build the index, or open it if that was done."""
        folder, done = self.folder / INDEX, self.folder / f"{INDEX}.json"
        if done.exists():
            return CellIndex.open(folder)
        with self.reporter.stage("neighbours: index", 2 * len(self.features)) as progress:
            index = CellIndex.build(self.features, folder, self.seed, self.threads, progress.advance)
        write_json(done, {"lists": len(index.lists.centroids_md)})
        return index

    def _by_pynndescent(self, index: CellIndex) -> Begin:
        """Search all cells, or partitions of them, by pynndescent."""
        k, dims = self.config.k, index.vectors_nd.shape[1]
        room = max(room_for(self.budget, dims, k), 0)
        parts = partitions(index, room)
        task = SearchPartition(index.folder, self.folder / f"{FOUND}-parts", k, self.seed, self.threads)

        def process() -> SearchProcess:
            return self.search or SearchProcess(k, dims, self.threads)

        return search_partitions(parts, task, process, self.scheduler, self.reporter)
