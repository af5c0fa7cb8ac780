"""The source -> sketch, gene roles and the table of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from schelix_scale.context import BATCH, ROW, Context
from schelix_scale.errors import DataError
from schelix_scale.run import RunDirectory
from schelix_scale.scheduling import connected

if TYPE_CHECKING:
    from schelix_scale.genes.partition import Partition
    from schelix_scale.genes.sketch import Sketch

MIN_GENES = 20
CLUSTER_DIMS = 50


def find_genes(context: Context, directory: RunDirectory) -> None:
    """Write genes.parquet, sketch.npz and cells.parquet: gene roles, and the variable genes of the sketched cells."""
    from schelix_scale.genes.partition import ANCHOR, UNUSED, VARIANT

    config = context.config
    inputs = {"source": context.source_fingerprint, "cells": context.cells_hash, "seed": config.seed}
    if context.known_labels is not None:  # the labels that are used are those that cells.parquet carries
        inputs["labels"] = context.known_labels.digest
    if of_obs := context.store.obs_fingerprint():
        inputs["obs"] = of_obs
    inputs |= {"data": config.data, "sketch": config.sketch, "genes": config.genes}
    inputs |= {"scale_power": config.features.scale_power, "sketch_cells": context.sketch_cells}

    def make(_: str) -> tuple[list[str], dict[str, Any]]:
        if config.scheduler is not None:
            with connected(config.scheduler):  # a cluster that is not there is better noticed now than after the sketch
                pass
        sketch = _draw(context, directory)
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
        details |= _unmeasured(context)
        _say_genes(context, partition.genes, details)
        with directory.publish("genes.parquet") as path:
            _described(context, partition.genes).to_parquet(path)
        with directory.publish("sketch.npz") as path:
            sketch.save(path, np.flatnonzero((partition.genes["role"] != UNUSED).to_numpy()))
        with directory.publish("cells.parquet") as path:
            _cell_table(context).to_parquet(path)
        return ["genes.parquet", "sketch.npz", "cells.parquet"], details

    context.run_stage(directory, "genes", 2, inputs, [], make)


def _draw(context: Context, directory: RunDirectory) -> Sketch:
    """Read the sketch and say what its values are."""
    from schelix_scale.genes.sketch import draw_sketch, swept_cells

    config, store, batches, size = context.config, context.store, context.batches, context.sketch_cells
    if size < min(store.n_cells, config.sketch.max_cells):
        context.reporter.warn(
            f"memory allows a sketch of {size:,} cells, not sketch.max_cells = {config.sketch.max_cells:,}; "
            f"sketch.max_cells={size} gives the same result on a machine with more memory"
        )
    with context.reporter.stage("sketch", swept_cells(store, config.sketch, size)) as progress:
        sketch = draw_sketch(
            store,
            batches.codes,
            batches.names,
            config.sketch,
            size,
            config.data.values,
            config.seed,
            progress.advance,
            directory.path,
            context.threads,
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
        known = sketch.measured
        hvg = variable_genes(x_ng, batch_n, config.genes.n_hvg, config.genes.min_batch_cells, known)
        if len(hvg) < MIN_GENES:
            where, remedy = "in 3 cells or more", "Check that cells are rows and genes are columns."
            if known is not None:
                where += f" and measured in 2 of {len(known.names)} groups of cells or more"
                remedy = "Check that the files or data sets name genes by the same kind of id."
            raise DataError(
                f"{context.store.source}: only {len(hvg)} genes are found {where}; {MIN_GENES} are needed. {remedy}"
            )
        progress.advance(1)
        return partition_genes(
            x_ng,
            context.store.gene_names,
            hvg,
            batch_n,
            lambda genes: fit_projection(x_ng, genes, CLUSTER_DIMS, config.features.scale_power, measured=known)[1],
            config.genes,
            config.seed,
            context.threads,
            None if context.level_n is None else context.level_n[sketch.rows],
            progress.advance,
            known,
        )


def _unmeasured(context: Context) -> dict[str, Any]:
    """Count the genes that not all groups of cells measured, and say so; nothing if all were measured in all cells."""
    measured = context.measured
    if measured is None:
        return {}
    lacking_p = (~measured.measured_pg).sum(axis=1)
    n_genes, n_groups = int((~measured.measured_pg).any(axis=0).sum()), int((lacking_p > 0).sum())
    single = int((measured.measured_pg.sum(axis=0) < min(2, len(lacking_p))).sum())
    worst = int(lacking_p.argmax())
    context.reporter.say(
        f"{n_genes:,} of {measured.measured_pg.shape[1]:,} genes are not measured in all cells: {n_groups:,} of "
        f"{len(lacking_p):,} groups of cells lack some (most, {lacking_p[worst]:,}: {measured.names[worst]}). There "
        f"they are unknown and not zero; {single:,} that no two groups measured are not used"
    )
    return {
        "groups": len(lacking_p),
        "groups_lacking_genes": n_groups,
        "genes_not_measured_everywhere": n_genes,
        "genes_of_no_two_groups": single,
    }


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
    how = {"random": "drawn at random", "all": "genes are not divided"}
    return how.get(context.config.genes.partition, f"cut at rho {details['cut']:.2f}")


def _described(context: Context, genes: pd.DataFrame) -> pd.DataFrame:
    """Add what else the source knows of its genes (``feature_name``, other ids), as text columns."""
    from schelix_scale.stores.anndata import AnnDataStore
    from schelix_scale.stores.memory import MemoryStore

    store, known = context.store, context.store.gene_table()
    if known is None and isinstance(store, AnnDataStore | MemoryStore):
        table = store.gene_columns()
        many = [name for name in table if name not in genes and 2 * table[name].nunique() > len(table)]
        known = table[many]  # what most genes share is no name
    return genes if known is None else genes.assign(**{name: known[name].astype(str).to_numpy() for name in known})


def _cell_table(context: Context) -> pd.DataFrame:
    """Row number, batch code and the chosen obs columns of every cell."""
    table = context.obs()
    table.insert(0, ROW, np.arange(len(table)))
    table.insert(1, BATCH, context.batches.codes)
    return table
