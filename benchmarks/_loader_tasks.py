"""What `loader.py` runs in processes of their own: one loader deals shuffled minibatches, and says how fast."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


class Backed:
    """Rows of X of an h5ad file or a zarr directory through anndata's backed matrix, opened in each process."""

    def __init__(self, path: str) -> None:
        self.path, self.opened, self.process = path, None, -1

    def matrix(self) -> Any:
        if self.process != os.getpid():
            import h5py
            import zarr
            from anndata.io import sparse_dataset

            root = h5py.File(self.path, "r") if self.path.endswith(".h5ad") else zarr.open_group(self.path, mode="r")
            self.opened, self.process = sparse_dataset(root["X"]), os.getpid()
        return self.opened

    def __len__(self) -> int:
        return int(self.matrix().shape[0])

    def __getitem__(self, rows: np.ndarray) -> Any:
        return self.matrix()[rows]


def schelix(path: str, batch: int, memory: int) -> Iterable[Any]:
    """Our own, with blocks and buffers as they follow from ``memory`` (bytes)."""
    from schelix_scale.stores import open_store
    from schelix_scale.training.loader import StreamLoader, shuffle_for

    store = open_store(path)
    return (found.x_ng for found in StreamLoader(store, batch_size=batch, shuffle=shuffle_for(store, memory)).epoch(0))


def scdataset(path: str, batch: int, block: int, fetch: int, workers: int) -> Iterable[Any]:
    """Read with scDataset: ``block`` cells in a row, ``fetch`` minibatches at a time, in ``workers`` processes."""
    from scdataset import BlockShuffling, scDataset
    from torch.utils.data import DataLoader

    dataset = scDataset(Backed(path), BlockShuffling(block_size=block), batch_size=batch, fetch_factor=fetch, seed=0)
    ahead = {"prefetch_factor": fetch + 1} if workers else {}
    return DataLoader(dataset, batch_size=None, collate_fn=_as_it_is, num_workers=workers, **ahead)


def _as_it_is(found: Any) -> Any:
    return found


def tiledbsoma_ml(path: str, batch: int, chunk: int, fetch: int) -> Iterable[Any]:
    """Read with TileDB-SOMA-ML: chunks of ``chunk`` cells, ``fetch`` cells at a time, the next while these are used."""
    import tiledbsoma
    from tiledbsoma_ml import ExperimentDataset, experiment_dataloader

    with tiledbsoma.Experiment.open(path) as experiment, experiment.axis_query("RNA") as query:
        dataset = ExperimentDataset(
            query,
            layer_name="data",
            batch_size=batch,
            io_batch_size=fetch,
            shuffle_chunk_size=chunk,
            seed=0,
            return_sparse_X=True,
        )
        return (x_ng for x_ng, _ in experiment_dataloader(dataset))


LOADERS = {"schelix": schelix, "scDataset": scdataset, "TileDB-SOMA-ML": tiledbsoma_ml}


def deal(loader: str, path: str, batch: int, batches: int | None, settings: dict[str, int]) -> dict[str, float]:
    """Take the minibatches of an epoch, or the first ones; the clock runs from before the first is asked for.

    CPU seconds are those of workers too, after they ended.
    """
    source = LOADERS[loader](path, batch, **settings)
    cells = values = 0
    cpu, started = sum(os.times()[:4]), time.perf_counter()
    for number, x_ng in enumerate(source, start=1):
        cells, values = cells + x_ng.shape[0], values + int(x_ng.nnz)
        if number == batches:
            break
    seconds = time.perf_counter() - started
    return {"cells": cells, "values": values, "seconds": seconds, "cpu_seconds": sum(os.times()[:4]) - cpu}


if __name__ == "__main__":  # workers may import this file again
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    task = json.loads(sys.argv[1])
    Path(sys.argv[2]).write_text(json.dumps(deal(**task)), encoding="utf-8")
