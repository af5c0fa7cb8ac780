"""A store and the settings -> the least memory that each stage needs, and a refusal where the budget is below it.

Most stages size their blocks by the budget; what is left is what they hold at the least, in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from schelix_scale.compute import thread_count
from schelix_scale.config import Config, memory_budget
from schelix_scale.errors import ConfigError
from schelix_scale.features.onepass import MIN_BLOCK
from schelix_scale.features.onepass import bytes_per_cell as pass_bytes_per_cell
from schelix_scale.genes.sketch import BYTES_PER_VALUE, MIN_SKETCH
from schelix_scale.graph.knn import choose_method
from schelix_scale.stores.base import CellStore
from schelix_scale.training.loader import BYTES_PER_VALUE as STREAM_BYTES_PER_VALUE
from schelix_scale.training.loader import MIN_BLOCK as STREAM_MIN_BLOCK
from schelix_scale.training.loader import shuffle_for

BYTES_PER_CELL = 300  # names, obs, batch codes
EXACT_BYTES_PER_NEIGHBOR = 48  # indices, distances and weights while an exact graph is made
GRAPH_BYTES_PER_CELL = 60  # lists and positions of cells; the rest of a graph lies on disk
STREAM_SHARE = 0.25  # of the memory budget, for expression on its way to the training
STAGES = ("genes", "features", "graph", "train", "embed")


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
    needs = [
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
            graph_memory(n, config),
            f"{k} neighbours of {n:,} cells",
            f", or lower graph.k (now {k})",
        ),
    ]
    if streams(config):
        step = step_cells(n, config)
        cells = min(n, max(step, STREAM_MIN_BLOCK))
        remedy = f', lower train.batch_size (now {config.train.batch_size}), or use train.input = "cache"'
        needs.append(Need("train", int(cells * per_cell * STREAM_BYTES_PER_VALUE), f"steps of {step} cells", remedy))
    return needs


def graph_memory(n_cells: int, config: Config) -> int:
    """Return the memory in bytes that the graph of ``n_cells`` holds at the least."""
    k = config.graph.k
    exact = choose_method(n_cells, config.graph) == "exact"
    return n_cells * (BYTES_PER_CELL + (k * EXACT_BYTES_PER_NEIGHBOR if exact else GRAPH_BYTES_PER_CELL))


def streams(config: Config) -> bool:
    """Whether training reads expression."""
    return config.train.input == "stream" and config.train.enabled and config.strength > 0


def step_cells(n: int, config: Config) -> int:
    """Return the cells of a training step: fewer in small data, whose epochs would have too few steps."""
    return min(config.train.batch_size, max(n // 8, 48))


def stream_memory(store: CellStore, config: Config) -> float:
    """Return the memory in bytes of the buffers with which training reads expression; 0 if it does not."""
    if not streams(config):
        return 0.0
    buffer = shuffle_for(store, int(STREAM_SHARE * memory_budget(config))).buffer
    cells = min(max(buffer, step_cells(store.n_cells, config)), store.n_cells)
    return cells * store.nonzeros_per_cell * STREAM_BYTES_PER_VALUE


def require_memory(
    store: CellStore, config: Config, first: str = STAGES[0], due: Collection[str] | None = None
) -> None:
    """Refuse a budget with which a stage would run out of memory, before anything is computed.

    Parameters
    ----------
    store, config
        The cells and the settings.
    first
        The first stage that is to be done; those before it need nothing any more.
    due
        The stages that may be done; all by default.

    Raises
    ------
    ConfigError
        Names the stage, what it needs and the remedy.
    """
    budget = memory_budget(config)
    later = STAGES[STAGES.index(first) :] if first in STAGES else ()
    to_do = {stage for stage in later if due is None or stage in due}
    for need in least_needs(store, config):
        if need.stage in to_do and need.memory > budget:
            half = f"half of the memory here, {_amount(budget)},"
            allowed = half if config.max_memory is None else f"max_memory = {config.max_memory}"
            raise ConfigError(
                f"{store.source}: stage {need.stage} needs about {_amount(need.memory)} of memory for {need.purpose}; "
                f"{allowed} is less. Allow more, --max-memory {_amount(need.memory)}{need.remedy}."
            )


def _amount(size: int) -> str:
    """Write bytes as a setting can be, rounded up."""
    unit, name = (10**9, "GB") if size >= 10**10 else (10**6, "MB")
    return f"{math.ceil(size / unit)}{name}"
