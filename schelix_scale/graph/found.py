"""The files of a neighbour search: what was found in each round, by position in the `lists.CellIndex`.

They are read and written in spans of whole pages: tasks may run on several machines that share a file system.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schelix_scale.graph.vectors import cell_dtype, row_blocks
from schelix_scale.publish import disk_errors, sync

SPAN, SPANS_A_TASK = 4_096, 4  # with any k, a span of any of the files starts on a page
TASKS = 128  # a search of many cells has about so many a round: each maps the files anew
KINDS = "neighbours", "fresh", "scores"


@dataclass(frozen=True)
class FoundFiles:
    """The files of a search: neighbours of each round, which of them are fresh, and their scores.

    Attributes
    ----------
    folder
        Where they are.
    n_cells, k
        Their shape.
    remote
        Whether processes on other machines write them: each then sees to it that others find what it wrote.
    """

    folder: Path
    n_cells: int
    k: int
    remote: bool = False

    def create(self) -> None:
        """Make the files, with their space reserved."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (f"{kind}-{i}" for kind in KINDS for i in (0, 1)):
            self._reserve(name)

    def neighbours(self, number: int, mode: str = "r") -> np.ndarray:
        """Map the positions of neighbours, (n, k), after a round."""
        return self._map(f"neighbours-{number % 2}", mode)

    def fresh(self, number: int, mode: str = "r") -> np.ndarray:
        """Map whether a neighbour is one since this round, (n, k)."""
        return self._map(f"fresh-{number % 2}", mode)

    def scores(self, number: int, mode: str = "r") -> np.ndarray:
        """Map cosine similarities to the neighbours after a round, (n, k) float32, highest first."""
        return self._map(f"scores-{number % 2}", mode)

    def written(self, *arrays: np.ndarray) -> None:
        """Let other machines see what a task wrote to maps."""
        for array in arrays:
            if self.remote and isinstance(array, np.memmap):
                array.flush()

    def sync(self, number: int) -> None:
        """Wait until the files of a round are on disk."""
        for kind in KINDS:
            sync(self.folder / f"{kind}-{number % 2}.bin")

    def spans(self) -> list[tuple[int, int]]:
        """Return what the tasks of a round go through."""
        return list(row_blocks(self.n_cells, SPAN * max(SPANS_A_TASK, self.n_cells // (TASKS * SPAN))))

    def _dtype(self, name: str) -> np.dtype:
        kinds = {"neighbours": cell_dtype(self.n_cells), "fresh": np.dtype(bool), "scores": np.dtype(np.float32)}
        return kinds[name.split("-")[0]]

    def _map(self, name: str, mode: str) -> np.ndarray:
        path = self.folder / f"{name}.bin"
        return np.memmap(path, self._dtype(name), mode, shape=(self.n_cells, self.k))  # type: ignore[call-overload, no-any-return]

    def _reserve(self, name: str) -> None:
        path = self.folder / f"{name}.bin"
        with disk_errors(path), path.open("wb") as file:
            size = self.n_cells * self.k * self._dtype(name).itemsize
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
