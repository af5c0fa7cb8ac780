"""Sketch and gene roles -> projections and correction -> stream features of every cell, in one pass."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pandas as pd

from schelix_scale.arrays import create_array
from schelix_scale.context import Context
from schelix_scale.run import RunDirectory

if TYPE_CHECKING:
    from schelix_scale.features.streams import Streams

FEATURES = {"anchor": "features/anchor.npy", "anchor_corrected": "features/anchor_corrected.npy"}
VARIANT = {"variant": "features/variant.npy"}


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
            codes, scheduler = context.batches.codes, config.scheduler
            measured = context.measured
            groups = None if measured is None else measured.group_n
            write_features(job, codes, targets, budget, context.threads, progress.advance, scheduler, groups)
        clusters = 0 if streams.correction is None else len(streams.correction.centroids_kd)
        return ["streams.npz", *names.values()], {"dims": streams.dims, "clusters": clusters}

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
            sketch.measured,
        )
        progress.advance(1)
    return streams


def _kept_back(strength: float) -> str:
    if strength == 0:
        return "the embedding is the PCA of all variable genes, nothing is corrected, smoothed or trained"
    return f"Variants count {1 - strength:g} among the Anchors; correction, smoothing and training by {strength:g}"
