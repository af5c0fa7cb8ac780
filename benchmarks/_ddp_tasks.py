"""What `ddp.py` runs in processes of their own, one or several that torchrun starts: it trains, and says how fast."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WARM = 10  # steps that are not counted: buffers are allocated, the page cache is filled
IN_RAM = 8  # minibatches that the floor takes in turn


def train(run: str, batch: int, steps: int, threads: int) -> dict[str, Any]:
    """Train both phases as a run does, without validation; cells a second of each."""
    from schelix_scale.compute import torch_at_work
    from schelix_scale.training.dist import joined
    from schelix_scale.training.loop import train as train_model

    with torch_at_work(threads), joined("cpu") as ranks, tempfile.TemporaryDirectory() as folder:
        training, features = _training(run, batch, steps, Path(ranks.agree(folder)), ranks)
        clock = _clock()
        train_model(training, features, clock)
        return {"rank": ranks.rank, "world": ranks.world, "speed": clock.speeds(), **memory()}


def floor(run: str, batch: int, steps: int, threads: int) -> dict[str, Any]:
    """Make the same steps of minibatches that are in RAM: what computing alone takes."""
    import numpy as np
    import torch

    from schelix_scale.compute import torch_at_work
    from schelix_scale.training.checkpoint import TrainState
    from schelix_scale.training.dist import ALONE
    from schelix_scale.training.log import TrainingLog
    from schelix_scale.training.loop import build_model, weights
    from schelix_scale.training.phase import Phase

    speeds = {}
    with torch_at_work(threads), tempfile.TemporaryDirectory() as folder:
        training, features = _training(run, batch, steps, Path(folder), ALONE)
        model = build_model(features, training.config, 0)
        for number, (name, budget) in enumerate(training.phases(model)):
            state = TrainState(number, 0, "", np.inf, 0, weights(model), weights(model), None)
            phase = Phase(
                training, model, features, state, name, budget, None, TrainingLog(Path(folder), [name], False)
            )
            rows = [phase.rows[phase.plan.rows(step)] for step in range(IN_RAM)]
            ready = [phase.batches.cells(part, [0, step]) for step, part in enumerate(rows)]
            cells = 0
            for step in range(WARM + steps):
                if step == WARM:
                    started, cells = time.perf_counter(), 0
                loss = phase.loss(ready[step % IN_RAM])
                phase.optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                phase.optimizer.step()
                cells += ready[step % IN_RAM].total
            speeds[name] = cells / (time.perf_counter() - started)
    return {"rank": 0, "world": 1, "speed": speeds, **memory()}


def idle(**_: Any) -> dict[str, Any]:
    """Import torch, join the other ranks, and do nothing: torch's own memory."""
    import torch

    from schelix_scale.training.dist import joined

    with joined("cpu") as ranks:
        model = ranks.averaged(torch.nn.Linear(4, 4)) if not ranks.alone else torch.nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(model.parameters())
        torch.autograd.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()
        return {"rank": ranks.rank, "world": ranks.world, **memory()}


def scvi(run: str, batch: int, steps: int, threads: int, cells: int, epochs: int = 3) -> dict[str, Any]:
    """Train scVI with its defaults on the run's genes of some cells; cells a second of its epochs but the first."""
    import warnings

    import anndata
    import numpy as np
    import torch
    from scvi.model import SCVI

    from schelix_scale.continuing import recorded_context
    from schelix_scale.progress import QuietReporter
    from schelix_scale.run import RunDirectory

    torch.set_num_threads(threads)
    directory = RunDirectory.open(run)
    context = recorded_context(directory, ["train"], QuietReporter(), None)
    import pandas as pd

    roles = pd.read_parquet(directory.path / "genes.parquet")["role"]
    genes = np.flatnonzero((roles != "unused").to_numpy())
    rows = np.sort(np.random.default_rng(0).choice(context.store.n_cells, min(cells, context.store.n_cells), False))
    adata = anndata.AnnData(context.store.read(rows, genes))
    adata.obs["batch"] = context.batches.codes[rows].astype(str)
    marks: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SCVI.setup_anndata(adata, batch_key="batch")
        model = SCVI(adata)
        from lightning.pytorch.callbacks import Callback

        class Marks(Callback):
            def on_train_epoch_start(self, *_: Any) -> None:
                marks.append(time.perf_counter())

            def on_train_epoch_end(self, *_: Any) -> None:
                marks.append(time.perf_counter())

        options = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "callbacks": [Marks()]}
        model.train(max_epochs=epochs, train_size=1.0, **options)
    seconds = [marks[i + 1] - marks[i] for i in range(2, len(marks), 2)]
    return {"cells": len(rows), "genes": len(genes), "speed": {"scvi": len(rows) * len(seconds) / sum(seconds)}}


def memory() -> dict[str, float]:
    """Return what this process holds, MB: by itself, and with its share of what it has in common with others."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:])
    found = {line[0].removesuffix(":"): int(line[1]) / 1e3 for line in lines}
    return {
        "private_mb": found["Private_Clean"] + found["Private_Dirty"],
        "pss_mb": found["Pss"],
        "rss_mb": found["Rss"],
    }


def _training(run: str, batch: int, steps: int, folder: Path, ranks: Any) -> tuple[Any, Any]:
    """Open a run as its training does, with other numbers of steps."""
    import torch

    from schelix_scale.continuing import recorded_context
    from schelix_scale.progress import QuietReporter
    from schelix_scale.run import RunDirectory
    from schelix_scale.stages.graph import open_cache
    from schelix_scale.stages.model import train_settings
    from schelix_scale.training.loop import Training
    from schelix_scale.training.refresh import open_features

    directory = RunDirectory.open(run)
    context = recorded_context(directory, ["train"], QuietReporter(), ranks)
    features = open_features(open_cache(context, directory), directory.record("graph").details["operator_id"])
    changed = {"batch_size": batch, "align_steps": steps, "refine_steps": steps, "evaluate_every": 10**6}
    changed |= {"max_epochs": 10**6, "refresh": False}
    settings = train_settings(context.config).model_copy(update=changed)
    training = Training(
        settings, 0, torch.device("cpu"), folder, "benchmark", lambda found, _: found, lambda _: features, ranks=ranks
    )
    return training, features


def _clock() -> Any:
    from schelix_scale.progress import Reporter, Stage

    class Clock(Reporter):
        """Notes when each step was done."""

        def __init__(self) -> None:
            self.stages: dict[str, list[tuple[float, int]]] = {}

        @contextmanager
        def stage(self, name: str, total: int | None = None, unit: str = "cells") -> Iterator[Stage]:
            marks = self.stages.setdefault(name.removeprefix("train: "), [])

            class Marks:
                def advance(self, n: int = 1) -> None:
                    marks.append((time.perf_counter(), n))

            yield Marks()

        def say(self, message: str) -> None:
            """Not needed."""

        def warn(self, message: str) -> None:
            """Not needed."""

        def speeds(self) -> dict[str, float]:
            found = {}
            for name, marks in self.stages.items():
                counted = marks[min(WARM, len(marks) // 2) :]
                found[name] = sum(n for _, n in counted[1:]) / (counted[-1][0] - counted[0][0])
            return found

    return Clock()


TASKS = {"train": train, "floor": floor, "idle": idle, "scvi": scvi}

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from schelix_scale.compute import keep_memory_low, share_cores

    share_cores()  # as every run does, before torch is loaded
    keep_memory_low()
    task = json.loads(sys.argv[1])
    out = Path(sys.argv[2]) / f"{os.environ.get('RANK', '0')}.json"
    found = TASKS[task.pop("task")](**task)
    out.write_text(json.dumps(found), encoding="utf-8")
