"""(seed, epoch, step) -> the rows of that step, and which of them are a rank's.

A pure function: nothing is stored, so resuming is exact. Rows of a step do not depend on how many ranks there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

PLAN_TAG = 0x9A7


@dataclass(frozen=True)
class Plan:
    """Which of ``n_rows`` rows each step reads; every epoch covers each row exactly once, in another order.

    Attributes
    ----------
    n_rows
        Number of rows to cover.
    batch_size
        Rows of a step; the last step of an epoch may have fewer.
    seed
        Numbers, such as a seed and a phase; orders of different ones are unrelated.
    """

    n_rows: int
    batch_size: int
    seed: tuple[int, ...]

    @property
    def steps_per_epoch(self) -> int:
        """Steps that cover every row once."""
        return -(-self.n_rows // self.batch_size)

    def rows(self, step: int) -> np.ndarray:
        """Return the rows of a step counted from the start of training (m,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.n_rows, self.seed, epoch)
        return order[position * self.batch_size : (position + 1) * self.batch_size]


def deal(rows: np.ndarray, rank: int, world: int) -> np.ndarray:
    """Return which of a step's rows (m,) a rank computes, as positions in it.

    Shares differ by one row at most, also of few rows or none. Rows beside each other on disk go to one rank; a single
    rank takes all rows in their order.
    """
    if world == 1:
        return np.arange(len(rows))
    m = len(rows)
    return np.argsort(rows, kind="stable")[m * rank // world : m * (rank + 1) // world]


@lru_cache(maxsize=2)
def _epoch_order(n_rows: int, seed: tuple[int, ...], epoch: int) -> np.ndarray:
    order = np.random.default_rng([*seed, PLAN_TAG, epoch]).permutation(n_rows)
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class BlockPlan:
    """A plan for rows that lie on disk: blocks of consecutive rows are shuffled, and mixed a buffer at a time.

    The rows of an epoch are cut into blocks; blocks are put into random order and filled into buffers, and the rows
    of a buffer are dealt in random order. So a step's rows are few runs on disk, together with the steps beside it.

    Attributes
    ----------
    n_rows, batch_size, seed
        As of `Plan`.
    block
        Consecutive rows that stay together on the way into a buffer.
    buffer_steps
        Steps that share a buffer: it holds ``buffer_steps * batch_size`` rows.
    """

    n_rows: int
    batch_size: int
    seed: tuple[int, ...]
    block: int
    buffer_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps that cover every row once."""
        return -(-self.n_rows // self.batch_size)

    def rows(self, step: int) -> np.ndarray:
        """Return the rows of a step counted from the start of training (m,)."""
        rows, _ = self.buffer(step)
        return rows[: self.batch_size]

    def buffer(self, step: int) -> tuple[np.ndarray, int]:
        """Return what is left of a step's buffer: rows (r,) in the order they are dealt in, and how many steps."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _block_order(self.n_rows, self.seed, epoch, self.block, self.buffer_steps * self.batch_size)
        last = min((position // self.buffer_steps + 1) * self.buffer_steps, self.steps_per_epoch)
        return order[position * self.batch_size : last * self.batch_size], last - position


@lru_cache(maxsize=2)
def _block_order(n_rows: int, seed: tuple[int, ...], epoch: int, block: int, buffer: int) -> np.ndarray:
    rng = np.random.default_rng([*seed, PLAN_TAG, epoch, 0xB10C])
    starts = block * rng.permutation(-(-n_rows // block))
    order: np.ndarray = (starts[:, None] + np.arange(block)).ravel()
    order = order[order < n_rows]
    for first in range(0, n_rows, buffer):
        order[first : first + buffer] = rng.permutation(order[first : first + buffer])
    order.flags.writeable = False
    return order
