"""A source and the settings -> what a run demands of the names and columns of its cells, or what is wrong with them.

`integrate` meets these demands before it computes anything, and `inspect` lists those that are not met.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from schelix_scale.config import Config
from schelix_scale.errors import DataError
from schelix_scale.stores.base import CellStore
from schelix_scale.stores.batches import batch_columns, read_batches
from schelix_scale.stores.known_labels import read_labels

ROW, BATCH = "schelix_row", "schelix_batch"


def requirements(store: CellStore, config: Config) -> dict[str, Callable[[], Any]]:
    """Return the demands on a source by name, each a function that returns what it has read.

    ``batches`` returns `Batches`, ``levels`` the codes of the protected levels (n,) int32 or None, ``labels``
    `KnownLabels` or None; ``neighbors`` and ``columns`` return nothing.

    Each raises a DataError with the remedy if its demand is not met.
    """
    return {
        "batches": lambda: read_batches(store, config.data.batch_key),
        "neighbors": lambda: _check_neighbors(store, config),
        "columns": lambda: _check_columns(store, config),
        "levels": lambda: _protected_levels(store, config),
        "labels": lambda: read_labels(store, config.data),
    }


def with_batch_key(config: Config, key: str) -> Config:
    """Return the settings with another batch key."""
    return config.model_copy(update={"data": config.data.model_copy(update={"batch_key": key})})


def carried_columns(store: CellStore, config: Config) -> list[str] | None:
    """Return the obs columns that are carried into the run, the batch key always; None: all."""
    columns = config.data.obs_columns
    if columns is None:
        return None
    return list(dict.fromkeys([*batch_columns(store, config.data.batch_key), *columns]))


def _check_neighbors(store: CellStore, config: Config) -> None:
    if store.n_cells <= config.graph.k:
        raise DataError(
            f"{store.source} has {store.n_cells} cells; graph.k = {config.graph.k} neighbours need more. "
            f"Lower it: --set graph.k={max(2, store.n_cells // 4)}."
        )


def _check_columns(store: CellStore, config: Config) -> None:
    """Refuse obs columns that are not there, or cannot stand beside ours."""
    there = store.obs_columns
    _refuse_missing(store, config.data.obs_columns or (), "data.obs_columns")
    carried = carried_columns(store, config)
    names = [str(name) for name in (there if carried is None else carried)]
    taken = sorted({ROW, BATCH} & set(names))
    written = [name.replace("/", "_") for name in names]
    clash = sorted({name for name in written if written.count(name) > 1})
    if taken or clash:
        raise DataError(
            f"{store.source}: obs columns {', '.join(taken or clash)} cannot be kept: "
            f"{'the names are ours' if taken else 'they have the same name once / is written as _'}. "
            "Rename them, or choose columns with data.obs_columns."
        )


def _refuse_missing(store: CellStore, columns: Sequence[str], setting: str) -> None:
    there = store.obs_columns
    missing = [name for name in columns if name not in there]
    if missing:
        raise DataError(
            f"{store.source} has no obs column {', '.join(map(repr, missing))} ({setting}). "
            f"It has: {', '.join(there) or 'none'}."
        )


def _protected_levels(store: CellStore, config: Config) -> np.ndarray | None:
    """Code the combinations of the protected columns, (n,) int32."""
    protect = config.data.protect
    if not protect:
        return None
    if set(batch_columns(store, config.data.batch_key)) <= set(protect):
        raise DataError(f"protect: {config.data.batch_key!r} is the batch key; what is protected cannot be the batch.")
    _refuse_missing(store, protect, "protect")
    columns = store.obs(protect)
    missing = np.flatnonzero(columns.isna().any(axis=1).to_numpy())
    if len(missing):
        first = ", ".join(map(str, columns.index[missing[:3]]))
        raise DataError(
            f"{store.source}: the protected columns {', '.join(protect)} have no value in {len(missing)} of "
            f"{store.n_cells} cells (first: {first}). Fill them in, or drop those cells."
        )
    codes = np.zeros(store.n_cells, np.int64)
    for name in protect:
        level_n, levels = columns[name].astype(str).factorize(sort=True)
        codes = np.unique(codes * len(levels) + level_n, return_inverse=True)[1]
    return np.asarray(codes, dtype=np.int32)
