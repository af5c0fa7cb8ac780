"""One pass over all cells of a store -> stream features in .npy files, row by row number."""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from schelix_scale.arrays import map_array
from schelix_scale.errors import RunError
from schelix_scale.features.streams import Streams
from schelix_scale.genes.normalize import log_normalize
from schelix_scale.scheduling import run_tasks
from schelix_scale.stores.base import CellStore
from schelix_scale.stores.checks import check_block
from schelix_scale.stores.values import ValueKind

PASS_SHARE = 0.25  # of the memory budget
BYTES_PER_VALUE = 40
BYTES_PER_CELL = 4_000  # soft clusters and features
MIN_BLOCK, MAX_BLOCK = 256, 16_384
SCAN_FACTOR = 16


@dataclass(frozen=True)
class OnePass:
    """What every block of the pass needs; picklable, so that blocks can be computed anywhere."""

    store: CellStore
    streams: Streams
    values: ValueKind

    def block(
        self,
        start: int,
        stop: int,
        batch_n: np.ndarray,
        targets: dict[str, Path],
        sync: bool = False,
        group_n: np.ndarray | None = None,
    ) -> int:
        """Read cells start:stop, encode them and write their rows; return how many.

        Parameters
        ----------
        batch_n
            (stop - start,) batch codes.
        sync
            Wait until the rows are on disk, where another machine sees them.
        group_n
            (stop - start,) groups of cells, if these say what was measured.
        """
        rows = np.arange(start, stop)
        x_ng = self.store.read(rows)
        check_block(x_ng, rows, self.store, self.values)
        x_ng = log_normalize(x_ng, self.values, self.streams.uses(x_ng.shape[1]))
        features = self.streams.encode(x_ng, batch_n, group_n)
        for name, path in targets.items():
            write_rows(path, start, getattr(features, name), sync)
        return stop - start


@dataclass(frozen=True)
class _Shared:
    """What the tasks on a cluster share: a pickle that each worker reads once."""

    job: OnePass
    targets: dict[str, Path]
    batches: Path
    cells: int
    threads: int


def block_size(store: CellStore, budget: int, workers: int, most: int = MAX_BLOCK) -> int:
    """Cells a block, so that all workers together stay within the budget (bytes); no more than ``most``.

    A store that is scanned for rows is read in larger blocks.
    """
    limit = most * (SCAN_FACTOR if store.row_access == "scan" else 1)
    return int(np.clip(budget / (workers * bytes_per_cell(store)), MIN_BLOCK, limit))


def bytes_per_cell(store: CellStore) -> float:
    """Memory of a cell while its block is read and encoded."""
    return max(store.nonzeros_per_cell * BYTES_PER_VALUE, BYTES_PER_CELL)


def write_rows(path: Path, start: int, values: np.ndarray, sync: bool = False) -> None:
    """Write (m, d) rows into an existing .npy file from row ``start`` on; safe beside writers of other rows.

    Bytes are written and not mapped pages: of a page that two machines write, one would lose its rows.
    """
    array = map_array(path)
    offset = array.offset + start * array.strides[0]
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        np.ascontiguousarray(values, array.dtype).tofile(file)
        if sync:
            os.fsync(file.fileno())


def write_features(
    job: OnePass,
    batch_n: np.ndarray,
    targets: dict[str, Path],
    budget: int,
    workers: int,
    advance: Callable[[int], None] = lambda _: None,
    scheduler: str | None = None,
    group_n: np.ndarray | None = None,
) -> None:
    """Fill the existing .npy files ``targets`` (name -> path) as Dask tasks, one writer a row range.

    Parameters
    ----------
    batch_n
        (n,) batch codes.
    budget, workers
        Bytes and threads. With a cluster: of one of its machines. They decide the blocks, and these the last digits
        of the features, wherever blocks are computed.
    scheduler
        Address of a dask.distributed scheduler; threads of this process if None. Its workers need the package, the
        source and the folder of the targets, at the same paths.
    group_n
        (n,) groups of cells, if these say which genes were measured.

    Raises
    ------
    DataError
        A block holds values that cannot be integrated.
    ConfigError, RunError
        See `run_tasks`.
    """
    n, size = job.store.n_cells, block_size(job.store, budget, workers)
    spans = [(start, min(start + size, n)) for start in range(0, n, size)]
    if scheduler is None:

        def task(span: tuple[int, int]) -> int:
            groups = None if group_n is None else group_n[slice(*span)]
            return job.block(*span, batch_n[slice(*span)], targets, group_n=groups)

        run_tasks(task, spans, workers, None, advance)
        return
    codes = batch_n[:, None] if group_n is None else np.column_stack([batch_n, group_n])
    with _shared(job, codes, targets, workers) as path:
        run_tasks(partial(_shared_block, str(path)), spans, workers, scheduler, advance)


@contextmanager
def _shared(job: OnePass, codes: np.ndarray, targets: dict[str, Path], threads: int) -> Iterator[Path]:
    """Write what all tasks need beside the targets, under a name that workers cannot know from another pass.

    ``codes`` (n, 1 or 2) are the batches and, if there are, the groups of the cells.
    """
    folder, name = next(iter(targets.values())).absolute().parent, f"pass-{uuid.uuid4().hex}"
    path, batches = folder / f"{name}.partial.pickle", folder / f"{name}.partial.npy"
    try:
        np.save(batches, codes)
        absolute = {name: target.absolute() for name, target in targets.items()}
        path.write_bytes(pickle.dumps(_Shared(job, absolute, batches, len(codes), threads)))
        for file in (path, batches):
            with file.open("rb") as written:
                os.fsync(written.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)
        batches.unlink(missing_ok=True)


def _shared_block(path: str, span: tuple[int, int]) -> int:
    """Do a block on a worker."""
    shared, codes = _open_shared(path)
    batch_n, *groups = np.asarray(codes[slice(*span)]).T
    return shared.job.block(*span, batch_n, shared.targets, sync=True, group_n=groups[0] if groups else None)


@lru_cache(maxsize=1)
def _open_shared(path: str) -> tuple[_Shared, np.ndarray]:
    """Read what the tasks share, once a worker, whose numeric libraries get the threads of the run from here on."""
    import socket

    from threadpoolctl import threadpool_limits

    try:
        shared: _Shared = pickle.loads(Path(path).read_bytes())
        codes = map_array(shared.batches)
    except FileNotFoundError as error:
        raise RunError(
            f"the Dask worker on {socket.gethostname()} does not see {Path(path).parent}. A cluster needs the run "
            "directory and the source on a file system that all its machines share, at the same path."
        ) from error
    threadpool_limits(shared.threads)
    return shared, codes
