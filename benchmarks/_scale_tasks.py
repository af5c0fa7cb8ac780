"""What `scale.py` runs in processes of their own: the peer in memory, and the floors that no method can go below."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

N_HVG, N_COMPONENTS = 2_000, 50


def scanpy_harmony(atlas: str, run: str, out: str) -> None:
    """Read all cells, normalise, choose genes, PCA and Harmony, all in memory, as scanpy's users do."""
    import anndata as ad
    import harmonypy
    import scanpy as sc

    adata = ad.read_zarr(atlas) if atlas.endswith(".zarr") else ad.read_h5ad(atlas)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=N_HVG, batch_key="batch")
    sc.pp.pca(adata, n_comps=N_COMPONENTS, mask_var="highly_variable")
    found = harmonypy.run_harmony(adata.obsm["X_pca"].astype(np.float64), adata.obs, ["batch"], verbose=False)
    z_nd = found.Z_corr
    np.save(out, np.asarray(z_nd if len(z_nd) == adata.n_obs else z_nd.T, np.float32))
    np.save(Path(out).with_name("pca.npy"), adata.obsm["X_pca"].astype(np.float32))


def read_once(atlas: str, run: str, out: str) -> None:
    """Read every cell once, in blocks, and do nothing with it."""
    from concurrent.futures import ThreadPoolExecutor

    from schelix_scale.stores import open_store

    store, size = open_store(atlas), 8_192

    def read(start: int) -> int:
        return int(store.read(np.arange(start, min(start + size, store.n_cells))).nnz)

    with ThreadPoolExecutor(2) as pool:
        print(sum(pool.map(read, range(0, store.n_cells, size))), "values")


def neighbors_alone(atlas: str, run: str, out: str) -> None:
    """Build the index that the graph is made from with pynndescent and nothing else."""
    from pynndescent import NNDescent

    features = np.load(Path(run) / "features" / "anchor_corrected.npy")
    NNDescent(features, metric="cosine", n_neighbors=31, random_state=0, low_memory=True, compressed=False)


def embed_alone(atlas: str, run: str, out: str) -> None:
    """Pass all cells through a network of the encoders' width, from a memory map into a memory map."""
    import torch

    features = np.load(Path(run) / "features" / "anchor_corrected.npy", mmap_mode="r")
    n, d = features.shape
    result = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=(n, d))
    layers = [torch.nn.Linear(3 * d, 128), torch.nn.GELU(), torch.nn.Linear(128, d)]
    network = torch.nn.Sequential(*layers)
    with torch.no_grad():
        for start in range(0, n, 8_192):
            block = torch.from_numpy(np.array(features[start : start + 8_192]))
            result[start : start + 8_192] = network(block.repeat(1, 3)).numpy()
    result.flush()


TASKS: dict[str, Callable[[str, str, str], None]] = {
    "scanpy + harmonypy": scanpy_harmony,
    "read the store once": read_once,
    "pynndescent alone": neighbors_alone,
    "one embedding pass": embed_alone,
}

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    TASKS[sys.argv[1]](*sys.argv[2:])
