"""A tiny training whose cache is made without the package's diffusion, and ways to interrupt it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from schelix_scale.config import TrainConfig
from schelix_scale.graph.operator import Operator
from schelix_scale.model.streams import DualStream
from schelix_scale.progress import Reporter, Stage
from schelix_scale.training.data import CachedFeatures, Cells
from schelix_scale.training.dist import ALONE
from schelix_scale.training.loop import Training, train
from schelix_scale.training.step import StepCells, StepLoss

N = 240
CONFIG = TrainConfig(
    width=16,
    anchor_residual=0.1,
    gate=0.2,
    batch_size=48,
    align_steps=23,
    refine_steps=17,
    learning_rate=3e-3,
    temperature=0.2,
    reach=6,
    pull=0.7,
    refresh=True,
    max_epochs=40,
    evaluate_every=5,
    patience=100,
)
TOTAL_STEPS = CONFIG.align_steps + CONFIG.refine_steps


class Interrupted(Exception):
    """Raised by a test where a process would have been killed."""


class Counting(Reporter):
    """Counts steps over all stages and calls ``at_step`` after each."""

    def __init__(self, at_step: Callable[[int], None] = lambda _: None) -> None:
        self.steps = 0
        self.stages: list[tuple[str, int | None]] = []
        self.at_step = at_step

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "cells") -> Iterator[Stage]:
        """Count how often the stage advances."""
        self.stages.append((name, total))
        reporter = self

        class Count:
            def advance(self, n: int = 1) -> None:
                reporter.steps += 1
                reporter.at_step(reporter.steps)

        yield Count()

    def say(self, message: str) -> None:
        """Not needed."""

    def warn(self, message: str) -> None:
        """Not needed."""


def neighbours(z_nd: np.ndarray, k: int = 8) -> Operator:
    """Equal weights on the k nearest cells."""
    distances = ((z_nd[:, None] - z_nd[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    indices = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return Operator(indices.astype(np.int32), np.full(indices.shape, 1 / k, np.float32))


def diffused(operator: Operator, x_nd: np.ndarray) -> np.ndarray:
    """Hops 0, 1 and 3 of plain averaging over neighbours."""
    scales = [x_nd]
    for _ in range(3):
        scales.append(scales[-1][operator.indices_nk].mean(axis=1))
    return np.ascontiguousarray(np.stack([scales[t] for t in (0, 1, 3)], axis=1), np.float32)


def stream_inputs(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Anchors (n, 6) of four types in two batches; Variants (n, 5) of the same types, displaced by batch."""
    rng = np.random.default_rng(seed)
    type_n, batch_n = rng.integers(0, 4, N), rng.integers(0, 2, N)
    anchor = 3 * rng.normal(size=(4, 6))[type_n] + 0.5 * rng.normal(size=(N, 6))
    variant = 3 * rng.normal(size=(4, 5))[type_n] + 2 * rng.normal(size=(2, 5))[batch_n] + rng.normal(size=(N, 5))
    return anchor, variant, batch_n


def cached(seed: int = 0, single_stream: bool = False) -> CachedFeatures:
    anchor, variant, batch_n = stream_inputs(seed)
    operator = neighbours(anchor)
    variant = variant[:, :0] if single_stream else variant
    return CachedFeatures("first", operator, diffused(operator, anchor), diffused(operator, variant), batch_n)


class Cache:
    """Refreshes by a new graph on the model's Anchor latents, a function of (features, model); reopens by id."""

    def __init__(self, first: CachedFeatures, after_refresh: Callable[[], None] = lambda: None) -> None:
        self.versions = {first.operator_id: first}
        self.after_refresh = after_refresh
        self.refreshed: list[tuple[str, dict[str, torch.Tensor]]] = []

    def refresh(self, features: CachedFeatures, model: DualStream) -> CachedFeatures:
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.refreshed.append((features.operator_id, weights))
        cells = features.cells(np.arange(N), torch.device("cpu"))
        with torch.no_grad():
            operator = neighbours(model(cells.anchor, cells.variant).anchor.numpy(), 6)
        anchor, variant = (diffused(operator, values[:, 0]) for values in (features.anchor_nta, features.variant_ntv))
        self.versions["second"] = CachedFeatures("second", operator, anchor, variant, features.batch_n)
        self.after_refresh()
        return self.versions["second"]

    def reopen(self, name: str) -> CachedFeatures:
        return self.versions[name]


def training_in(
    folder: Path, cache: Cache, config: TrainConfig = CONFIG, seed: int = 0, fingerprint: str = "abc"
) -> Training:
    return Training(config, seed, torch.device("cpu"), folder, fingerprint, cache.refresh, cache.reopen)


def cells_of(steps: int) -> int:
    """Cells of so many steps: 228 of the 240 train, in 4 steps of 48 and one of 36 an epoch."""
    return sum([48, 48, 48, 48, 36][step % 5] for step in range(steps))


def phase_loss(model: DualStream, phase: str, own: Cells, other: Cells, config: TrainConfig = CONFIG) -> torch.Tensor:
    """The loss of a phase on one rank."""
    loss: torch.Tensor = StepLoss(model, phase, config, ALONE)(StepCells(own, other, len(own.batch)))
    return loss


def logged(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(folder: Path, seed: int = 0, data_seed: int = 0, **changed: object) -> tuple[DualStream, Cache, Counting]:
    cache, reporter = Cache(cached(data_seed)), Counting()
    training = training_in(folder, cache, CONFIG.model_copy(update=changed), seed)
    model, _ = train(training, cache.reopen("first"), reporter)
    return model, cache, reporter


def same_weights(one: DualStream, two: DualStream) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
