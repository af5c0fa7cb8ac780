"""A source of cells -> what `integrate` would find in it, what would stop it, and what it would cost.

Only names, batches and a small sample of cells are read. Problems of the content are collected, not raised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy import sparse

from schelix_scale.budget import BYTES_PER_CELL, graph_memory, require_memory, step_cells, stream_memory
from schelix_scale.config import Config, memory_budget
from schelix_scale.errors import ConfigError, DataError
from schelix_scale.features.onepass import BYTES_PER_VALUE as PASS_BYTES_PER_VALUE
from schelix_scale.features.onepass import PASS_SHARE, block_size
from schelix_scale.genes.sketch import BYTES_PER_VALUE as SKETCH_BYTES_PER_VALUE
from schelix_scale.genes.sketch import SKETCH_SHARE, allocate, sketch_size, swept_cells
from schelix_scale.graph.knn import choose_method
from schelix_scale.provenance import available_cores
from schelix_scale.publish import size_of
from schelix_scale.requirements import requirements, with_batch_key
from schelix_scale.stores import CellStore, Source, open_configured
from schelix_scale.stores.batches import (
    BETWEEN,
    Batches,
    batch_columns,
    default_batch_key,
    likely_batch_columns,
)
from schelix_scale.stores.checks import check_block, check_names
from schelix_scale.stores.joined import JoinedStore, addresses_of
from schelix_scale.stores.values import ValueDecision, decide_values

T = TypeVar("T")

SAMPLE_CELLS = 2_000
MANY_BATCHES = 1_000

# The cost model. Memory in bytes: libraries, then the most that the sketch, the pass, the graph or training holds.
BASE_BYTES = 700e6
SKETCH_BYTES_PER_CELL = 4_000  # components, Harmony's soft clusters
# Time in seconds, of one core unless said otherwise.
BASE_SECONDS = 6.0  # imports, compilation, small steps
SECONDS_PER_VALUE = 4e-8  # read, check, normalise and project a stored value; shared by the cores
SECONDS_PER_SKETCH_CELL = 2.5e-4  # a round of PCA, Harmony, k-means and partition
SECONDS_PER_PAIR = 4e-10  # exact search; shared by the cores
COMPILATION_SECONDS = 25.0  # of pynndescent
SECONDS_PER_NEIGHBOR = {"ivf": 1.8e-6, "pynndescent": 8e-6}  # shared by the cores
SECONDS_PER_STEP = 0.02  # a training step of 1,024 cells, which more cores do not speed up
SECONDS_PER_WALK = 4.5e-4  # a step of 1,024 random walks on the operator
SECONDS_PER_EMBEDDED_CELL = 3e-5  # diffuse and embed


@dataclass(frozen=True)
class Inspection:
    """What was found in a source.

    Attributes
    ----------
    source, layer, layers
        Where the cells are, the layer that was looked at, and those that are there.
    n_cells, n_genes, nonzeros_per_cell
        Shape, and the mean number of stored values a cell.
    stored_bytes
        Size of the files or directories; None for cells in memory or elsewhere.
    files, notes
        Of several files: where they are; how they are joined, and other things to know that stop nothing.
    batch_key, batch_sizes
        The obs column of the batches and the cells of each; None and empty if there is no such column.
    likely_batch_columns
        The obs columns that could name batches, the likeliest first, if ``batch_key`` is not there.
    value_kind, value_reason
        ``counts``, ``linear`` or ``log`` and why, decided on a sample; None and empty if it could not be.
    problems
        What would stop `integrate`, each with its remedy.
    memory_bytes, seconds
        Estimated peak memory and time of `integrate` on this machine, without a GPU.
    """

    source: str
    layer: str
    layers: tuple[str, ...]
    n_cells: int
    n_genes: int
    nonzeros_per_cell: float
    stored_bytes: int | None
    files: tuple[str, ...]
    notes: tuple[str, ...]
    batch_key: str | None
    batch_sizes: dict[str, int]
    likely_batch_columns: tuple[str, ...]
    value_kind: str | None
    value_reason: str
    problems: tuple[str, ...]
    memory_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON can hold it."""
        return asdict(self)


def inspect_source(source: Source, batch_key: str | None = None, config: Config | None = None) -> Inspection:
    """Look at a source of cells before it is integrated.

    Parameters
    ----------
    source
        Whatever `open_store` opens.
    batch_key
        The obs column of the batches. Without it, that of ``config``, if it is there.
    config
        Settings of the integration; the defaults without it.

    Raises
    ------
    StoreError
        The source cannot be opened at all, or not in the layer ``data.layer``.
    """
    config = config or Config()
    store = open_configured(source, config.data)
    problems: list[str] = []
    wanted = batch_key or default_batch_key(store, config.data)
    key = wanted if set(batch_columns(store, wanted)) <= set(store.obs_columns) else None
    needless = key is None and batch_key is None and "batch_key" not in config.data.model_fields_set
    config = with_batch_key(config, wanted)
    sizes = {} if key is None else _batch_sizes(store, key)
    _try(lambda: check_names(store), problems)
    decision = None
    if store.n_cells:
        found = {
            name: _try(check, problems)
            for name, check in requirements(store, config).items()
            if not (needless and name == "batches")  # the absence of a key that nobody asked for is no problem
        }
        if len(store.gene_names):
            decision = _values(store, found.get("batches"), config, problems)
    _try(lambda: require_memory(store, config), problems)
    memory, seconds = estimate_costs(store, config)
    paths = [Path(address).expanduser() for address in addresses_of(store)]
    return Inspection(
        source=store.source,
        layer=store.layer,
        layers=tuple(store.available_layers),
        n_cells=store.n_cells,
        n_genes=len(store.gene_names),
        nonzeros_per_cell=store.nonzeros_per_cell,
        stored_bytes=sum(size_of(path)[0] for path in paths) if all(path.exists() for path in paths) else None,
        files=store.addresses if isinstance(store, JoinedStore) else (),
        notes=(*(store.notes if isinstance(store, JoinedStore) else ()), *store.notices()),
        batch_key=key,
        batch_sizes=sizes,
        likely_batch_columns=() if key else tuple(likely_batch_columns(store, wanted)),
        value_kind=decision.kind if decision else None,
        value_reason=decision.reason if decision else "",
        problems=tuple(problems),
        memory_bytes=memory,
        seconds=seconds,
    )


def estimate_costs(store: CellStore, config: Config) -> tuple[int, float]:
    """Return the peak memory in bytes and the seconds that `integrate` takes here on the CPU, by the model above."""
    n, per_cell = store.n_cells, max(store.nonzeros_per_cell, 1.0)
    cores, budget, graph = config.threads or available_cores(), memory_budget(config), config.graph
    sketch = sketch_size(store, config.sketch, int(SKETCH_SHARE * budget))
    block = min(block_size(store, int(PASS_SHARE * budget), cores), n)
    memory = BASE_BYTES + n * BYTES_PER_CELL
    memory += max(
        sketch * (per_cell * SKETCH_BYTES_PER_VALUE + SKETCH_BYTES_PER_CELL),
        min(cores * block, n) * per_cell * PASS_BYTES_PER_VALUE,
        graph_memory(n, config),
        stream_memory(store, config),
    )
    method = choose_method(n, graph)
    search = n**2 * SECONDS_PER_PAIR if method == "exact" else n * graph.k * SECONDS_PER_NEIGHBOR[method]
    train = config.train
    size = step_cells(n, config)
    epoch = -(-n // size)
    steps = sum(min(phase, train.max_epochs * epoch) for phase in (train.align_steps, train.refine_steps))
    seconds = BASE_SECONDS + (swept_cells(store, config.sketch, sketch) + n) * per_cell * SECONDS_PER_VALUE / cores
    seconds += sketch * SECONDS_PER_SKETCH_CELL * config.genes.iterations
    seconds += search / cores + (COMPILATION_SECONDS if method == "pynndescent" else 0)
    trained = train.enabled and config.strength > 0
    walked = min(train.refine_steps, train.max_epochs * epoch) * train.reach * SECONDS_PER_WALK
    seconds += trained * (steps * SECONDS_PER_STEP + walked) * size / 1024 + n * SECONDS_PER_EMBEDDED_CELL
    return int(memory), float(seconds)


def _batch_sizes(store: CellStore, key: str) -> dict[str, int]:
    """Return the cells of each batch; nothing for a column that is no batch key."""
    counts = store.obs(batch_columns(store, key)).astype(object).value_counts(dropna=False)
    if len(counts) > MANY_BATCHES:
        return {}
    return {BETWEEN.join(map(str, values)): int(count) for values, count in counts.items()}


def _values(store: CellStore, batches: Batches | None, config: Config, problems: list[str]) -> ValueDecision | None:
    """Check a sample of cells of all batches and decide what their values are."""
    codes, names = np.zeros(store.n_cells, np.int32), ["all"]
    if batches is not None:
        codes, names = batches.codes, batches.names
    rng = np.random.default_rng(config.seed)
    quotas = allocate(np.bincount(codes, minlength=len(names)), min(SAMPLE_CELLS, store.n_cells), 0.5)
    rows = np.sort(
        np.concatenate(
            [rng.choice(np.flatnonzero(codes == code), quota, replace=False) for code, quota in enumerate(quotas)]
        )
    )
    x_ng = store.read(rows)
    _try(lambda: check_block(x_ng, rows, store), problems)
    if not _usable(x_ng):
        return None
    return _try(lambda: decide_values(x_ng, codes[rows], names, config.data.values), problems)


def _usable(x_ng: sparse.csr_matrix) -> bool:
    return bool(np.isfinite(x_ng.data).all() and (x_ng.data >= 0).all())


def _try(check: Callable[[], T], problems: list[str]) -> T | None:
    """Return what a check returns, None if it raised an error, whose message becomes a problem."""
    try:
        return check()
    except (DataError, ConfigError) as error:
        problems.append(str(error))
        return None
