"""Files of a run -> the same files with rows of new cells after them; what does not change is linked."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from schelix_scale.arrays import create_array
from schelix_scale.context import BATCH, ROW
from schelix_scale.errors import DataError
from schelix_scale.features.onepass import write_rows
from schelix_scale.graph.vectors import row_blocks
from schelix_scale.stores._align import align_column
from schelix_scale.stores.base import CellStore
from schelix_scale.stores.batches import Batches, batch_columns


def link(source: Path, target: Path) -> None:
    """Give a file, or the files of a directory, a second name; copy them to another file system."""
    if source.is_dir():
        target.mkdir(parents=True)
        for entry in source.iterdir():
            link(entry, target / entry.name)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def append_rows(source: np.ndarray, new: np.ndarray, target: Path) -> None:
    """Write an .npy with the rows of ``source`` and then those of ``new``, in the type of the first."""
    n = len(source)
    create_array(target, (n + len(new), *source.shape[1:]), source.dtype)
    for start, stop in row_blocks(n):
        write_rows(target, start, source[start:stop])
    for start, stop in row_blocks(len(new)):
        write_rows(target, n + start, new[start:stop])


def new_batch_names(batches: Batches, taken: Sequence[str], version: int) -> list[str]:
    """Names of new batches; one that the run has already gets the version after it, and no two are the same."""
    known, found = {*map(str, taken), *batches.names}, []
    for name in batches.names:
        if name in set(map(str, taken)):
            new, count = f"{name} (version {version})", 1
            while new in known:
                count += 1
                new = f"{name} (version {version}, {count})"
            known.add(new)
            name = new
        found.append(name)
    return found


def _apart(
    table: pd.DataFrame, obs: pd.DataFrame, batches: Batches, parts: Sequence[str], version: int
) -> pd.DataFrame:
    """Return obs of new cells in which batches, named by several columns, are others than those of the run.

    The first part of a name that the run has already gets the version after it.
    """
    old, new = (list(zip(*(frame[name].astype(str) for name in parts), strict=True)) for frame in (table, obs))
    pairs = set(zip(batches.codes.tolist(), new, strict=True))
    if not len(pairs) == len({code for code, _ in pairs}) == len({name for _, name in pairs}):
        raise DataError(
            f"the batches of the run are those of {', '.join(parts)}, and those of the query are others: its batches "
            "must have one value of each of these columns, and no two the same. Use the batch key of the run."
        )
    taken = set(old)
    again = np.array([name in taken for name in new])
    first = obs[parts[0]].astype(str)
    return obs.assign(**{parts[0]: first.where(~again, first + f" (version {version})").astype("category")})


def appended_cells(
    table: pd.DataFrame, store: CellStore, batches: Batches, batch_key: str, version: int
) -> pd.DataFrame:
    """Return the table of a run's cells with those of a store after them.

    Parameters
    ----------
    table
        ``cells.parquet`` of the run: row, batch code, obs columns.
    batch_key
        The run's.

    Raises
    ------
    DataError
        The run's batch key is several columns, and the query lacks some of them, or its batches are not theirs.
    """
    n, m = len(table), store.n_cells
    obs = store.obs([name for name in store.obs_columns if name.replace("/", "_") in table.columns])
    obs.columns = [name.replace("/", "_") for name in obs.columns]
    parts = [name.replace("/", "_") for name in batch_columns(store, batch_key)]
    if any(name not in table.columns for name in parts) or (len(parts) > 1 and set(parts) - set(obs.columns)):
        raise DataError(
            f"the batches of the run are those of {batch_key!r}; {store.source} lacks some of these obs columns "
            f"({', '.join(parts)}). Add them, so that its batches have names as the run's have."
        )
    if len(parts) > 1:
        obs = _apart(table, obs, batches, parts, version)
    joined: dict[str, Any] = {
        ROW: np.arange(n + m),
        BATCH: np.r_[table[BATCH].to_numpy(np.int32), batches.codes + int(table[BATCH].max()) + 1].astype(np.int32),
    }
    for name in table.columns.drop([ROW, BATCH]):
        piece = obs[name].reset_index(drop=True) if name in obs else None
        if parts == [name]:
            names = new_batch_names(batches, table[name].astype(str).unique(), version)
            piece = pd.Series(np.array(names, dtype=object)[batches.codes]).astype("category")
            column = table[name].astype(str).astype("category")
            joined[name] = align_column([column.reset_index(drop=True), piece], [n, m])
            continue
        joined[name] = align_column([table[name].reset_index(drop=True), piece], [n, m])
    cells = pd.Index(store.cell_names.astype(str))
    clash = cells.isin(table.index)
    fresh = cells.where(~clash, cells + f"-version{version}")
    return pd.DataFrame(joined, index=table.index.append(fresh))


def append_embedding(
    source: Path, target: Path, obs: pd.DataFrame, latents: Mapping[str, np.ndarray], uns: Mapping[str, Any]
) -> None:
    """Copy an embedding.zarr and append latents (m, d) by obsm key; obs and uns are written anew."""
    import anndata
    import zarr
    from anndata.io import read_elem, write_elem

    shutil.copytree(source, target)
    with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        root: Any = zarr.open_group(target, mode="r+", use_consolidated=False)
        known = read_elem(root["uns"])
        for key, latent in latents.items():
            array = root["obsm"][key]
            n = array.shape[0]
            array.resize((n + len(latent), array.shape[1]))
            array[n:] = latent
        write_elem(root, "obs", obs)
        write_elem(root, "uns", {**known, "schelix": {**known["schelix"], **uns}})
        zarr.consolidate_metadata(target)
