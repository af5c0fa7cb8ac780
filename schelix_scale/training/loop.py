"""Cached features -> a trained dual-stream model, through the phases Align and Refine (METHOD section 5).

Rows, positives and validation are pure functions of the seed and the step, the same for any number of ranks, and
checkpoints hold the step: a training that was killed goes on from its last checkpoint to the same result.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import torch

from schelix_scale.config import TrainConfig
from schelix_scale.model.loadings import Loadings
from schelix_scale.model.streams import DualStream
from schelix_scale.progress import Reporter
from schelix_scale.training.checkpoint import TrainState, clear_checkpoints, latest_checkpoint, newest, save_checkpoint
from schelix_scale.training.data import CachedFeatures
from schelix_scale.training.expression import Expression
from schelix_scale.training.log import TrainingLog, event_writer
from schelix_scale.training.phase import Phase, Training, split_rows, weights
from schelix_scale.training.plan import deal
from schelix_scale.training.warm import load_weights

__all__ = ["Training", "build_model", "split_rows", "train", "weights"]


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


def train(
    training: Training, features: CachedFeatures, reporter: Reporter, start: Path | None = None
) -> tuple[DualStream, CachedFeatures]:
    """Train, or go on with a training that was interrupted; return the best model and its features.

    ``start`` is a file of weights to begin with (`load_weights`), instead of random ones.

    Raises
    ------
    TrainingError
        The loss is not finite.
    RankLost
        Another rank has ended.
    """
    config, ranks = training.config, training.ranks
    if config.tensorboard:
        event_writer()
    model = build_model(features, config, training.seed, training.expression).to(training.device)
    phases = training.phases(model)
    found = ranks.agree(latest_checkpoint(training.folder, training.fingerprint, reporter.warn) if ranks.main else None)
    if found is None:
        if ranks.main:
            if newest(training.folder) is not None:
                reporter.say(
                    f"{training.folder} holds no checkpoint of this training that can be read: those that are there "
                    "are removed, and it begins at its first step"
                )
            clear_checkpoints(training.folder)
        if start is not None:
            load_weights(start, model)
        state = TrainState(0, 0, features.operator_id, float("inf"), 0, weights(model), weights(model), None)
    else:
        state, features = found, training.reopen(found.operator_id)
        reporter.say(f"training goes on from phase {state.phase + 1}, step {state.step}")
    log = TrainingLog(training.folder, [name for name, _ in phases], ranks.main, config.tensorboard)
    log.resume(state.phase, state.step)
    held_out = None
    if training.expression is not None and state.phase < len(phases):
        valid = split_rows(features.n_cells, training.seed)[1]
        held_out = training.expression.read(valid[deal(valid, ranks.rank, ranks.world)])
    with closing(log):
        while state.phase < len(phases):
            Phase(training, model, features, state, *phases[state.phase], held_out, log).run(reporter)
            model.load_state_dict(state.best_model)
            if state.phase + 1 < len(phases):
                features = _refreshed(training, features, model)
            state = TrainState(
                state.phase + 1, 0, features.operator_id, float("inf"), 0, weights(model), weights(model), None
            )
            if ranks.main:
                save_checkpoint(training.folder, state, training.fingerprint, config.checkpoints_kept)
    model.load_state_dict(state.model)
    ranks.wait()
    return model.eval(), features


def _refreshed(training: Training, features: CachedFeatures, model: DualStream) -> CachedFeatures:
    """Refresh on the main rank; the others open what it has made."""
    if training.ranks.main:
        features = training.refresh(features, model)
    name = training.ranks.agree(features.operator_id)
    return features if name == features.operator_id else training.reopen(name)
