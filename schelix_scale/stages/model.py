"""Diffused features -> a trained model -> the embedding of every cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from schelix_scale._version import __version__
from schelix_scale.budget import STREAM_SHARE
from schelix_scale.compute import resolve_device, torch_at_work
from schelix_scale.config import WATCHING
from schelix_scale.context import BATCH, ROW, Context, Make
from schelix_scale.publish import checksum
from schelix_scale.records import START
from schelix_scale.run import RunDirectory
from schelix_scale.stages.graph import open_cache

if TYPE_CHECKING:
    import torch

    from schelix_scale.config import Config, TrainConfig
    from schelix_scale.graph.cache import OperatorCache
    from schelix_scale.training.dist import Ranks
    from schelix_scale.training.expression import Expression
    from schelix_scale.training.loader import Shuffle
    from schelix_scale.training.loop import Training

SCALED = ("anchor_residual", "gate", "pull")
DRAWS = 2  # raised when labels are drawn otherwise


def train_model(context: Context, directory: RunDirectory) -> None:
    """Train the dual-stream model on the cached features: checkpoints/, and refreshed operators.

    At strength 0 there is nothing to train, as when ``train.enabled`` is false. All ranks train; the main one writes.
    """
    from schelix_scale.training.checkpoint import TrainState, checkpoint_name, clear_checkpoints, save_checkpoint
    from schelix_scale.training.dist import ALONE
    from schelix_scale.training.loop import build_model, train, weights
    from schelix_scale.training.refresh import open_features
    from schelix_scale.training.warm import choose_start

    settings, ranks = train_settings(context.config), context.ranks or ALONE
    shuffle = ranks.agree(_shuffle(context, settings))  # machines of other memory would mix rows otherwise

    def make(fingerprint: str) -> tuple[list[str], dict[str, Any]]:
        cache = open_cache(context, directory)
        first = directory.record("graph").details["operator_id"]
        features, folder = open_features(cache, first), directory.path / "checkpoints"
        device = ranks.device(resolve_device(context.config.device))
        if settings.enabled:
            if settings.refresh and not features.variant_ntv.shape[2]:
                context.reporter.warn("train.refresh does nothing: a run without Variants has one phase, no between")
            if warm is not None:
                context.reporter.say(f"training starts from the weights in {warm}")
            training = _training(context, directory, settings, cache, device, fingerprint, shuffle)
            model, features = train(training, features, context.reporter, warm)
            last = checkpoint_name(len(training.phases(model)), 0)
        else:
            start = weights(build_model(features, settings, context.config.seed))
            last = checkpoint_name(0, 0)
            if ranks.main:
                clear_checkpoints(folder)
                save_checkpoint(folder, TrainState(0, 0, first, 0.0, 0, start, start, None), fingerprint)
        fresh = [] if features.operator_id == first else cache.artifacts(features.operator_id)
        return ["checkpoints", *fresh, *([START] if warm else [])], {
            "operator_id": features.operator_id,
            "checkpoint": last,
            "device": str(device),
            "ranks": ranks.world,
            "key": fingerprint,
        }

    inputs = {"train": settings.model_dump(mode="json", exclude=set(WATCHING)), "seed": context.config.seed}
    if shuffle is not None:
        inputs["shuffle"] = list(shuffle)  # follows from the memory, and decides the order of steps
    if context.known_labels is not None:
        inputs["labels"] = [context.known_labels.digest, DRAWS]

    def recorded(start: str) -> bool:
        fingerprint = directory.fingerprint("train", 2, {**inputs, "start": start}, ["graph"])
        return directory.record("train").fingerprint == fingerprint

    again = ranks.main and settings.enabled and choose_start(directory, context.warm, context.due, recorded)
    warm = directory.path / START if ranks.agree(again) else None
    if warm is not None:
        inputs["start"] = checksum(warm)
    with torch_at_work(ranks.threads(context.threads)), _deterministic(settings.deterministic):
        _on_all_ranks(context, directory, ranks, "train", 2, inputs, ["graph"], make)


def embed_cells(context: Context, directory: RunDirectory) -> None:
    """Write embedding.zarr, every cell at its row number; each rank writes blocks of rows of its own."""
    from schelix_scale.embedding import KEY, embedding_dims, output_keys, write_embedding
    from schelix_scale.training.checkpoint import TrainState, final_checkpoint
    from schelix_scale.training.dist import ALONE
    from schelix_scale.training.loop import build_model
    from schelix_scale.training.refresh import open_features

    config, settings, ranks = context.config, train_settings(context.config), context.ranks or ALONE

    def trained() -> tuple[dict[str, Any], TrainState | None]:
        details = directory.record("train").details
        return details, final_checkpoint(directory.path / "checkpoints" / details["checkpoint"], details["key"])

    def make(_: str) -> tuple[list[str], dict[str, Any]]:
        details, state = ranks.agree(trained() if ranks.main else ({}, None))
        device = ranks.device(resolve_device(config.device))
        features = open_features(open_cache(context, directory), details["operator_id"])
        assert state is not None, "the main rank has told the state"
        shuffle = _shuffle(context, settings) if settings.loadings == "learned" else None
        expression = _open_expression(context, directory, settings, shuffle)
        model = build_model(features, settings, config.seed, expression).to(device)
        model.load_state_dict(state.model)
        if config.embed.fuse == "concatenate" and model.single_stream:
            context.reporter.warn('embed.fuse = "concatenate" does nothing: this run has no Variant stream')
        keys = output_keys(model, settings.enabled, config.embed)
        obs = pd.read_parquet(directory.path / "cells.parquet").drop(columns=[ROW, BATCH])
        uns = {
            "version": __version__,
            "config": config.model_dump_json(),
            "source": directory.source["uri"],
            "source_fingerprint": context.source_fingerprint,
            "operator_id": details["operator_id"],
        }
        target = directory.publish("embedding.zarr") if ranks.main else nullcontext(Path())
        with context.reporter.stage("embed", context.store.n_cells) as progress, target as path:
            path = Path(ranks.agree(str(path)))
            write_embedding(path, model, features, keys, obs, uns, device, progress.advance, expression, ranks)
        return ["embedding.zarr"], {"dims": embedding_dims(features, keys[KEY]), "keys": list(keys)}

    with torch_at_work(ranks.threads(context.threads)):
        _on_all_ranks(context, directory, ranks, "embed", 1, {"embed": config.embed}, ["genes", "train"], make)


def _on_all_ranks(
    context: Context,
    directory: RunDirectory,
    ranks: Ranks,
    name: str,
    version: int,
    inputs: Mapping[str, Any],
    after: Sequence[str],
    make: Make,
) -> None:
    """Let all ranks make a stage if the main one, which records it, finds that it is due."""
    if not ranks.main:
        fingerprint = ranks.agree("")
        if fingerprint:
            make(fingerprint)
        ranks.wait()
        return
    told = False

    def lead(fingerprint: str) -> tuple[list[str], dict[str, Any]]:
        nonlocal told
        told = True
        return make(ranks.agree(fingerprint))

    context.run_stage(directory, name, version, inputs, after, lead)
    if not told:
        ranks.agree("")
    ranks.wait()


def _training(
    context: Context,
    directory: RunDirectory,
    settings: TrainConfig,
    cache: OperatorCache,
    device: torch.device,
    fingerprint: str,
    shuffle: Shuffle | None,
) -> Training:
    """Put together what a training is made of."""
    from schelix_scale.training.dist import ALONE
    from schelix_scale.training.labels import Labels
    from schelix_scale.training.loop import Training
    from schelix_scale.training.refresh import Refresh, open_features

    store, known, seed = context.store, context.known_labels, context.config.seed
    expression = _open_expression(context, directory, settings, shuffle)
    if expression is not None and store.row_access == "scan":
        context.reporter.warn(
            f"{store.source} is stored by genes: to read its cells again and again is slow. Write X as a CSR matrix, "
            'or use train.input = "cache"'
        )
    if known is not None:
        context.reporter.say(
            f"labels of {known.known:,} of {store.n_cells:,} cells are known ({len(known.names)} types)"
        )
    return Training(
        settings,
        seed,
        device,
        directory.path / "checkpoints",
        fingerprint,
        Refresh(cache, settings, fingerprint, seed, context.threads, device, context.reporter, expression),
        lambda name: open_features(cache, name),
        None if known is None else Labels.arrange(known.codes, context.batches.codes),
        expression,
        ranks=context.ranks or ALONE,
    )


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Let torch refuse operations whose results differ from time to time, as long as the context lasts."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    if before or not wanted:  # nothing to change, and to say so loads much of torch
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _shuffle(context: Context, settings: TrainConfig) -> Shuffle | None:
    """Return how rows are mixed in a run whose training reads expression; None in any other run."""
    from schelix_scale.training.loader import shuffle_for

    if settings.input == "cache" or not settings.enabled:
        return None
    return shuffle_for(context.store, int(STREAM_SHARE * context.budget))


def _open_expression(
    context: Context, directory: RunDirectory, settings: TrainConfig, shuffle: Shuffle | None
) -> Expression | None:
    """Open where training reads expression, with the first layers that the sketch gave; None if it reads the cache."""
    from schelix_scale.features.streams import Streams
    from schelix_scale.training.expression import Expression

    if shuffle is None:
        return None
    measured = context.measured
    return Expression(
        context.store,
        directory.record("genes").details["values"],
        Streams.load(directory.path / "streams.npz"),
        context.batches.codes,
        None if measured is None else measured.group_n,
        shuffle,
        settings.loadings == "learned",
    )


def train_settings(config: Config) -> TrainConfig:
    """Return the training's settings at the run's strength: what it may move cells by is scaled; at 0 it is off."""
    train = config.train
    scaled: dict[str, Any] = {name: config.strength * getattr(train, name) for name in SCALED}
    return train.model_copy(update={**scaled, "enabled": train.enabled and config.strength > 0})
