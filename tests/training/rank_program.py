"""What the tests of several ranks start: one process of a training, with gloo, as torchrun would start it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from schelix_scale import embedding
from schelix_scale.config import TrainConfig
from schelix_scale.errors import GraphError, SchelixError, TrainingError
from schelix_scale.model.loadings import Loadings
from schelix_scale.model.streams import DualStream
from schelix_scale.stores.known_labels import UNKNOWN
from schelix_scale.training.batches import Batches
from schelix_scale.training.data import CachedFeatures, Cells
from schelix_scale.training.dist import Ranks, end_at_once, joined
from schelix_scale.training.expression import Expressed
from schelix_scale.training.labels import Labels
from schelix_scale.training.loop import build_model, train
from schelix_scale.training.step import StepLoss
from tests.training.tools import CONFIG, Cache, Counting, cached, diffused, neighbours, stream_inputs, training_in

CPU = torch.device("cpu")
SPLITS = [  # fewer rows than ranks, too
    *[("align", alignment, n, "") for alignment in ("asymmetric", "symmetric") for n in (47, 1)],
    *[("refine", "asymmetric", n, more) for more in ("", "labels", "loadings") for n in (47, 1)],
    ("align", "symmetric", 31, "loadings"),
]
LABELLED = 0.4  # of the cells


def start(world: int, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """Run this module in ``world`` processes and return them when all have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in map(str, range(world)):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.training.rank_program", *map(str, arguments)],
                env=os.environ | ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
                cwd=Path(__file__).parents[2],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = []
    for process in processes:
        out, error = process.communicate(timeout=120)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, error))
    return ended


@dataclass(frozen=True)
class Recording(CachedFeatures):
    """Features that write down which rows they are asked for, a line each time."""

    file: Path = Path()

    def cells(
        self, rows: np.ndarray, device: torch.device, expressed: Expressed | None = None, hops: slice = slice(None)
    ) -> Cells:
        with self.file.open("a") as file:
            file.write(json.dumps([self.operator_id, np.asarray(rows).tolist()]) + "\n")
        return super().cells(rows, device, expressed, hops)


class RecordingCache(Cache):
    """Versions that record. The second one follows from the data alone, so that every process can open it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        super().__init__(self.recording(cached()))

    def recording(self, features: CachedFeatures) -> Recording:
        parts = {field.name: getattr(features, field.name) for field in fields(CachedFeatures)}
        return Recording(**parts, file=self.file)

    def refresh(self, features: CachedFeatures, model: DualStream) -> CachedFeatures:
        return self.reopen("second")

    def reopen(self, name: str) -> CachedFeatures:
        if name == "second" and name not in self.versions:
            anchor, variant, batch_n = stream_inputs(0)
            operator = neighbours(np.hstack([anchor, variant]), 6)
            parts = diffused(operator, anchor), diffused(operator, variant), batch_n
            self.versions[name] = self.recording(CachedFeatures(name, operator, *parts))
        return self.versions[name]


def known_labels(features: CachedFeatures) -> Labels:
    """Two labels that features do not show, of some cells."""
    rng = np.random.default_rng(4)
    label_n = rng.integers(0, 2, features.n_cells)
    label_n[rng.random(features.n_cells) > LABELLED] = UNKNOWN
    return Labels.arrange(label_n, features.batch_n)


def expressed_by(features: CachedFeatures, rows: np.ndarray) -> Expressed:
    """Hop 0 of cells as the cache has it, and sparse values of nine and eight genes."""
    genes = np.random.default_rng(6).random((features.n_cells, 17)).astype(np.float32)
    anchor, variant = (sparse.csr_matrix(np.where(part > 0.6, part, 0)[rows]) for part in (genes[:, :9], genes[:, 9:]))
    return Expressed(features.anchor_nta[rows, 0], features.variant_ntv[rows, 0], anchor, variant)


def gradients(ranks: Ranks, phase: str, alignment: Any, n: int, more: str) -> dict[str, torch.Tensor]:
    """Gradients of all weights in a step of n rows, from weights that are not at their start."""
    config, features = CONFIG.model_copy(update={"alignment": alignment}), cached()
    model = build_model(features, config, 0)
    if more == "loadings":
        model.loadings = Loadings((9, features.anchor_nta.shape[2]), (8, features.variant_ntv.shape[2]))
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    labels = known_labels(features) if more == "labels" else None
    batches = Batches(features, CPU, ranks, phase, config.reach, labels, 0.5)
    rows = np.random.default_rng(n).permutation(features.n_cells)[:n]
    learning = ["variant_encoder", "loadings.variant", *(["anchor_encoder"] if alignment == "symmetric" else [])]
    for name, weight in model.named_parameters():
        weight.requires_grad_(phase == "refine" or name.startswith(tuple(learning)))
    loss: torch.nn.Module = StepLoss(model, phase, config, ranks)
    loss = loss if ranks.alone else ranks.averaged(loss)
    expressed = expressed_by(features, rows[batches.mine(rows)]) if more == "loadings" else None
    torch.autograd.backward(loss(batches.cells(rows, [1, 2], expressed)))
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def embed(ranks: Ranks, path: Path) -> None:
    """Write the embedding of an untrained model, 50 cells a block."""
    features, embedding.ENCODE_CELLS = cached(), 50
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(features.n_cells)])
    keys = {"X_schelix": "fused", "X_schelix_variant": "variant"}
    embedding.write_embedding(path, build_model(features, CONFIG, 0), features, keys, obs, {}, CPU, ranks=ranks)


def train_recorded(folder: Path, attempt: str, config: TrainConfig, ranks: Ranks, at_step: Any) -> DualStream:
    """Train, or go on; ``folder/rows-*`` gets the rows that this rank asks for."""
    cache = RecordingCache(folder / f"rows-{attempt}-{ranks.rank}.jsonl")
    training = replace(training_in(folder / "checkpoints", cache, config), ranks=ranks)
    return train(training, cache.reopen("first"), Counting(at_step))[0]


def main(what: str, folder: Path, attempt: str, stop: int, victim: int, config: TrainConfig) -> None:
    """Compute gradients or err, and train until rank ``victim``, or all if it is -1, is killed after ``stop`` steps."""
    with joined("cpu") as ranks:
        if what == "err" and victim in (ranks.rank, -1):
            time.sleep(1 if ranks.main else 0)
            raise GraphError("there is no graph")
        if what == "err":
            ranks.agree(None)
        if what == "gradients":
            found = [gradients(ranks, *split) for split in SPLITS]
            if ranks.main:
                torch.save(found, folder / "gradients.pt")
            embed(ranks, folder / "embedding.zarr")

        def at_step(step: int) -> None:
            if step == stop and victim in (ranks.rank, -1):
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            model = train_recorded(folder, attempt, config, ranks, at_step)
        except TrainingError as error:
            if what == "diverge":
                _leave(folder, ranks, error)
            raise
        torch.save(model.state_dict(), folder / f"weights-{ranks.rank}.pt")


def _leave(folder: Path, ranks: Ranks, error: TrainingError) -> None:
    """Write down what this rank says; the main one takes its time, the others note whether it has spoken by then."""
    if ranks.main:
        time.sleep(1)
        (folder / "said").write_text(str(error))
    else:
        (folder / f"ended-{ranks.rank}").write_text(f"{type(error).__name__} {error} {(folder / 'said').exists()}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = TrainConfig.model_validate_json(sys.argv[6])
    try:
        main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), settings)
    except SchelixError:
        traceback.print_exc()
        end_at_once(1)
    end_at_once(0)
