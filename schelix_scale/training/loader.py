"""Any store -> shuffled minibatches of expression, read in blocks ahead of their use.

Which cells a step has is a `BlockPlan`: a pure function of seed and step. In memory are the buffer in use, the next
one, which a thread reads meanwhile, and a minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy import sparse

from schelix_scale.errors import ConfigError
from schelix_scale.stores.base import CellStore
from schelix_scale.training.plan import BlockPlan

BYTES_PER_VALUE = 40  # of a cell in a buffer, with the next buffer and what reading it takes
BLOCKS, MIN_BLOCK, MAX_BLOCK = 32, 64, 512
MAX_BUFFER = 65_536


Mine: TypeAlias = Callable[[np.ndarray], np.ndarray]


class Shuffle(NamedTuple):
    """How rows are mixed: cells of a block, and cells of a buffer of several blocks."""

    block: int
    buffer: int


class Minibatch(NamedTuple):
    """Positions of m cells in the store, and their values ``x_ng`` (m, g or h) CSR float32 as stored."""

    rows: np.ndarray
    x_ng: sparse.csr_matrix


def shuffle_for(store: CellStore, budget: int) -> Shuffle:
    """Return the blocks and buffers with which a loader stays within ``budget`` bytes."""
    buffer = int(np.clip(budget / (max(store.nonzeros_per_cell, 1) * BYTES_PER_VALUE), MIN_BLOCK, MAX_BUFFER))
    return Shuffle(int(np.clip(buffer // BLOCKS, MIN_BLOCK, MAX_BLOCK)), buffer)


class StreamLoader:
    """Shuffled minibatches of the cells of a store; each cell once an epoch, in another order each epoch.

    Parameters
    ----------
    store
        Where cells are read. ``store.read`` is called from one thread, a buffer at a time, with ascending rows.
    rows
        (r,) ascending positions of the cells to deal; all by default.
    batch_size
        Cells of a minibatch; the last one of an epoch may have fewer.
    seed
        Numbers that decide the order.
    shuffle
        Blocks and buffers, `shuffle_for` a budget. A buffer holds at least one minibatch.
    genes
        (h,) positions of the genes to read, in the order to return them in; all by default.

    Raises
    ------
    ConfigError
        There are no cells to deal, or a size is below 1.
    """

    def __init__(
        self,
        store: CellStore,
        rows: np.ndarray | None = None,
        *,
        batch_size: int,
        seed: tuple[int, ...] = (0,),
        shuffle: Shuffle,
        genes: np.ndarray | None = None,
    ) -> None:
        self.store, self.genes = store, genes
        self.rows = np.arange(store.n_cells) if rows is None else np.asarray(rows)
        if len(self.rows) == 0:
            raise ConfigError(f"{store.source}: there are no cells to load. Give at least one row.")
        if min(batch_size, *shuffle) < 1:
            raise ConfigError(f"batch_size {batch_size} and {shuffle} must be 1 or more.")
        self.plan = block_plan(len(self.rows), batch_size, seed, shuffle)

    @property
    def steps_per_epoch(self) -> int:
        """Minibatches of an epoch."""
        return self.plan.steps_per_epoch

    def epoch(self, epoch: int, first: int = 0) -> Generator[Minibatch, None, None]:
        """Yield the minibatches of an epoch, from its minibatch number ``first`` on."""
        start = epoch * self.steps_per_epoch
        return self.steps(start + first, start + self.steps_per_epoch)

    def steps(self, first: int, stop: int, mine: Mine | None = None) -> Generator[Minibatch, None, None]:
        """Yield the minibatches of the steps ``first:stop``, counted from the start of the first epoch.

        ``mine`` says which of a minibatch's rows are read, as positions in them; all by default.
        Only what they hold is read. Close the iterator (`contextlib.closing`) to leave before its end: it then waits
        for the read that is under way. What a read raises is raised at the minibatch that needs it.
        """
        if first >= stop:
            return
        with ThreadPoolExecutor(1, thread_name_prefix="schelix-loader") as reader:
            ahead, first = self._submit(reader, first, stop, mine)
            while True:
                steps, order, x_ng = ahead.result()
                last = first >= stop
                if not last:
                    ahead, first = self._submit(reader, first, stop, mine)
                start = 0
                for rows in steps:
                    yield Minibatch(rows, x_ng[order[start : start + len(rows)]])
                    start += len(rows)
                if last:
                    return
                del x_ng

    def _submit(
        self, reader: ThreadPoolExecutor, step: int, stop: int, mine: Mine | None
    ) -> tuple[Future[tuple[list[np.ndarray], np.ndarray, sparse.csr_matrix]], int]:
        """Let a buffer be read, from ``step`` on; return it, and the step after it."""
        positions, steps = self.plan.buffer(step)
        after, size = min(step + steps, stop), self.plan.batch_size
        minibatches = [self.rows[positions[i * size : (i + 1) * size]] for i in range(after - step)]
        if mine is not None:
            minibatches = [rows[mine(rows)] for rows in minibatches]
        return reader.submit(self._read, minibatches), after

    def _read(self, steps: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray, sparse.csr_matrix]:
        """Read a buffer in the order of the store; return its minibatches, where their rows lie, and values."""
        rows = np.concatenate(steps)
        ascending = np.argsort(rows)
        order = np.empty_like(ascending)
        order[ascending] = np.arange(len(rows))
        return steps, order, self.store.read(rows[ascending], self.genes)


def block_plan(n_rows: int, batch_size: int, seed: tuple[int, ...], shuffle: Shuffle) -> BlockPlan:
    """Return the plan of a loader: its buffers are whole minibatches."""
    return BlockPlan(n_rows, batch_size, seed, shuffle.block, max(1, shuffle.buffer // batch_size))
