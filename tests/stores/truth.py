"""The dense array that every store test compares with, and the ways to write it to disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from scipy import sparse


@dataclass(frozen=True)
class Truth:
    """Dense values (n, g), obs and gene names, written without any code of the package."""

    x_ng: np.ndarray
    obs: pd.DataFrame
    genes: list[str]


def make_truth(n: int = 83, g: int = 37, seed: int = 0, prefix: str = "gene") -> Truth:
    rng = np.random.default_rng(seed)
    x_ng = rng.poisson(0.6, (n, g)).astype(np.float32)
    x_ng[5:6] = 0
    x_ng[:, 4:5] = 0
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(rng.choice(["b1", "b2", "b3"], n)),
            "donor": rng.integers(0, 3, n),
            "score": rng.normal(size=n),
            "note": rng.choice(["x", "y"], n).astype(object),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    return Truth(x_ng, obs, [f"{prefix}{i}" for i in range(g)])


def to_anndata(truth: Truth, matrix: Any = None, **more: Any) -> ad.AnnData:
    x = sparse.csr_matrix(truth.x_ng) if matrix is None else matrix
    return ad.AnnData(x, obs=truth.obs.copy(), var=pd.DataFrame(index=truth.genes), **more)


def write_zarr(adata: ad.AnnData, path: Path, zarr_format: int, auto_shard: bool = False, **arrays: Any) -> Path:
    """Write every element by itself, so that zarr format, chunks and shards of X can be chosen."""
    with ad.settings.override(auto_shard_zarr_v3=auto_shard):
        return _write_zarr(adata, path, zarr_format, arrays)


def _write_zarr(adata: ad.AnnData, path: Path, zarr_format: int, arrays: dict[str, Any]) -> Path:
    root = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    ad.io.write_elem(root, "obs", adata.obs)
    ad.io.write_elem(root, "var", adata.var)
    ad.io.write_elem(root, "X", adata.X, dataset_kwargs=arrays)
    return path


def write_csr(group: Any, x_ng: sparse.csr_matrix, **changed: Any) -> None:
    """Write a CSR matrix by hand into an h5py group, with some of its arrays replaced."""
    group.attrs["encoding-type"] = "csr_matrix"
    group.attrs["encoding-version"] = "0.1.0"
    group.attrs["shape"] = np.array(x_ng.shape)
    for key in ("data", "indices", "indptr"):
        group.create_dataset(key, data=changed.get(key, getattr(x_ng, key)))


def save(adata: ad.AnnData, folder: Path, name: str) -> str:
    folder.mkdir(exist_ok=True)
    if name.endswith(".zarr"):
        return str(write_zarr(adata, folder / name, 3))
    adata.write_h5ad(folder / name)
    return str(folder / name)
