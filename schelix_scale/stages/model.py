"""Diffused features -> a trained model -> the embedding of every cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from schelix_scale._version import __version__
from schelix_scale.compute import resolve_device, torch_at_work
from schelix_scale.context import BATCH, ROW, Context
from schelix_scale.run import RunDirectory
from schelix_scale.stages.graph import open_cache

if TYPE_CHECKING:
    from schelix_scale.config import Config, TrainConfig
    from schelix_scale.training.expression import Expression
    from schelix_scale.training.loader import Shuffle

SCALED = ("anchor_residual", "gate", "pull")
STREAM_SHARE = 0.25  # of the memory budget, for expression on its way


def train_model(context: Context, directory: RunDirectory) -> None:
    """Train the dual-stream model on the cached features: checkpoints/, and refreshed operators.

    At strength 0 there is nothing to train, as when ``train.enabled`` is false.
    """
    import torch

    from schelix_scale.training.checkpoint import TrainState, checkpoint_name, clear_checkpoints, save_checkpoint
    from schelix_scale.training.labels import Labels
    from schelix_scale.training.loop import Training, build_model, train, weights
    from schelix_scale.training.refresh import Refresh, open_features

    config, settings = context.config, train_settings(context.config)
    device = torch.device(resolve_device(config.device))
    shuffle = _shuffle(context, settings)

    def make(fingerprint: str) -> tuple[list[str], dict[str, Any]]:
        cache = open_cache(context, directory)
        first = directory.record("graph").details["operator_id"]
        features, folder = open_features(cache, first), directory.path / "checkpoints"
        if settings.enabled:
            if settings.refresh and not features.variant_ntv.shape[2]:
                context.reporter.warn("train.refresh does nothing: a run without Variants has one phase, no between")
            expression = _open_expression(context, directory, settings)
            if expression is not None and context.store.row_access == "scan":
                context.reporter.warn(
                    f"{context.store.source} is stored by genes: to read its cells again and again is slow. Write X "
                    'as a CSR matrix, or use train.input = "cache"'
                )
            seed, threads = config.seed, context.threads
            refresh = Refresh(cache, settings, fingerprint, seed, threads, device, context.reporter, expression)
            known = context.known_labels
            labels = None if known is None else Labels.arrange(known.codes, context.batches.codes)
            if known is not None:
                context.reporter.say(
                    f"labels of {known.known:,} of {context.store.n_cells:,} cells are known ({len(known.names)} types)"
                )
            training = Training(
                settings,
                config.seed,
                device,
                folder,
                fingerprint,
                refresh,
                lambda name: open_features(cache, name),
                labels,
                expression,
            )
            model, features = train(training, features, context.reporter)
            last = checkpoint_name(len(training.phases(model)), 0)
        else:
            start = weights(build_model(features, settings, config.seed))
            clear_checkpoints(folder)
            last = save_checkpoint(folder, TrainState(0, 0, first, 0.0, 0, start, start, None), fingerprint).name
        fresh = [] if features.operator_id == first else cache.artifacts(features.operator_id)
        return ["checkpoints", *fresh], {
            "operator_id": features.operator_id,
            "checkpoint": last,
            "device": str(device),
            "key": fingerprint,
        }

    inputs = {"train": settings, "seed": config.seed}
    if shuffle is not None:
        inputs["shuffle"] = list(shuffle)  # follows from the memory, and decides the order of steps
    if context.known_labels is not None:
        inputs["labels"] = context.known_labels.digest
    with torch_at_work(context.threads):
        context.run_stage(directory, "train", 2, inputs, ["graph"], make)


def embed_cells(context: Context, directory: RunDirectory) -> None:
    """Write embedding.zarr, every cell at its row number."""
    import torch

    from schelix_scale.embedding import KEY, embedding_dims, output_keys, write_embedding
    from schelix_scale.training.checkpoint import final_checkpoint
    from schelix_scale.training.loop import build_model
    from schelix_scale.training.refresh import open_features

    config, settings = context.config, train_settings(context.config)

    def make(_: str) -> tuple[list[str], dict[str, Any]]:
        details = directory.record("train").details
        device = torch.device(resolve_device(config.device))
        features = open_features(open_cache(context, directory), details["operator_id"])
        state = final_checkpoint(directory.path / "checkpoints" / details["checkpoint"], details["key"])
        expression = _open_expression(context, directory, settings) if settings.loadings == "learned" else None
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
        with (
            context.reporter.stage("embed", context.store.n_cells) as progress,
            directory.publish("embedding.zarr") as path,
        ):
            write_embedding(path, model, features, keys, obs, uns, device, progress.advance, expression)
        return ["embedding.zarr"], {"dims": embedding_dims(features, keys[KEY]), "keys": list(keys)}

    with torch_at_work(context.threads):
        context.run_stage(directory, "embed", 1, {"embed": config.embed}, ["genes", "train"], make)


def _shuffle(context: Context, settings: TrainConfig) -> Shuffle | None:
    """Return how rows are mixed in a run whose training reads expression; None in any other run."""
    from schelix_scale.training.loader import shuffle_for

    if settings.input == "cache" or not settings.enabled:
        return None
    return shuffle_for(context.store, int(STREAM_SHARE * context.budget))


def _open_expression(context: Context, directory: RunDirectory, settings: TrainConfig) -> Expression | None:
    """Open where training reads expression, with the first layers that the sketch gave; None if it reads the cache."""
    from schelix_scale.features.streams import Streams
    from schelix_scale.training.expression import Expression

    shuffle = _shuffle(context, settings)
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
