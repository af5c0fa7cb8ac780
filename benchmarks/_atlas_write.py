"""Blocks of cells -> an atlas on disk, as h5ad, zarr or a TileDB-SOMA experiment, without holding it in memory."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from _atlas import Atlas, Block
from scipy import sparse

CHUNK_VALUES = 1 << 18

Advance = Callable[[int], None]


def write_atlas(atlas: Atlas, path: Path, uns: dict[str, Any], advance: Advance = lambda _: None) -> None:
    """Write all cells of ``atlas``; ``path`` appears when it is complete.

    Raises
    ------
    ValueError
        The suffix is none of `FORMATS`, or ``path`` is there.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} must end in {', '.join(FORMATS)}")
    if path.exists():
        raise ValueError(f"{path} exists; name another place or remove it")
    write_cells(atlas.blocks(), atlas.obs, atlas.var, path, uns, advance)


def write_cells(
    blocks: Iterator[Block],
    obs: pd.DataFrame,
    var: pd.DataFrame,
    path: Path,
    uns: dict[str, Any],
    advance: Advance = lambda _: None,
) -> None:
    """Write cells in the format of the suffix; ``path`` appears when it is complete, what a killed write left goes."""
    partial = path.with_name(f".partial-{path.name}")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    WRITERS[path.suffix](blocks, obs, var, partial, uns, advance)
    partial.rename(path)


def write_zarr(
    blocks: Iterator[Block], obs: pd.DataFrame, var: pd.DataFrame, path: Path, uns: dict[str, Any], advance: Advance
) -> None:
    import zarr

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        with ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
            ad.AnnData(obs=obs, var=var, uns=uns).write_zarr(path)
        root = zarr.open_group(path, mode="r+", use_consolidated=False)
        if "X" in root:
            del root["X"]
        group = root.create_group("X")
        arrays = {
            name: group.create_array(name, shape=(0,), chunks=(CHUNK_VALUES,), dtype=kind)
            for name, kind in (("data", "float32"), ("indices", "int32"))
        }
        indptr = _append(blocks, lambda name, values: arrays[name].append(values), advance)
        group.create_array("indptr", data=indptr, chunks=(len(indptr),))
        group.attrs.update(_csr_attributes(len(obs), len(var)))
        zarr.consolidate_metadata(path)


def write_h5ad(
    blocks: Iterator[Block], obs: pd.DataFrame, var: pd.DataFrame, path: Path, uns: dict[str, Any], advance: Advance
) -> None:
    import h5py

    ad.AnnData(obs=obs, var=var, uns=uns).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        if "X" in file:
            del file["X"]
        group = file.create_group("X")
        arrays = {
            name: group.create_dataset(
                name, (0,), kind, maxshape=(None,), chunks=(CHUNK_VALUES,), compression="gzip", compression_opts=1
            )
            for name, kind in (("data", "float32"), ("indices", "int32"))
        }

        def add(name: str, values: np.ndarray) -> None:
            before = arrays[name].shape[0]
            arrays[name].resize((before + len(values),))
            arrays[name][before:] = values

        group.create_dataset("indptr", data=_append(blocks, add, advance))
        group.attrs.update(_csr_attributes(len(obs), len(var)))


def _append(blocks: Iterator[Block], add: Callable[[str, np.ndarray], None], advance: Advance) -> np.ndarray:
    """Add the values of all blocks in pieces of whole chunks; return indptr."""
    counts, rest = [np.zeros(1, np.int64)], {"data": np.zeros(0, np.float32), "indices": np.zeros(0, np.int32)}
    for block in blocks:
        counts.append(np.diff(block.x_ng.indptr).astype(np.int64))
        for name in rest:
            values = np.concatenate([rest[name], getattr(block.x_ng, name)])
            whole = len(values) // CHUNK_VALUES * CHUNK_VALUES
            add(name, values[:whole])
            rest[name] = values[whole:]
        advance(block.x_ng.shape[0])
    for name, values in rest.items():
        add(name, values)
    return np.cumsum(np.concatenate(counts))


def _csr_attributes(n: int, g: int) -> dict[str, Any]:
    return {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n, g]}


def write_soma(
    blocks: Iterator[Block], obs: pd.DataFrame, var: pd.DataFrame, path: Path, uns: dict[str, Any], advance: Advance
) -> None:
    """Write an experiment as ``tiledbsoma.io.from_anndata`` lays it out: obs, and ms["RNA"] with var and X["data"]."""
    import pyarrow as pa
    import tiledbsoma as soma
    import tiledbsoma.io

    empty = ad.AnnData(sparse.csr_matrix((len(obs), len(var)), dtype=np.float32), obs, var)
    tiledbsoma.io.from_anndata(str(path), empty, measurement_name="RNA", X_kind=soma.SparseNDArray)
    with soma.Experiment.open(str(path), "w") as experiment:
        x = experiment.ms["RNA"].X["data"]
        for block in blocks:
            coo = block.x_ng.tocoo()
            x.write(
                pa.table(
                    {
                        "soma_dim_0": (coo.row + block.start).astype(np.int64),
                        "soma_dim_1": coo.col.astype(np.int64),
                        "soma_data": coo.data,
                    }
                )
            )
            advance(block.x_ng.shape[0])
    for name, value in uns.items():
        with soma.Experiment.open(str(path), "w") as experiment:
            experiment.metadata[name] = str(value)


WRITERS = {".zarr": write_zarr, ".h5ad": write_h5ad, ".soma": write_soma}
FORMATS = tuple(WRITERS)
