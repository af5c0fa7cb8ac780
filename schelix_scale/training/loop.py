"""Cached features -> a trained dual-stream model, through the phases Align and Refine (METHOD section 5).

Rows, positives and validation are pure functions of the seed and the step, and every evaluation is
checkpointed: a training that was killed goes on from its last checkpoint to the same result.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from schelix_scale.config import TrainConfig
from schelix_scale.errors import TrainingError
from schelix_scale.model.losses import contrast, pull_together
from schelix_scale.model.streams import DualStream, Latent
from schelix_scale.progress import Reporter
from schelix_scale.training.checkpoint import TrainState, clear_checkpoints, latest_checkpoint, save_checkpoint
from schelix_scale.training.data import CachedFeatures, Cells
from schelix_scale.training.labels import Labels
from schelix_scale.training.plan import Plan

WALK_STEPS, WALK_TAG = 2, 0x3A1C
VALIDATION_SHARE = 0.05
MAX_VALIDATION = 2_000
SLOW, WARM_UP = 0.1, 0.1
STEPS_AN_EPOCH, FEWEST_ROWS = 8, 48  # small data are cut into more steps: few steps teach little
ALIGN, REFINE = "align", "refine"


@dataclass(frozen=True)
class Training:
    """What a training is made of, apart from its state.

    Attributes
    ----------
    config
        Phases, steps, bounds.
    seed
        Seed of the weights, the plan and the walks.
    device
        Where the model computes.
    folder
        Where checkpoints and ``metrics.jsonl`` go.
    fingerprint
        Names this training; checkpoints of another one are not resumed.
    refresh
        Called between phases with the current features and model; returns the features to go on with.
    reopen
        Opens the features of an operator id, when a checkpoint is resumed.
    labels
        Known labels of some cells, if there are any: Refine pulls towards cells of the same label as well.
    """

    config: TrainConfig
    seed: int
    device: torch.device
    folder: Path
    fingerprint: str
    refresh: Callable[[CachedFeatures, DualStream], CachedFeatures]
    reopen: Callable[[str], CachedFeatures]
    labels: Labels | None = None

    def phases(self, model: DualStream) -> list[tuple[str, int]]:
        """Return the phases with their step budgets; a single stream has nothing to align."""
        refine = (REFINE, self.config.refine_steps)
        return [refine] if model.single_stream else [(ALIGN, self.config.align_steps), refine]


def build_model(features: CachedFeatures, config: TrainConfig, seed: int) -> DualStream:
    """Make the untrained model for these features; the same seed gives the same weights."""
    hops, anchor_dims = features.anchor_nta.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DualStream(hops, anchor_dims, features.variant_ntv.shape[2], *features.scales(), config)


def train(training: Training, features: CachedFeatures, reporter: Reporter) -> tuple[DualStream, CachedFeatures]:
    """Train, or go on with a training that was interrupted; return the best model and its features.

    Raises
    ------
    TrainingError
        The loss is not finite.
    """
    model = build_model(features, training.config, training.seed).to(training.device)
    state = latest_checkpoint(training.folder, training.fingerprint)
    if state is None:
        clear_checkpoints(training.folder)
        state = TrainState(0, 0, features.operator_id, float("inf"), 0, weights(model), weights(model), None)
    else:
        features = training.reopen(state.operator_id)
        reporter.say(f"training goes on from phase {state.phase + 1}, step {state.step}")
    phases = training.phases(model)
    while state.phase < len(phases):
        name, budget = phases[state.phase]
        _run_phase(training, model, features, state, name, budget, reporter)
        model.load_state_dict(state.best_model)
        if state.phase + 1 < len(phases):
            features = training.refresh(features, model)
        state = TrainState(
            state.phase + 1, 0, features.operator_id, float("inf"), 0, weights(model), weights(model), None
        )
        save_checkpoint(training.folder, state, training.fingerprint)
    model.load_state_dict(state.model)
    return model.eval(), features


def _run_phase(
    training: Training,
    model: DualStream,
    features: CachedFeatures,
    state: TrainState,
    name: str,
    budget: int,
    reporter: Reporter,
) -> None:
    """Train one phase until its budget or until validation stops improving; leaves the best weights in ``state``."""
    config = training.config
    if state.stale >= config.patience:
        return
    rows_train, rows_valid = split_rows(features.n_cells, training.seed)
    size = min(config.batch_size, max(FEWEST_ROWS, len(rows_train) // STEPS_AN_EPOCH), len(rows_train))
    plan = Plan(len(rows_train), size, (training.seed, state.phase))
    budget = min(budget, config.max_epochs * plan.steps_per_epoch)
    model.load_state_dict(state.model)
    optimizer = _optimizer(model, name, config)
    if state.optimizer is not None:
        optimizer.load_state_dict(state.optimizer)
    started, first = time.monotonic(), state.step
    with reporter.stage(f"train: {name}", budget, "steps") as progress:
        progress.advance(state.step)
        while state.step < budget:
            due = state.step % config.evaluate_every == 0 and (state.step > first or np.isinf(state.best_loss))
            if due and _evaluate(training, model, features, state, name, rows_valid, optimizer):
                break
            rows = rows_train[plan.rows(state.step)]
            loss = batch_loss(training, model, features, name, rows, [training.seed, WALK_TAG, state.phase, state.step])
            _set_rate(optimizer, (state.step + 1) / (budget + 1))
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            _require_finite(loss.item(), training, state, name)
            optimizer.step()
            state.step += 1
            progress.advance(1)
        else:
            _evaluate(training, model, features, state, name, rows_valid, optimizer)
    _log(training.folder, {"phase": name, "event": "end", "step": state.step, "seconds": time.monotonic() - started})


def _evaluate(
    training: Training,
    model: DualStream,
    features: CachedFeatures,
    state: TrainState,
    name: str,
    rows_valid: np.ndarray,
    optimizer: torch.optim.Optimizer,
) -> bool:
    """Validate, note the best weights, save a checkpoint; return whether to stop."""
    model.eval()
    with torch.no_grad():
        loss = float(batch_loss(training, model, features, name, rows_valid, [training.seed, 0x7A11D]))
    model.train()
    _require_finite(loss, training, state, name)
    improved = loss < state.best_loss - 1e-4 * abs(state.best_loss if np.isfinite(state.best_loss) else 0.0)
    if improved:
        state.best_loss, state.stale, state.best_model = loss, 0, weights(model)
    else:
        state.stale += 1
    state.model, state.optimizer = weights(model), deepcopy(optimizer.state_dict())
    save_checkpoint(training.folder, state, training.fingerprint)
    _log(training.folder, {"phase": name, "event": "evaluate", "step": state.step, "validation_loss": loss})
    return state.stale >= training.config.patience


def _require_finite(loss: float, training: Training, state: TrainState, name: str) -> None:
    if not np.isfinite(loss):
        raise TrainingError(
            f"the loss of phase {name} is {loss} at step {state.step}. The last good checkpoint is in "
            f"{training.folder}. Lower train.learning_rate (now {training.config.learning_rate}) and integrate again."
        )


def split_rows(n_cells: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split cells into training rows and held-out validation rows (5 %, at most 2,000), both sorted."""
    held_out = min(MAX_VALIDATION, max(2, int(VALIDATION_SHARE * n_cells)))
    order = np.random.default_rng([seed, 0x5711]).permutation(n_cells)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def batch_loss(
    training: Training, model: DualStream, features: CachedFeatures, phase: str, rows: np.ndarray, seed: list[int]
) -> Tensor:
    """Loss of a phase on ``rows`` and on the ends of random walks from them along the operator."""
    rng, config = np.random.default_rng(seed), training.config
    own = features.cells(rows, training.device)
    if phase == ALIGN:
        positives = features.operator.walk(rows, WALK_STEPS, rng)
        return align_loss(model, own, features.cells(positives, training.device), config)
    path = features.operator.path(rows, config.reach, rng)
    ends = path[-1] if training.labels is None else training.labels.redirect(path, config.label_share, rng)
    return refine_loss(model, own, features.cells(ends, training.device), config)


def align_loss(model: DualStream, own: Cells, other: Cells, config: TrainConfig) -> Tensor:
    """Align: each cell's Variant latent finds the Anchor latent of its positive, which gets no gradient."""
    latent = model(own.anchor, own.variant)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.alignment == "symmetric"):
        target = model(other.anchor, other.variant).anchor
    return contrast(latent.variant, target, own.batch, other.batch, config.temperature)


def refine_loss(model: DualStream, own: Cells, far: Cells, config: TrainConfig) -> Tensor:
    """Refine: fused latents are pulled towards the backbone of far cells of their own kind, and held by their own."""
    latent: Latent = model(own.anchor, own.variant)
    return pull_together(latent.fused, latent.backbone, model.backbone(far.anchor), config.pull)


def _optimizer(model: DualStream, phase: str, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the phase's parameters; in Refine the Variant stream, aligned already, learns ten times slower."""
    rate = config.learning_rate
    anchor = list(model.anchor_encoder.parameters())
    if model.single_stream:
        groups = [{"params": anchor, "lr": rate}]
    elif phase == ALIGN:
        groups = [{"params": list(model.variant_encoder.parameters()), "lr": rate}]
        if config.alignment == "symmetric":
            groups.append({"params": anchor, "lr": rate})
    else:
        gate = [*model.gate.parameters(), *model.variant_map.parameters(), *model.variant_norm.parameters()]
        groups = [
            {"params": [*anchor, *gate], "lr": rate},
            {"params": list(model.variant_encoder.parameters()), "lr": rate * SLOW},
        ]
    for group in groups:
        group["peak"] = group["lr"]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=1e-4)


def _set_rate(optimizer: torch.optim.Optimizer, progress: float) -> None:
    """Warm up over the first tenth of the phase, then fall to zero along a cosine; ``progress`` is in [0, 1]."""
    share = progress / WARM_UP if progress < WARM_UP else (1 + math.cos(math.pi * progress)) / 2
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def weights(model: DualStream) -> dict[str, Tensor]:
    """Copy the model's state to the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _log(folder: Path, entry: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
