"""Cells in lists -> neighbours by pynndescent, in overlapping partitions that fit into memory.

A partition is a region of lists and, around it, the lists nearest to each of them: so each cell is in the partitions of
its own list and of the lists nearby. Of what the partitions find for a cell the nearest k are kept, on disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schelix_scale.compute import keep_memory_low
from schelix_scale.errors import ConfigError
from schelix_scale.graph.descent import FoundFiles
from schelix_scale.graph.knn import approximate_neighbors
from schelix_scale.graph.lists import CellIndex
from schelix_scale.graph.search import SearchProcess
from schelix_scale.graph.vectors import forget, row_blocks
from schelix_scale.progress import Reporter
from schelix_scale.scheduling import run_tasks

OVERLAP = 3  # lists whose partitions a cell is in, its own counted
BASE_BYTES = 400_000_000  # of the process that searches, with its libraries
LEAST_CELLS = 10_000


def bytes_per_cell(dims: int, k: int) -> int:
    """Memory of pynndescent for a cell, measured at 30 dimensions and 30 neighbours: 1.6 kB."""
    return 16 * dims + 36 * (k + 1)


def room_for(budget: int, dims: int, k: int) -> int:
    """Return how many cells pynndescent can search within a budget of bytes."""
    return (budget - BASE_BYTES) // bytes_per_cell(dims, k)


@dataclass(frozen=True)
class Partition:
    """Positions of cells, sorted, and the number of the partition."""

    number: int
    positions: np.ndarray


def partitions(index: CellIndex, room: int) -> list[Partition]:
    """Cut an index into overlapping partitions of at most ``room`` cells.

    Raises
    ------
    ConfigError
        There is no room for partitions that are worth it.
    """
    if room < min(LEAST_CELLS, index.n_cells):
        raise ConfigError(
            f"graph.method = pynndescent: the memory budget leaves room for partitions of {max(room, 0):,} cells, and "
            f"less than {LEAST_CELLS:,} are not searched well. Raise --max-memory, or use graph.method=ivf."
        )
    m = len(index.lists.centroids_md)
    near = np.stack([np.resize(index.lists.near(chosen)[:OVERLAP], OVERLAP) for chosen in range(m)])
    sizes = np.diff(index.starts)
    regions = _cut(index.lists.centroids_md, near, sizes, np.arange(m), room)
    spans = (index.members(np.unique(near[region])) for region in regions)
    return [Partition(number, np.sort(positions)) for number, positions in enumerate(spans)]


def _cut(
    centroids_md: np.ndarray, near: np.ndarray, sizes: np.ndarray, region: np.ndarray, room: int
) -> Iterator[np.ndarray]:
    """Halve a region of lists along its longest axis until each part and what is around it has room."""
    if sizes[np.unique(near[region])].sum() <= room or len(region) == 1:
        yield region
        return
    rows = centroids_md[region]
    axis = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2][0]
    order = np.argsort(rows @ axis, kind="stable")
    half = np.searchsorted(np.cumsum(sizes[region][order]), sizes[region].sum() / 2)
    half = min(max(int(half), 1), len(region) - 1)
    for part in (order[:half], order[half:]):
        yield from _cut(centroids_md, near, sizes, region[part], room)


@dataclass(frozen=True)
class SearchPartition:
    """A task: search a partition, and write its neighbours, by position, and their distances to a folder."""

    index: Path
    folder: Path
    k: int
    seed: int
    threads: int

    def __call__(self, partition: Partition) -> int:
        """Search in this process; return the number of cells."""
        keep_memory_low()
        unit = np.asarray(CellIndex.open(self.index).vectors_nd[partition.positions])
        self.write(partition, *approximate_neighbors(unit, self.k, self.seed, self.threads))
        return len(unit)

    def write(self, partition: Partition, indices_mk: np.ndarray, distances_mk: np.ndarray) -> None:
        """Write what was found among the rows of the partition."""
        target = self.path(partition)
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".npz", delete=False) as file:
            found = partition.positions[indices_mk]
            np.savez(file, rows=partition.positions, positions=found, scores=1 - distances_mk)
        Path(file.name).rename(target)

    def done(self, partition: Partition) -> bool:
        """Whether the same partition was searched before; with another budget there are others."""
        path = self.path(partition)
        if not path.exists():
            return False
        with np.load(path) as found:
            return bool(np.array_equal(found["rows"], partition.positions))

    def path(self, partition: Partition) -> Path:
        """Return the file of a partition."""
        return self.folder / f"partition-{partition.number:05d}.npz"


def search_partitions(
    parts: list[Partition],
    task: SearchPartition,
    process: Callable[[], SearchProcess],
    scheduler: str | None,
    reporter: Reporter,
) -> Callable[[CellIndex, FoundFiles], None]:
    """Search every partition that was not searched before; return what writes the neighbours to files of a search.

    Without a cluster they are searched one after the other, each on all threads, in the process that ``process`` makes.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    left = [part for part in parts if not task.done(part)]
    total = sum(len(part.positions) for part in parts)
    name = f"neighbours (pynndescent, {len(parts)} partitions)"
    with reporter.stage(name, total) as progress:
        progress.advance(total - sum(len(part.positions) for part in left))
        if scheduler is not None:
            run_tasks(task, left, 1, scheduler, progress.advance)
        elif left:
            with process() as search:
                for part in left:
                    found = search.find(task.index / "vectors.npy", task.seed, task.folder, part.positions)
                    task.write(part, found.indices_nk, found.distances_nk)
                    progress.advance(len(part.positions))

    def begin(index: CellIndex, files: FoundFiles) -> None:
        neighbours, scores, fresh = files.neighbours(0, "r+"), files.scores("r+"), files.fresh(0, "r+")
        for start, stop in row_blocks(index.n_cells):
            neighbours[start:stop], scores[start:stop], fresh[start:stop] = -1, -np.inf, True
        for part in parts:
            with np.load(task.path(part)) as found:
                theirs, values = found["positions"], found["scores"]
            for start, stop in row_blocks(len(theirs)):
                rows = part.positions[start:stop]
                neighbours[rows], scores[rows] = merge(
                    neighbours[rows], scores[rows], theirs[start:stop], values[start:stop]
                )
            forget(neighbours, scores)
        lost = sum(int((neighbours[start:stop] < 0).any(axis=1).sum()) for start, stop in row_blocks(index.n_cells))
        assert not lost, f"{lost} cells are in no partition"

    return begin


def merge(
    numbers_mk: np.ndarray, scores_mk: np.ndarray, more_mk: np.ndarray, more_scores_mk: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k different numbers of highest score of two lists for each row, highest first, and their scores.

    Numbers may be of any size; -1 with a score of -inf stands for none.
    """
    k = numbers_mk.shape[1]
    numbers, scores = np.hstack([numbers_mk, more_mk]), np.hstack([scores_mk, more_scores_mk])
    order = np.lexsort((-scores, numbers), axis=1)
    numbers, scores = (np.take_along_axis(values, order, axis=1) for values in (numbers, scores))
    scores[:, 1:][numbers[:, 1:] == numbers[:, :-1]] = -np.inf
    best = np.lexsort((numbers, -scores), axis=1)[:, :k]
    return np.take_along_axis(numbers, best, axis=1), np.take_along_axis(scores, best, axis=1)
