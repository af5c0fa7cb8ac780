"""Cells in lists -> neighbours by pynndescent, in overlapping partitions that fit into memory.

A partition is a region of lists and, around it, the lists nearest to each of them: so each cell is in the partitions of
its own list and of the lists nearby. Of what the partitions find for a cell the nearest k are kept, on disk. A search
that is repeated, because it found too few, has more lists around each list, and searches more neighbours.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schelix_scale.arrays import load_arrays
from schelix_scale.compute import keep_memory_low
from schelix_scale.errors import ConfigError
from schelix_scale.graph.found import FoundFiles
from schelix_scale.graph.knn import approximate_neighbors
from schelix_scale.graph.lists import CellIndex
from schelix_scale.graph.search import SearchProcess
from schelix_scale.graph.vectors import forget, row_blocks
from schelix_scale.progress import Reporter
from schelix_scale.publish import sync
from schelix_scale.scheduling import run_tasks

OVERLAPS = (3, 9)  # lists whose partitions a cell is in, its own counted; of the first search and of a repeated one
BASE_BYTES = 400_000_000  # of the process that searches, with its libraries
LEAST_CELLS = 10_000
AXIS_CELLS = 10_000  # of a large list, whose longest axis they show


def bytes_per_cell(dims: int, k: int) -> int:
    """Memory of pynndescent for a cell, measured at 30 dimensions and 30 neighbours: 1.6 kB."""
    return 16 * dims + 36 * (k + 1)


def room_for(budget: int, dims: int, k: int) -> int:
    """Return how many cells pynndescent can search within a budget of bytes."""
    return max((budget - BASE_BYTES) // bytes_per_cell(dims, k), 0)


@dataclass(frozen=True)
class Breadth:
    """How widely pynndescent searches: neighbours of a cell, lists around a list, cells of a partition at most."""

    neighbours: int
    overlap: int
    room: int


def breadths(budget: int, n_cells: int, dims: int, k: int) -> list[Breadth]:
    """Return the breadth of a search within a budget of bytes, and of one that is repeated because it found too few.

    Budgets with room for all cells are the same. The repeated search looks for twice the neighbours if there is room.
    """
    first, *others = OVERLAPS
    found = [Breadth(k, first, min(room_for(budget, dims, k), n_cells))]
    for overlap in others:
        room = min(room_for(budget, dims, 2 * k), n_cells)
        more = room >= min(LEAST_CELLS, n_cells) and 2 * k < n_cells
        found.append(Breadth(2 * k, overlap, room) if more else Breadth(k, overlap, found[0].room))
    return found


def require_room(room: int, n_cells: int) -> None:
    """Raise if partitions of ``room`` cells are not worth it.

    Raises
    ------
    ConfigError
        With what to change.
    """
    if room < min(LEAST_CELLS, n_cells):
        raise ConfigError(
            f"graph.method = pynndescent: the memory budget leaves room for partitions of {room:,} cells, and less "
            f"than {LEAST_CELLS:,} are not searched well. Raise --max-memory, or use graph.method=ivf."
        )


@dataclass(frozen=True)
class Partition:
    """Positions of cells, sorted, and the number of the partition."""

    number: int
    positions: np.ndarray


def partitions(index: CellIndex, room: int, overlap: int = OVERLAPS[0], neighbours: int = 30) -> list[Partition]:
    """Cut an index into overlapping partitions of at most ``room`` cells, each with more cells than ``neighbours``.

    Every cell is in one with the cells of its own list, or of its part of a list that is too large for a partition, and
    of the ``overlap`` - 1 nearest others.

    Raises
    ------
    ConfigError
        See `require_room`.
    """
    require_room(room, index.n_cells)
    n, enough = index.n_cells, 2 * (neighbours + 1)
    if room >= n:
        return [Partition(0, np.arange(n))]
    pieces = _Pieces.cut(index, max(1, min(room // overlap, room - enough)))
    near = [pieces.near(number, overlap, enough) for number in range(len(pieces.cells))]
    regions = _regions(pieces, near, np.arange(len(near)), room)
    found = [np.concatenate([pieces.cells[i] for i in _around(near, region)]) for region in regions]
    return [Partition(number, np.sort(positions)) for number, positions in enumerate(found)]


@dataclass(frozen=True)
class _Pieces:
    """Lists, and parts of those that are too large.

    Attributes
    ----------
    index
        The lists.
    cells
        Positions of the cells of each piece.
    first
        (m + 1,) the first piece of each list.
    centroids
        (pieces, d) where they are.
    """

    index: CellIndex
    cells: list[np.ndarray]
    first: np.ndarray
    centroids: np.ndarray

    @classmethod
    def cut(cls, index: CellIndex, most: int) -> _Pieces:
        """Halve lists of more than ``most`` cells until no piece has more."""
        cells: list[np.ndarray] = []
        first, centroids = [0], []
        for chosen, centroid in enumerate(index.lists.centroids_md):
            parts = list(_halved(index, np.arange(index.starts[chosen], index.starts[chosen + 1]), most))
            cells += parts
            first.append(len(cells))
            centroids += [centroid] if len(parts) == 1 else [_some(index, part).mean(axis=0) for part in parts]
        return cls(index, cells, np.array(first), np.stack(centroids))

    def near(self, number: int, overlap: int, enough: int) -> np.ndarray:
        """Return a piece and those nearest to it, ``overlap`` of them, or as many more as have ``enough`` cells."""
        lists = self.index.lists.near(int(np.searchsorted(self.first, number, side="right")) - 1)
        begin, sizes = self.first[lists], np.diff(self.first)[lists]
        others = np.repeat(begin - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
        near = others[np.argsort(self._away(others, number), kind="stable")]
        held = np.cumsum([len(self.cells[i]) for i in near])
        if held[-1] < enough:
            near = np.argsort(self._away(np.arange(len(self.cells)), number), kind="stable")
            held = np.cumsum([len(self.cells[i]) for i in near])
        return np.asarray(near[: max(overlap, int(np.searchsorted(held, enough)) + 1)])

    def _away(self, others: np.ndarray, number: int) -> np.ndarray:
        away = np.square(self.centroids[others] - self.centroids[number]).sum(axis=1)
        away[others == number] = -1
        return np.asarray(away)


def _halved(index: CellIndex, positions: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Halve cells along their longest axis until each part has ``most`` cells at most."""
    if len(positions) <= most:
        yield positions
        return
    rows = _some(index, positions)
    axis = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2][0]
    along = [index.vectors_nd[positions[start:stop]] @ axis for start, stop in row_blocks(len(positions))]
    order = np.argsort(np.concatenate(along), kind="stable")
    for part in np.array_split(order, 2):
        yield from _halved(index, np.sort(positions[part]), most)


def _some(index: CellIndex, positions: np.ndarray) -> np.ndarray:
    return np.asarray(index.vectors_nd[positions[:: -(-len(positions) // AXIS_CELLS)]])


def _around(near: list[np.ndarray], region: np.ndarray) -> np.ndarray:
    return np.unique(np.concatenate([near[number] for number in region]))


def _regions(pieces: _Pieces, near: list[np.ndarray], region: np.ndarray, room: int) -> Iterator[np.ndarray]:
    """Halve a region of pieces along its longest axis until each part and what is around it has room."""
    sizes = np.array([len(pieces.cells[i]) for i in region])
    if sum(len(pieces.cells[i]) for i in _around(near, region)) <= room:
        yield region
        return
    assert len(region) > 1, "a piece and those around it are more than a partition"
    rows = pieces.centroids[region]
    axis = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2][0]
    order = np.argsort(rows @ axis, kind="stable")
    half = min(max(int(np.searchsorted(np.cumsum(sizes[order]), sizes.sum() / 2)), 1), len(region) - 1)
    for part in (order[:half], order[half:]):
        yield from _regions(pieces, near, region[part], room)


@dataclass(frozen=True)
class SearchPartition:
    """A task: search ``neighbours`` in a partition; write the nearest k, by position, with scores to a folder."""

    index: Path
    folder: Path
    k: int
    neighbours: int
    seed: int
    threads: int

    def __call__(self, partition: Partition) -> int:
        """Search in this process; return the number of cells."""
        keep_memory_low()
        unit = np.asarray(CellIndex.open(self.index).vectors_nd[partition.positions])
        self.write(partition, *approximate_neighbors(unit, self.neighbours, self.seed, self.threads))
        return len(unit)

    def write(self, partition: Partition, indices_mk: np.ndarray, distances_mk: np.ndarray) -> None:
        """Write what was found among the rows of the partition; it is on disk before it has its name."""
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".partial", delete=False) as file:
            found = partition.positions[indices_mk[:, : self.k]]
            np.savez(file, rows=partition.positions, positions=found, scores=1 - distances_mk[:, : self.k])
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).rename(self.path(partition))
        sync(self.folder)

    def done(self, partition: Partition) -> bool:
        """Whether the same partition was searched before."""
        path = self.path(partition)
        if not path.exists():
            return False
        return bool(np.array_equal(load_arrays(path, "rows")["rows"], partition.positions))

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

    Without a cluster they are searched one after the other, each on all threads, in the process that ``process`` gives.
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
            search = process()
            for part in left:
                found = search.find(task.index / "vectors.npy", task.seed, task.folder, part.positions, task.neighbours)
                task.write(part, found.indices_nk, found.distances_nk)
                progress.advance(len(part.positions))

    def begin(index: CellIndex, files: FoundFiles) -> None:
        neighbours, scores, fresh = files.neighbours(0, "r+"), files.scores(0, "r+"), files.fresh(0, "r+")
        for start, stop in row_blocks(index.n_cells):
            neighbours[start:stop], scores[start:stop], fresh[start:stop] = -1, -np.inf, True
        for part in parts:
            found = load_arrays(task.path(part), "positions", "scores")
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
