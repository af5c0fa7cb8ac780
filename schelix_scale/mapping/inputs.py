"""What a user gives to a mapping -> cells, their batches, settings; checked."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from schelix_scale.errors import RunError
from schelix_scale.mapping.settings import MapConfig, load_map_config
from schelix_scale.stores import CellStore, Source, open_store
from schelix_scale.stores.batches import Batches, batch_columns, read_batches
from schelix_scale.stores.checks import check_names
from schelix_scale.stores.joined import JoinedStore

READ_BY_NAME = ("obs_filter", "census_version", "census_uri")


def open_query(query: Source, layer: str, reading: dict[str, Any]) -> CellStore:
    """Open new cells. Several files keep all their genes: what one has measured does not hang on the others.

    ``reading`` are settings of `READ_BY_NAME`: which cells of an experiment, or of the Census, are read.

    Raises
    ------
    StoreError, DataError
        They cannot be read, or names of cells or genes repeat.
    """
    joined = {} if isinstance(query, CellStore) else {"genes_join": "union"}
    store = open_store(query, layer, **joined, **reading)
    check_names(store)
    return store


def query_batches(store: CellStore, batch_key: str | None, default: str) -> Batches:
    """Read the batches of a query: of the key that was given, else of the reference's, else files, else one batch."""
    if batch_key is None and all(name in store.obs_columns for name in batch_columns(store, default)):
        batch_key = default
    elif batch_key is None and isinstance(store, JoinedStore):
        batch_key = store.file_column
    if batch_key is None:
        n = store.n_cells
        name = Path(store.source).stem or "query"
        return Batches(np.zeros(n, np.int32), [name], np.array([n]))
    return read_batches(store, batch_key, least=1)


def batches_digest(batches: Batches) -> str:
    """Return a sha256 of which cell is in which batch."""
    return hashlib.sha256(batches.codes.tobytes() + "\0".join(batches.names).encode()).hexdigest()


def refuse_inside(run: Path, out: Path) -> None:
    """Raise if a directory is the reference, inside it, or holds it.

    Raises
    ------
    RunError
        It is; the reference is never written to.
    """
    there, home = out.resolve(), run.resolve()
    if there == home or there.is_relative_to(home) or home.is_relative_to(there):
        raise RunError(f"{out} is the reference, inside it or around it; it is never changed. Name another directory.")


def parted(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return those of single settings that say what is read, of which None is none, and those of the mapping."""
    reading = {name: settings[name] for name in READ_BY_NAME if settings.get(name) is not None}
    return reading, {name: value for name, value in settings.items() if name not in READ_BY_NAME}


def merged_settings(config: MapConfig | str | Path | None, settings: dict[str, Any]) -> MapConfig:
    """Combine settings, or a TOML file of them, with single ones, which win."""
    if isinstance(config, MapConfig):
        return load_map_config(None, {**config.model_dump(), **settings})
    return load_map_config(config, settings)
