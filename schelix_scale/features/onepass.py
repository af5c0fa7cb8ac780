"""One pass over all cells of a store -> stream features in .npy files, row by row number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schelix_scale.features.streams import Streams
from schelix_scale.genes.normalize import log_normalize
from schelix_scale.stores.base import CellStore
from schelix_scale.stores.checks import check_block
from schelix_scale.stores.values import ValueKind

PASS_SHARE = 0.25  # of the memory budget
BYTES_PER_VALUE = 40
MIN_BLOCK, MAX_BLOCK = 256, 16_384
SCAN_FACTOR = 16


@dataclass(frozen=True)
class OnePass:
    """What every block of the pass needs; picklable, so that blocks can be computed anywhere."""

    store: CellStore
    streams: Streams
    values: ValueKind

    def block(self, start: int, stop: int, batch_n: np.ndarray, targets: dict[str, Path]) -> int:
        """Read cells start:stop, encode them and write their rows; return how many."""
        rows = np.arange(start, stop)
        x_ng = self.store.read(rows)
        check_block(x_ng, rows, self.store, self.values)
        features = self.streams.encode(log_normalize(x_ng, self.values), batch_n)
        for name, path in targets.items():
            np.load(path, mmap_mode="r+")[start:stop] = getattr(features, name)
        return stop - start


def block_size(store: CellStore, budget: int, workers: int) -> int:
    """Cells a block, so that all workers together stay within the budget (bytes)."""
    per_cell = max(store.nonzeros_per_cell, 1.0) * BYTES_PER_VALUE
    limit = MAX_BLOCK * (SCAN_FACTOR if store.row_access == "scan" else 1)
    return int(np.clip(budget / (workers * per_cell), MIN_BLOCK, limit))


def write_features(
    job: OnePass,
    batch_n: np.ndarray,
    targets: dict[str, Path],
    budget: int,
    workers: int,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Fill the existing .npy files ``targets`` (name -> path) as Dask tasks on threads, one writer a row range.

    Raises
    ------
    DataError
        A block holds values that cannot be integrated.
    """
    from dask.base import compute
    from dask.delayed import delayed

    size = block_size(job.store, budget, workers)

    def task(start: int) -> None:
        stop = min(start + size, job.store.n_cells)
        advance(job.block(start, stop, batch_n[start:stop], targets))

    tasks = [delayed(task, pure=False)(start) for start in range(0, job.store.n_cells, size)]
    compute(*tasks, scheduler="threads", num_workers=workers)
