"""Cached features -> a trained dual-stream model, through the phases Align and Refine (METHOD section 5).

Rows, positives and validation are pure functions of the seed and the step, and every evaluation is
checkpointed: a training that was killed goes on from its last checkpoint to the same result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from schelix_scale.config import TrainConfig
from schelix_scale.errors import TrainingError
from schelix_scale.model.loadings import Loadings
from schelix_scale.model.losses import contrast, pull_together
from schelix_scale.model.streams import DualStream, Latent
from schelix_scale.progress import Reporter
from schelix_scale.training.checkpoint import TrainState, clear_checkpoints, latest_checkpoint, save_checkpoint
from schelix_scale.training.data import CachedFeatures, Cells
from schelix_scale.training.expression import Expressed, Expression
from schelix_scale.training.labels import Labels
from schelix_scale.training.loader import Shuffle, block_plan
from schelix_scale.training.optimizer import make_optimizer, set_rate
from schelix_scale.training.plan import BlockPlan, Plan

WALK_STEPS, WALK_TAG = 2, 0x3A1C
VALIDATION_SHARE = 0.05
MAX_VALIDATION = 2_000
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
    expression
        Where hop 0 of each step's own cells is read (``train.input = "stream"``); None: in the cache, like the rest.
    shuffle
        Blocks and buffers in which rows are shuffled, those of ``expression`` if there is one; None: one by one.
    """

    config: TrainConfig
    seed: int
    device: torch.device
    folder: Path
    fingerprint: str
    refresh: Callable[[CachedFeatures, DualStream], CachedFeatures]
    reopen: Callable[[str], CachedFeatures]
    labels: Labels | None = None
    expression: Expression | None = None
    shuffle: Shuffle | None = None

    def plan(self, n_rows: int, batch_size: int, phase: int) -> Plan | BlockPlan:
        """Return which of the training rows the steps of a phase have."""
        seed = (self.seed, phase)
        shuffle = self.shuffle if self.expression is None else self.expression.shuffle
        return Plan(n_rows, batch_size, seed) if shuffle is None else block_plan(n_rows, batch_size, seed, shuffle)

    def phases(self, model: DualStream) -> list[tuple[str, int]]:
        """Return the phases with their step budgets; a single stream has nothing to align."""
        refine = (REFINE, self.config.refine_steps)
        return [refine] if model.single_stream else [(ALIGN, self.config.align_steps), refine]


def build_model(
    features: CachedFeatures, config: TrainConfig, seed: int, expression: Expression | None = None
) -> DualStream:
    """Make the untrained model for these features; the same seed gives the same weights, however they are read."""
    hops, anchor_dims = features.anchor_nta.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DualStream(hops, anchor_dims, features.variant_ntv.shape[2], *features.scales(), config)
    if expression is not None and expression.learned:
        model.loadings = Loadings(*expression.shapes)
    return model


def train(training: Training, features: CachedFeatures, reporter: Reporter) -> tuple[DualStream, CachedFeatures]:
    """Train, or go on with a training that was interrupted; return the best model and its features.

    Raises
    ------
    TrainingError
        The loss is not finite.
    """
    model = build_model(features, training.config, training.seed, training.expression).to(training.device)
    state = latest_checkpoint(training.folder, training.fingerprint)
    if state is None:
        clear_checkpoints(training.folder)
        state = TrainState(0, 0, features.operator_id, float("inf"), 0, weights(model), weights(model), None)
    else:
        features = training.reopen(state.operator_id)
        reporter.say(f"training goes on from phase {state.phase + 1}, step {state.step}")
    phases = training.phases(model)
    unfinished = state.phase < len(phases)
    rows_valid = split_rows(features.n_cells, training.seed)[1]
    held_out = training.expression.read(rows_valid) if training.expression is not None and unfinished else None
    while state.phase < len(phases):
        name, budget = phases[state.phase]
        _run_phase(training, model, features, state, name, budget, held_out, reporter)
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
    held_out: Expressed | None,
    reporter: Reporter,
) -> None:
    """Train one phase until its budget or until validation stops improving; leaves the best weights in ``state``.

    ``held_out`` is the expression of the validation rows, where inputs are streamed.
    """
    config = training.config
    if state.stale >= config.patience:
        return
    rows_train, rows_valid = split_rows(features.n_cells, training.seed)
    size = min(config.batch_size, max(FEWEST_ROWS, len(rows_train) // STEPS_AN_EPOCH), len(rows_train))
    plan = training.plan(len(rows_train), size, state.phase)
    valid = rows_valid, features.cells(rows_valid, training.device, held_out)
    budget = min(budget, config.max_epochs * plan.steps_per_epoch)
    model.load_state_dict(state.model)
    optimizer = make_optimizer(model, name == ALIGN, config)
    if state.optimizer is not None:
        optimizer.load_state_dict(state.optimizer)
    started, first = time.monotonic(), state.step
    steps = _steps(training, features, plan, rows_train, state, budget)
    with closing(steps), reporter.stage(f"train: {name}", budget, "steps") as progress:
        progress.advance(state.step)
        while state.step < budget:
            due = state.step % config.evaluate_every == 0 and (state.step > first or np.isinf(state.best_loss))
            if due and _evaluate(training, model, features, state, name, valid, optimizer):
                break
            seed = [training.seed, WALK_TAG, state.phase, state.step]
            loss = batch_loss(training, model, features, name, *next(steps), seed)
            set_rate(optimizer, (state.step + 1) / (budget + 1))
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            _require_finite(loss.item(), training, state, name)
            optimizer.step()
            state.step += 1
            progress.advance(1)
        else:
            _evaluate(training, model, features, state, name, valid, optimizer)
    _log(training.folder, {"phase": name, "event": "end", "step": state.step, "seconds": time.monotonic() - started})


def _steps(
    training: Training,
    features: CachedFeatures,
    plan: Plan | BlockPlan,
    rows_train: np.ndarray,
    state: TrainState,
    budget: int,
) -> Generator[tuple[np.ndarray, Cells], None, None]:
    """Yield the rows and the cells of each step that is left of a phase."""
    first, expression = state.step, training.expression
    if expression is None:
        for step in range(first, budget):
            rows = rows_train[plan.rows(step)]
            yield rows, features.cells(rows, training.device)
        return
    streamed = expression.steps(rows_train, plan.batch_size, plan.seed, first, budget)
    with closing(streamed):
        for rows, expressed in streamed:
            yield rows, features.cells(rows, training.device, expressed)


def _evaluate(
    training: Training,
    model: DualStream,
    features: CachedFeatures,
    state: TrainState,
    name: str,
    valid: tuple[np.ndarray, Cells],
    optimizer: torch.optim.Optimizer,
) -> bool:
    """Validate, note the best weights, save a checkpoint; return whether to stop."""
    model.eval()
    with torch.no_grad():
        loss = float(batch_loss(training, model, features, name, *valid, [training.seed, 0x7A11D]))
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
    training: Training,
    model: DualStream,
    features: CachedFeatures,
    phase: str,
    rows: np.ndarray,
    own: Cells,
    seed: list[int],
) -> Tensor:
    """Loss of a phase on ``rows``, whose inputs are ``own``, and on the ends of random walks from them."""
    rng, config = np.random.default_rng(seed), training.config
    own = own.through(model.loadings)
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


def weights(model: DualStream) -> dict[str, Tensor]:
    """Copy the model's state to the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _log(folder: Path, entry: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
