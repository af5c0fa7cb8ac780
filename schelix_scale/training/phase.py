"""One phase of a training: steps, validation, checkpoints and what is told of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from schelix_scale.config import TrainConfig
from schelix_scale.errors import TrainingError
from schelix_scale.model.streams import DualStream
from schelix_scale.progress import Reporter
from schelix_scale.training.batches import WALK_TAG, Batches, cells_before
from schelix_scale.training.checkpoint import TrainState, newest, save_checkpoint
from schelix_scale.training.data import CachedFeatures
from schelix_scale.training.dist import ALONE, Ranks
from schelix_scale.training.expression import Expressed, Expression
from schelix_scale.training.labels import Labels
from schelix_scale.training.loader import Shuffle, block_plan
from schelix_scale.training.log import TrainingLog
from schelix_scale.training.optimizer import make_optimizer, set_rate
from schelix_scale.training.plan import BlockPlan, Plan
from schelix_scale.training.step import ALIGN, REFINE, StepLoss

VALIDATION_SHARE = 0.05
MAX_VALIDATION = 2_000
STEPS_AN_EPOCH, FEWEST_ROWS = 8, 48  # small data are cut into more steps: few steps teach little
CHECK_EVERY = 10  # steps whose losses are looked at together, so that a GPU need not wait in each


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
    ranks
        Who trains together. The main rank refreshes, decides, saves and logs.
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
    ranks: Ranks = ALONE

    def plan(self, n_rows: int, batch_size: int, phase: int) -> Plan | BlockPlan:
        """Return which of the training rows the steps of a phase have."""
        seed = (self.seed, phase)
        shuffle = self.shuffle if self.expression is None else self.expression.shuffle
        return Plan(n_rows, batch_size, seed) if shuffle is None else block_plan(n_rows, batch_size, seed, shuffle)

    def phases(self, model: DualStream) -> list[tuple[str, int]]:
        """Return the phases with their step budgets; a single stream has nothing to align."""
        refine = (REFINE, self.config.refine_steps)
        return [refine] if model.single_stream else [(ALIGN, self.config.align_steps), refine]


class Phase:
    """A phase from the step that ``state`` is at to its end; leaves the best weights in ``state``.

    ``held_out`` is the expression of this rank's validation rows, where inputs are streamed.
    """

    def __init__(
        self,
        training: Training,
        model: DualStream,
        features: CachedFeatures,
        state: TrainState,
        name: str,
        budget: int,
        held_out: Expressed | None,
        log: TrainingLog,
    ) -> None:
        config, ranks = training.config, training.ranks
        self.training, self.model, self.state, self.name, self.log = training, model, state, name, log
        self.rows, valid = split_rows(features.n_cells, training.seed)
        size = min(config.batch_size, max(FEWEST_ROWS, len(self.rows) // STEPS_AN_EPOCH), len(self.rows))
        self.plan = training.plan(len(self.rows), size, state.phase)
        self.budget = min(budget, config.max_epochs * self.plan.steps_per_epoch)
        evaluated = np.isfinite(state.best_loss)
        self.over = state.stale >= config.patience or (evaluated and state.step >= self.budget)
        if self.over:
            return
        features = features.on(training.device, config.cache_device)
        labels, device = training.labels, training.device
        self.batches = Batches(features, device, ranks, name, config.reach, labels, config.label_share)
        self.valid = self.batches.cells(valid, [training.seed, 0x7A11D], held_out)
        model.load_state_dict(state.model)
        model.requires_grad_(True)
        self.optimizer = make_optimizer(model, name == ALIGN, config)
        if state.optimizer is not None:
            self.optimizer.load_state_dict(state.optimizer)
        learning = {id(weight) for group in self.optimizer.param_groups for weight in group["params"]}
        if name == ALIGN and model.loadings is not None:  # no loss of Align depends on them
            learning.discard(id(model.loadings.anchor))
        for weight in model.parameters():
            weight.requires_grad_(id(weight) in learning)
        self.loss = StepLoss(model, name, config, ranks)
        self.losses = torch.zeros(CHECK_EVERY, device=device)
        self.checked, self.clock = state.step, time.monotonic()

    def run(self, reporter: Reporter) -> None:
        """Train until the budget is used up, or validation has stopped improving."""
        if self.over:
            return
        training, state, ranks = self.training, self.state, self.training.ranks
        started, first, seed = time.monotonic(), state.step, [training.seed, WALK_TAG, state.phase]
        todo = range(first, self.budget)
        steps = self.batches.steps(self.plan, self.rows, seed, todo, training.expression)
        step_loss: torch.nn.Module = self.loss
        if not ranks.alone:
            step_loss = ranks.averaged(self.loss)
        self.model.train()
        left = cells_before(self.plan, self.budget) - cells_before(self.plan, first)
        title = f"train: {self.name}{f' from step {first:,}' if first else ''}"
        with closing(steps), reporter.stage(title, left) as progress:
            while state.step < self.budget:
                if self._due(first) and self._evaluate():
                    break
                cells = next(steps)
                with ranks.together():
                    loss = step_loss(cells)
                    set_rate(self.optimizer, (state.step + 1) / (self.budget + 1))
                    self.optimizer.zero_grad(set_to_none=True)
                    torch.autograd.backward(loss)
                self.losses[state.step % CHECK_EVERY] = loss.detach()
                self.optimizer.step()
                state.step += 1
                progress.advance(cells.total)
                self._look()
            else:
                self._evaluate()
        self.model.requires_grad_(True)
        seconds = time.monotonic() - started
        self.log.write(self.name, "end", state.step, seconds=seconds)
        done = cells_before(self.plan, state.step) - cells_before(self.plan, first)
        beside = "" if ranks.alone else f" on {ranks.world} ranks"
        reporter.say(f"{self.name}: step {state.step:,}{beside}, {done / max(seconds, 1e-9):,.0f} cells/s")

    def _due(self, first: int) -> bool:
        """Whether to validate before the next step: not again right after going on from a validation."""
        state = self.state
        return state.step % self.training.config.evaluate_every == 0 and (
            state.step > first or np.isinf(state.best_loss)
        )

    def _look(self) -> None:
        """After a step: look at the losses, and save, where it is time."""
        config, step = self.training.config, self.state.step
        if step % CHECK_EVERY == 0:
            self._check()
        last = step == self.budget or step % config.evaluate_every == 0  # a validation follows, and saves
        if config.checkpoint_every is not None and step % config.checkpoint_every == 0 and not last:
            self._save()

    def _check(self) -> None:
        """Look at the losses since the last look, the same on all ranks."""
        first, last = self.checked, self.state.step
        if first == last:
            return
        ring = self.training.ranks.mean(self.losses).cpu().numpy()
        losses = ring[np.arange(first, last) % CHECK_EVERY]
        for step, loss in enumerate(losses, first):
            self._require_finite(float(loss), step)
        now, cells = time.monotonic(), cells_before(self.plan, last) - cells_before(self.plan, first)
        speed, rate = cells / max(now - self.clock, 1e-9), self.optimizer.param_groups[0]["lr"]
        self.log.write(
            self.name, "train", last, loss=float(losses.mean()), learning_rate=rate, cells_per_second=round(speed, 1)
        )
        self.checked, self.clock = last, now

    def _evaluate(self) -> bool:
        """Validate, note the best weights, save a checkpoint; return whether to stop, the same on all ranks."""
        self._check()
        state, ranks = self.state, self.training.ranks
        self.model.eval()
        with torch.no_grad():
            loss = ranks.agree(float(ranks.mean(self.loss(self.valid))))
        self.model.train()
        self._require_finite(loss, state.step)
        if loss < state.best_loss - 1e-4 * abs(state.best_loss if np.isfinite(state.best_loss) else 0.0):
            state.best_loss, state.stale, state.best_model = loss, 0, weights(self.model)
        else:
            state.stale += 1
        self.log.write(self.name, "evaluate", state.step, validation_loss=loss)
        self._save()
        self.clock = time.monotonic()
        return state.stale >= self.training.config.patience

    def _save(self) -> None:
        """Save a checkpoint of losses and weights that were looked at."""
        self._check()
        training, state = self.training, self.state
        model = weights(self.model)  # the same on all ranks
        broken = [name for name, value in model.items() if not torch.isfinite(value).all()]
        if broken:
            raise self._diverged(f"{broken[0]} of the model is not finite after step {state.step - 1}")
        if training.ranks.main:
            state.model, state.optimizer = model, deepcopy(self.optimizer.state_dict())
            save_checkpoint(training.folder, state, training.fingerprint, training.config.checkpoints_kept)

    def _require_finite(self, loss: float, step: int) -> None:
        if not np.isfinite(loss):
            raise self._diverged(f"the loss of phase {self.name} is {loss} at step {step}")

    def _diverged(self, what: str) -> TrainingError:
        """Return the error of a training that cannot go on; all ranks have found it, and the main one says it."""
        training = self.training
        if not training.ranks.main:
            return training.ranks.left_to_main()
        last = newest(training.folder)
        return TrainingError(
            f"{what}. {'There is no checkpoint before it' if last is None else f'The last good checkpoint is {last}'}. "
            f"Lower train.learning_rate (now {training.config.learning_rate}) and train again."
        )


def split_rows(n_cells: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split cells into training rows and held-out validation rows (5 %, at most 2,000), both sorted."""
    held_out = min(MAX_VALIDATION, max(2, int(VALIDATION_SHARE * n_cells)))
    order = np.random.default_rng([seed, 0x5711]).permutation(n_cells)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def weights(model: DualStream) -> dict[str, Tensor]:
    """Copy the model's state to the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
