"""What a whole run reads of its source: every stored chunk at most twice, whatever the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from schelix_scale.pipeline import integrate
from schelix_scale.progress import QuietReporter
from schelix_scale.run import Run
from schelix_scale.stores import open_store

from .counting import CountingStore, count_chunks
from .stores.truth import write_zarr
from .synthetic import make_cells

CHUNK = 1_500
SETTINGS: dict[str, Any] = {
    "genes.iterations": 1,
    "graph.k": 10,
    "graph.method": "exact",
    "train.enabled": False,
    "threads": 2,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,600 cells of 120 genes in chunks of about 17 cells."""
    cells = make_cells(n_types=3, per_group=300, n_genes=120, depth=400.0)
    obs = pd.DataFrame({"batch": pd.Categorical([f"b{code}" for code in cells.batch_n])})
    obs.index = [f"c{i}" for i in range(len(obs))]
    adata = ad.AnnData(sparse.csr_matrix(cells.counts_ng.astype(np.float32)), obs=obs)
    return write_zarr(adata, tmp_path_factory.mktemp("source") / "cells.zarr", 3, chunks=(CHUNK,))


@pytest.mark.parametrize(("memory", "least_blocks"), [("1GB", 2), ("16MB", 15)])
def test_a_chunk_is_read_twice_in_a_run_and_once_more_at_the_edges_of_blocks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str, least_blocks: int
) -> None:
    store, chunks = CountingStore(open_store(source)), count_chunks(monkeypatch)
    run = integrate(
        store,
        batch_key="batch",
        out=tmp_path / "run",
        reporter=QuietReporter(),
        max_memory=memory,
        **SETTINGS,
        **{"sketch.max_cells": 1_000},
    )
    assert len(run.embedding) == store.n_cells == 3_600
    assert set(np.unique(store.reads)) == {1, 2}, "all cells in the pass, those of the sketch before"
    assert (store.reads == 2).sum() == 800 + 2 * 1_000, "the first draw, and the pool of the second"
    assert store.blocks_read >= least_blocks
    stored = int(store.nonzeros_per_cell * store.n_cells)
    for array in ("X/data/c/", "X/indices/c/"):
        counts = np.array([chunks[key] for key in chunks if key.startswith(array)])
        assert len(counts) == -(-stored // CHUNK) > 100
        assert counts.max() <= 4, "in both sweeps at the edge of two blocks"
        assert (counts > 2).sum() <= store.blocks_read
        assert counts.sum() <= 2 * len(counts) + store.blocks_read


def test_a_store_that_fits_the_sketch_is_read_twice(source: Path, tmp_path: Path) -> None:
    store = CountingStore(open_store(source))
    integrate(store, batch_key="batch", out=tmp_path / "run", reporter=QuietReporter(), **SETTINGS)
    assert (store.reads == 2).all()


def test_what_waited_for_the_second_draw_is_gone(source: Path, tmp_path: Path) -> None:
    integrate(
        source, batch_key="batch", out=tmp_path / "run", reporter=QuietReporter(), **SETTINGS, sketch__max_cells=600
    )
    there = {path.name for path in (tmp_path / "run").iterdir()}
    expected = {"manifest.json", "run.json", "genes.parquet", "cells.parquet", "sketch.npz", "streams.npz"}
    assert expected <= there
    assert {name for name in there - expected if not (tmp_path / "run" / name).is_dir()} <= {".lock", "lock"}
    assert Run.open(tmp_path / "run").verify() == []
