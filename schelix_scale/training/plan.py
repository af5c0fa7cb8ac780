"""(seed, epoch, step) -> the rows of that step. A pure function: nothing is stored, so resuming is exact."""

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


@lru_cache(maxsize=2)
def _epoch_order(n_rows: int, seed: tuple[int, ...], epoch: int) -> np.ndarray:
    order = np.random.default_rng([*seed, PLAN_TAG, epoch]).permutation(n_rows)
    order.flags.writeable = False
    return order
