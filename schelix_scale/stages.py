"""The stages of a run, in order: genes, features, graph, train, embed. Each fills its part of the run directory.

A stage reads only what the ones before it published, so that any of them can be done again alone.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from schelix_scale._version import __version__
from schelix_scale.compute import resolve_device
from schelix_scale.context import BATCH, ROW, Context
from schelix_scale.errors import DataError
from schelix_scale.publish import create_array
from schelix_scale.run import RunDirectory

if TYPE_CHECKING:
    from schelix_scale.config import Config, GraphConfig, TrainConfig
    from schelix_scale.features.streams import Streams
    from schelix_scale.genes.partition import Partition
    from schelix_scale.genes.sketch import Sketch
    from schelix_scale.graph.cache import OperatorCache

FEATURES = {"anchor": "features/anchor.npy", "anchor_corrected": "features/anchor_corrected.npy"}
MIN_GENES = 20
CLUSTER_DIMS = 50
VARIANT = {"variant": "features/variant.npy"}
SCALED = ("anchor_residual", "gate", "pull")


def find_genes(context: Context, directory: RunDirectory) -> None:
    """Write genes.parquet, sketch.npz and cells.parquet: gene roles, and the variable genes of the sketched cells."""
    from schelix_scale.genes.partition import ANCHOR, UNUSED, VARIANT

    config = context.config
    inputs = {"source": context.source_fingerprint, "cells": context.cells_hash, "seed": config.seed}
    inputs |= {"data": config.data, "sketch": config.sketch, "genes": config.genes}
    inputs |= {"scale_power": config.features.scale_power, "sketch_cells": context.sketch_cells}

    def make(_: str) -> tuple[list[str], dict[str, Any]]:
        sketch = _draw(context)
        partition = _partition(context, sketch)
        details = {
            "values": sketch.values.kind,
            "values_reason": sketch.values.reason,
            "sketch_cells": len(sketch.rows),
            "anchors": len(partition.positions(ANCHOR)),
            "variants": len(partition.positions(VARIANT)),
            "batch_signal": partition.signal,
            "comparable": partition.comparable,
            "single_stream": partition.single_stream,
            "rounds": partition.rounds,
            "cut": partition.cut,
        }
        _say_genes(context, partition.genes, details)
        with directory.publish("genes.parquet") as path:
            partition.genes.to_parquet(path)
        with directory.publish("sketch.npz") as path:
            sketch.save(path, np.flatnonzero((partition.genes["role"] != UNUSED).to_numpy()))
        with directory.publish("cells.parquet") as path:
            _cell_table(context).to_parquet(path)
        return ["genes.parquet", "sketch.npz", "cells.parquet"], details

    context.run_stage(directory, "genes", 2, inputs, [], make)


def _draw(context: Context) -> Sketch:
    """Read the sketch and say what its values are."""
    from schelix_scale.genes.sketch import draw_sketch

    config, store, batches, size = context.config, context.store, context.batches, context.sketch_cells
    if size < min(store.n_cells, config.sketch.max_cells):
        context.reporter.warn(
            f"memory allows a sketch of {size:,} cells, not sketch.max_cells = {config.sketch.max_cells:,}; "
            f"sketch.max_cells={size} gives the same result on a machine with more memory"
        )
    with context.reporter.stage("sketch", size) as progress:
        sketch = draw_sketch(
            store,
            batches.codes,
            batches.names,
            config.sketch,
            size,
            config.data.values,
            config.seed,
            progress.advance,
        )
    context.reporter.say(f"values are {sketch.values.reason}")
    return sketch


def _partition(context: Context, sketch: Sketch) -> Partition:
    """Choose and divide the genes."""
    from schelix_scale.features.projection import fit_projection
    from schelix_scale.genes.partition import partition_genes
    from schelix_scale.genes.variable import variable_genes

    config, x_ng, batch_n = context.config, sketch.x_ng, sketch.batch_n
    with context.reporter.stage("genes", config.genes.iterations + 1, "steps") as progress:
        hvg = variable_genes(x_ng, batch_n, config.genes.n_hvg, config.genes.min_batch_cells)
        if len(hvg) < MIN_GENES:
            raise DataError(
                f"{context.store.source}: only {len(hvg)} genes are found in 3 cells or more; {MIN_GENES} are needed. "
                "Check that cells are rows and genes are columns."
            )
        progress.advance(1)
        return partition_genes(
            x_ng,
            context.store.gene_names,
            hvg,
            batch_n,
            lambda genes: fit_projection(x_ng, genes, CLUSTER_DIMS, config.features.scale_power)[1],
            config.genes,
            config.seed,
            context.threads,
            None if context.level_n is None else context.level_n[sketch.rows],
            progress.advance,
        )


def write_stream_features(context: Context, directory: RunDirectory) -> None:
    """Write streams.npz, projections and correction from the sketch, and features/*.npy in one pass over all cells."""
    from schelix_scale.features.onepass import PASS_SHARE, OnePass, write_features

    config, details = context.config, directory.record("genes").details
    names = FEATURES | VARIANT if details["variants"] else FEATURES

    def make(_: str) -> tuple[list[str], dict[str, Any]]:
        streams = _fit_streams(context, directory)
        with directory.publish("streams.npz") as path:
            streams.save(path)
        job = OnePass(context.store, streams, details["values"])
        n, dims = context.store.n_cells, dict(zip(("anchor", "variant"), job.streams.dims, strict=True))
        with ExitStack() as published, context.reporter.stage("features", n) as progress:
            targets = {name: published.enter_context(directory.publish(file)) for name, file in names.items()}
            for name, path in targets.items():
                create_array(path, (n, dims[name.partition("_")[0]]), "float32")
            budget = int(PASS_SHARE * context.budget)
            write_features(job, context.batches.codes, targets, budget, context.threads, progress.advance)
        return ["streams.npz", *names.values()], {"dims": streams.dims}

    inputs = {"features": config.features, "strength": config.strength, "seed": config.seed}
    context.run_stage(directory, "features", 2, inputs, ["genes"], make)


def _fit_streams(context: Context, directory: RunDirectory) -> Streams:
    """Fit what turns any cell into stream features on the sketch that was kept."""
    from schelix_scale.features.streams import fit_streams
    from schelix_scale.genes.partition import Partition
    from schelix_scale.genes.sketch import Sketch

    config, details = context.config, directory.record("genes").details
    partition = Partition(
        pd.read_parquet(directory.path / "genes.parquet"),
        details["batch_signal"],
        details["comparable"],
        details["single_stream"],
        details["rounds"],
        details["cut"],
    )
    sketch, n_batches = Sketch.load(directory.path / "sketch.npz"), len(context.batches.names)
    if config.strength < 1:
        context.reporter.say(f"strength {config.strength:g}: {_kept_back(config.strength)}")
    with context.reporter.stage("components", 1, "steps") as progress:
        streams = fit_streams(
            sketch.x_ng,
            sketch.batch_n,
            n_batches,
            partition,
            config.features,
            config.seed,
            context.threads,
            config.strength,
        )
        progress.advance(1)
    return streams


def _kept_back(strength: float) -> str:
    if strength == 0:
        return "the embedding is the PCA of all variable genes, nothing is corrected, smoothed or trained"
    return f"Variants count {1 - strength:g} among the Anchors; correction, smoothing and training by {strength:g}"


def build_graph(context: Context, directory: RunDirectory) -> None:
    """Write the audited operator of the corrected Anchors and what it diffuses, under the operator's id."""
    from schelix_scale.graph.cache import operator_id
    from schelix_scale.graph.knn import choose_method

    config = graph_settings(context.config)

    def make(fingerprint: str) -> tuple[list[str], dict[str, Any]]:
        cache = open_cache(context, directory)
        method = choose_method(context.store.n_cells, config)
        name = operator_id({"stage": fingerprint, "threads": context.threads}, method)
        with context.reporter.stage(f"neighbours ({method})", context.store.n_cells) as progress:
            neighbors, audit = cache.find(
                cache.features["anchor"], context.config.seed, context.threads, progress.advance
            )
        context.reporter.say(f"neighbour recall {audit.recall:.3f} (95 % CI {audit.low:.3f}-{audit.high:.3f})")
        with context.reporter.stage("diffusion", cache.work) as progress:
            cache.publish(name, cache.operator(neighbors), audit, progress.advance)
        return cache.artifacts(name), {"operator_id": name, "audit": audit.to_dict()}

    inputs = {"graph": config, "seed": context.config.seed}
    if choose_method(context.store.n_cells, config) == "pynndescent":
        inputs["threads"] = context.threads  # another number of them finds other neighbours
    context.run_stage(directory, "graph", 1, inputs, ["features"], make)


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

    def make(fingerprint: str) -> tuple[list[str], dict[str, Any]]:
        cache = open_cache(context, directory)
        first = directory.record("graph").details["operator_id"]
        features, folder = open_features(cache, first), directory.path / "checkpoints"
        if settings.enabled:
            refresh = Refresh(cache, settings, fingerprint, config.seed, context.threads, device, context.reporter)
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
    if context.known_labels is not None:
        inputs["labels"] = context.known_labels.digest
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
        model = build_model(features, settings, config.seed).to(device)
        model.load_state_dict(state.model)
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
            write_embedding(path, model, features, keys, obs, uns, device, progress.advance)
        return ["embedding.zarr"], {"dims": embedding_dims(features, keys[KEY]), "keys": list(keys)}

    context.run_stage(directory, "embed", 1, {"embed": config.embed}, ["genes", "train"], make)


STAGES = (find_genes, write_stream_features, build_graph, train_model, embed_cells)


def open_cache(context: Context, directory: RunDirectory) -> OperatorCache:
    """Open the operator cache of a run whose features are written."""
    from schelix_scale.graph.cache import OperatorCache

    details = directory.record("genes").details
    anchor = np.load(directory.path / FEATURES["anchor_corrected"], mmap_mode="r")
    variant = np.zeros((len(anchor), 0), np.float32)
    if details["variants"]:
        variant = np.load(directory.path / VARIANT["variant"], mmap_mode="r")
    graph = graph_settings(context.config)
    features = {"anchor": anchor, "variant": variant}
    theta = 0.0 if details["single_stream"] else graph.theta
    return OperatorCache(directory.path, features, context.batches.codes, graph, theta)


def graph_settings(config: Config) -> GraphConfig:
    """Return the graph's settings at the run's strength: reweighting and diffusion, 1 - restart, are scaled by it."""
    graph, back = config.graph, 1 - config.strength
    return graph.model_copy(
        update={"theta": config.strength * graph.theta, "restart": graph.restart + (1 - graph.restart) * back}
    )


def train_settings(config: Config) -> TrainConfig:
    """Return the training's settings at the run's strength: what it may move cells by is scaled; at 0 it is off."""
    train = config.train
    scaled: dict[str, Any] = {name: config.strength * getattr(train, name) for name in SCALED}
    return train.model_copy(update={**scaled, "enabled": train.enabled and config.strength > 0})


def _say_genes(context: Context, genes: pd.DataFrame, details: dict[str, Any]) -> None:
    signal = details["batch_signal"]
    if details["comparable"] == 0:
        context.reporter.warn(
            "no cluster holds two batches: batches and cell types cannot be told apart, so nothing is corrected "
            "(single stream)"
        )
    elif details["single_stream"]:
        context.reporter.warn(
            f"no batch signal beyond chance ({signal:.4f} of the variance inside clusters, the least that counts is "
            f"{context.config.genes.min_signal}): single stream, nothing is corrected"
        )
    else:
        context.reporter.say(
            f"{details['anchors']:,} Anchors and {details['variants']:,} Variants ({_divided(context, details)}); "
            f"batches explain {signal:.1%} of the variance inside clusters beyond chance"
        )
    empty = int((genes["mean"] == 0).sum())
    if empty:
        context.reporter.say(f"{empty:,} of {len(genes):,} genes are zero in every sketched cell and play no role")


def _divided(context: Context, details: dict[str, Any]) -> str:
    """Say how the genes were divided."""
    how = {"random": "drawn at random", "none": "genes are not divided"}
    return how.get(context.config.genes.partition, f"cut at rho {details['cut']:.2f}")


def _cell_table(context: Context) -> pd.DataFrame:
    """Row number, batch code and the chosen obs columns of every cell."""
    table = context.obs()
    table.insert(0, ROW, np.arange(len(table)))
    table.insert(1, BATCH, context.batches.codes)
    return table
