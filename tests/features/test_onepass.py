"""The one pass: every row read once, written at its number, the same for any block size."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from schelix_scale.arrays import create_array
from schelix_scale.config import FeaturesConfig, GenesConfig
from schelix_scale.errors import DataError
from schelix_scale.features.onepass import MAX_BLOCK, MIN_BLOCK, OnePass, block_size, write_features, write_rows
from schelix_scale.features.projection import fit_projection
from schelix_scale.features.streams import Streams, fit_streams
from schelix_scale.genes.partition import partition_genes
from schelix_scale.stores import MemoryStore

from ..counting import CountingStore
from ..synthetic import Synthetic, make_cells


@pytest.fixture(scope="module")
def cells() -> Synthetic:
    return make_cells(per_group=40)


@pytest.fixture(scope="module")
def streams(cells: Synthetic) -> Streams:
    x_ng = cells.log_csr
    genes = pd.Index([f"g{i}" for i in range(x_ng.shape[1])])
    config = GenesConfig(iterations=1)
    every = np.arange(x_ng.shape[1])
    partition = partition_genes(
        x_ng, genes, every, cells.batch_n, lambda g: fit_projection(x_ng, g, 10)[1], config, 0, 1
    )
    return fit_streams(x_ng, cells.batch_n, 4, partition, FeaturesConfig(anchor_dims=9, variant_dims=7), 0, 1)


def store_of(cells: Synthetic) -> CountingStore:
    return CountingStore(MemoryStore(anndata.AnnData(sparse.csr_matrix(cells.counts_ng.astype(np.float32)))))


def targets(folder: Path, n: int) -> dict[str, Path]:
    paths = {name: folder / f"{name}.npy" for name in ("anchor", "anchor_corrected", "variant")}
    for name, path in paths.items():
        create_array(path, (n, 7 if name == "variant" else 9), "float32")
    return paths


def test_rows_are_read_once_and_do_not_depend_on_the_block(cells: Synthetic, streams: Streams, tmp_path: Path) -> None:
    store, n = store_of(cells), len(cells.batch_n)
    paths = targets(tmp_path, n)
    done: list[int] = []
    job = OnePass(store, streams, "counts")
    write_features(job, cells.batch_n, paths, budget=1, workers=2, advance=done.append)
    assert (store.reads == 1).all()
    assert store.largest == MIN_BLOCK < n
    assert sum(done) == n
    whole = streams.encode(cells.log_csr, cells.batch_n)
    for name, path in paths.items():
        np.testing.assert_allclose(np.load(path), getattr(whole, name), rtol=1e-3, atol=1e-4)


def test_rows_are_written_where_they_belong_and_nowhere_else(tmp_path: Path) -> None:
    create_array(tmp_path / "x.npy", (10, 3), "float32")[:] = 7
    values = np.arange(12, dtype=np.float64).reshape(4, 3)
    write_rows(tmp_path / "x.npy", 5, values, sync=True)
    expected = np.full((10, 3), 7.0)
    expected[5:9] = values
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected)


def test_bad_values_stop_the_pass(cells: Synthetic, streams: Streams, tmp_path: Path) -> None:
    counts = cells.counts_ng.copy()
    counts[-1, 3] = -1
    store = MemoryStore(anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32))))
    with pytest.raises(DataError, match="negative"):
        write_features(OnePass(store, streams, "counts"), cells.batch_n, targets(tmp_path, len(counts)), 10**9, 1)


def test_block_size_follows_the_budget(cells: Synthetic) -> None:
    store = store_of(cells)
    per_cell = store.nonzeros_per_cell * 40
    assert block_size(store, int(2 * 1_000 * per_cell) + 1, workers=2) == 1_000
    assert block_size(store, 10**15, workers=2) == MAX_BLOCK
    assert block_size(store, 10**15, workers=2, most=1_234) == 1_234
    store.row_access = "scan"
    assert block_size(store, 10**15, workers=2) > MAX_BLOCK
