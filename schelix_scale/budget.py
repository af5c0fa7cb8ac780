"""A store and the settings -> the least memory that each stage needs, and a refusal where the budget is below it.

Most stages size their blocks by the budget; what is left is what they hold at the least, in bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from schelix_scale.compute import thread_count
from schelix_scale.config import Config, memory_budget
from schelix_scale.errors import ConfigError
from schelix_scale.features.onepass import MIN_BLOCK
from schelix_scale.features.onepass import bytes_per_cell as pass_bytes_per_cell
from schelix_scale.genes.sketch import BYTES_PER_VALUE, MIN_SKETCH
from schelix_scale.stores.base import CellStore

BYTES_PER_CELL = 300  # names, obs, batch codes
GRAPH_BYTES_PER_NEIGHBOR = 48  # indices, distances and weights while the operator is made


@dataclass(frozen=True)
class Need:
    """The least ``memory`` (bytes) of a ``stage``, what it is for, and what lowers it."""

    stage: str
    memory: int
    purpose: str
    remedy: str


def least_needs(store: CellStore, config: Config) -> list[Need]:
    """Return what the stages that hold the most need at the least, in their order."""
    n, per_cell, threads, k = store.n_cells, store.nonzeros_per_cell, thread_count(config), config.graph.k
    sketch, block = min(n, MIN_SKETCH), min(n, MIN_BLOCK)
    return [
        Need(
            "genes",
            int(sketch * per_cell * BYTES_PER_VALUE),
            f"a sketch of {sketch:,} cells with {per_cell:,.0f} values each",
            "",
        ),
        Need(
            "features",
            int(min(threads * block, n) * pass_bytes_per_cell(store)),
            f"blocks of {block} cells on {threads} threads",
            f", or lower threads (now {threads})",
        ),
        Need(
            "graph",
            n * (k * GRAPH_BYTES_PER_NEIGHBOR + BYTES_PER_CELL),
            f"{k} neighbours of {n:,} cells",
            f", or lower graph.k (now {k})",
        ),
    ]


def require_memory(store: CellStore, config: Config) -> None:
    """Refuse a budget with which a stage would run out of memory, before anything is computed.

    Raises
    ------
    ConfigError
        Names the stage, what it needs and the remedy.
    """
    budget = memory_budget(config)
    for need in least_needs(store, config):
        if need.memory > budget:
            allowed = "half of the memory here" if config.max_memory is None else f"max_memory = {config.max_memory}"
            raise ConfigError(
                f"{store.source}: stage {need.stage} needs about {_amount(need.memory)} of memory for {need.purpose}; "
                f"{allowed} allows {_amount(budget)}. Allow more, --max-memory {_amount(need.memory)}{need.remedy}."
            )


def _amount(size: int) -> str:
    """Write bytes as a setting can be, rounded up."""
    unit, name = (10**9, "GB") if size >= 10**10 else (10**6, "MB")
    return f"{math.ceil(size / unit)}{name}"
