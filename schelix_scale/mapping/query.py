"""New batches -> features, corrected features, and neighbours in the reference: the stages of a mapping on disk.

What comes in: a reference, a store of cells and a claimed directory. What goes out: .npy files in it, stage by stage,
so that a mapping that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from schelix_scale.features.onepass import PASS_SHARE, block_size, write_rows
from schelix_scale.features.projection import Projection, clip_genes
from schelix_scale.features.streams import Streams
from schelix_scale.graph.vectors import row_blocks
from schelix_scale.mapping.correction import PROBES, BatchShift, fit_batch, shifted
from schelix_scale.mapping.genes import (
    GeneMatch,
    match_genes,
    reference_values,
    require_genes,
    restricted_streams,
    shared_target,
)
from schelix_scale.mapping.reference import Frozen
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.progress import Reporter
from schelix_scale.publish import create_array
from schelix_scale.records import StageRecord
from schelix_scale.run_directory import RunDirectory
from schelix_scale.scheduling import run_tasks
from schelix_scale.stores.base import CellStore, Measured, partly_measured
from schelix_scale.stores.batches import Batches
from schelix_scale.stores.checks import check_block
from schelix_scale.stores.values import ValueKind, decide_values

DECIDED = 5_000
BLOCK, QUERY_BLOCK = 8_192, 65_536
FIT_CELLS = 20_000
RAW, CORRECTED = "features/{}_raw.npy", "features/{}.npy"
STREAMS = ("anchor", "variant")
MOVES = "features/{}_learned.npy"
SHIFTS = "features/shifts.npz"
INDICES, DISTANCES = "neighbors/indices.npy", "neighbors/distances.npy"

Make = Callable[[], tuple[list[str], dict[str, Any]]]


@dataclass(frozen=True)
class Query:
    """New batches and how they are mapped.

    Attributes
    ----------
    store, batches
        The cells and their batches.
    frozen
        The reference.
    directory
        Where results go; claimed.
    settings, reporter
        Of the mapping; where progress goes.
    threads, budget
        Threads, and bytes that blocks of expression may take.
    """

    store: CellStore
    batches: Batches
    frozen: Frozen
    directory: RunDirectory
    settings: MapConfig
    reporter: Reporter
    threads: int
    budget: int

    def stage(self, name: str, inputs: Mapping[str, Any], after: Sequence[str], make: Make) -> StageRecord:
        """Do a stage, or skip it if it was done with the same inputs; return its record."""
        directory = self.directory
        inputs = {"reference": self.frozen.fingerprint, **inputs}
        fingerprint = directory.fingerprint(name, 1, inputs, after)
        if directory.was_done(name, fingerprint):
            damage = directory.damage(name)
            if not damage:
                self.reporter.say(f"{name}: done before, skipped")
                return directory.record(name)
            self.reporter.warn(f"{'; '.join(damage)}; {name} is done again")
        directory.begin(name)
        started = time.monotonic()
        artifacts, details = make()
        return directory.finish(name, fingerprint, artifacts, time.monotonic() - started, details)

    def load(self, name: str) -> np.ndarray:
        """Memory-map an array of the directory."""
        found: np.ndarray = np.load(self.directory.path / name, mmap_mode="r")
        return found

    @cached_property
    def measured(self) -> Measured | None:
        """Which genes were measured in which cells of the query; None: all in all."""
        return partly_measured(self.store)


@dataclass(frozen=True)
class _Encoder:
    """Turns the expression of cells that measured the same genes into components of the reference."""

    match: GeneMatch
    streams: Streams
    target: float
    learned: tuple[np.ndarray, np.ndarray] | None

    def encode(self, x_mq: sparse.csr_matrix, values: str) -> dict[str, np.ndarray]:
        """Return uncorrected components of both streams, and what learned loadings add to them."""
        x_mg = reference_values(x_mq, self.match, values, self.target)
        streams = self.streams
        found = {"anchor": streams.anchor.apply(x_mg)}
        found["variant"] = found["anchor"][:, :0] if streams.variant is None else streams.variant.apply(x_mg)
        if self.learned is not None:
            for name, part, weights in zip(STREAMS, (streams.anchor, streams.variant), self.learned, strict=True):
                found[f"{name}_learned"] = _learned(x_mg, part, weights, found[name])
        return found


def _learned(x_mg: sparse.csr_matrix, part: Projection | None, weights: np.ndarray, like: np.ndarray) -> np.ndarray:
    if part is None:
        return np.zeros_like(like)
    return np.asarray(clip_genes(x_mg[:, part.genes], part.cap) @ weights, np.float32)


def project(query: Query) -> StageRecord:
    """Write the uncorrected components of all cells, in one pass over the store."""
    frozen, store, settings = query.frozen, query.store, query.settings
    inputs: dict[str, Any] = {"source": store.fingerprint(), "values": settings.values, "gene_key": settings.gene_key}
    inputs |= {"min_genes": settings.min_genes}

    def make() -> tuple[list[str], dict[str, Any]]:
        encoders = _encoders(query)
        values = _values(query)
        dims = dict(zip(STREAMS, frozen.streams.dims, strict=True))
        learned = encoders[0].learned is not None
        names = {name: RAW.format(name) for name in STREAMS}
        names |= {f"{name}_learned": MOVES.format(name) for name in STREAMS} if learned else {}
        n = store.n_cells
        with ExitStack() as published, query.reporter.stage("project", n) as progress:
            targets = {name: published.enter_context(query.directory.publish(file)) for name, file in names.items()}
            for name, path in targets.items():
                create_array(path, (n, dims[name.partition("_")[0]]), "float32")
            size = block_size(store, int(PASS_SHARE * query.budget), query.threads)

            def task(span: tuple[int, int]) -> int:
                rows = np.arange(*span)
                x_mq = store.read(rows)
                check_block(x_mq, rows, store, values)
                for name, found in _encode(query, encoders, x_mq, rows, values).items():
                    write_rows(targets[name], span[0], found)
                return len(rows)

            run_tasks(task, list(row_blocks(n, size)), query.threads, None, progress.advance)
        facts = min((encoder.match for encoder in encoders), key=lambda match: match.used_share).facts()
        return list(names.values()), {**facts, "values": values, "learned": learned}

    return query.stage("project", inputs, [], make)


def _encode(
    query: Query, encoders: Sequence[_Encoder], x_mq: sparse.csr_matrix, rows: np.ndarray, values: str
) -> dict[str, np.ndarray]:
    """Encode a block, the cells of each group that measured the same genes apart."""
    if query.measured is None:
        return encoders[0].encode(x_mq, values)
    group_m = query.measured.group_n[rows]
    out: dict[str, np.ndarray] = {}
    for group in np.unique(group_m):
        chosen = np.flatnonzero(group_m == group)
        for name, found in encoders[group].encode(x_mq[chosen], values).items():
            out.setdefault(name, np.empty((len(rows), found.shape[1]), np.float32))[chosen] = found
    return out


def _encoders(query: Query) -> list[_Encoder]:
    """Match genes and restrict the projections to those that are there, for each group of cells."""
    frozen, store, settings = query.frozen, query.store, query.settings
    genes = frozen.genes
    used_g = frozen.streams.uses(len(genes))
    match = match_genes(store, genes, used_g, settings.gene_key)
    matches = [match]
    if query.measured is not None:
        there_pg = query.measured.measured_pg
        matches = [
            GeneMatch(np.where((match.place_g >= 0) & there_g[match.place_g], match.place_g, -1), used_g, match.by)
            for there_g in there_pg
        ]
    rows = frozen.sample
    spread = [np.asarray(frozen.raw_na[rows], np.float64).var(axis=0), np.zeros(0)]
    if frozen.streams.variant is not None:
        spread[1] = np.asarray(frozen.variant_nv[rows], np.float64).var(axis=0)
    learned = None
    if frozen.model.loadings is not None:
        parts = frozen.model.loadings.anchor, frozen.model.loadings.variant
        learned = (parts[0].detach().numpy(), parts[1].detach().numpy())
    power, encoders = frozen.config.features.scale_power, []
    for found in matches:
        require_genes(found, store, genes, settings.min_genes)
        streams = restricted_streams(frozen.streams, found, genes, power, (spread[0], spread[1]))
        encoders.append(_Encoder(found, streams, shared_target(found, genes["mean"].to_numpy()), learned))
    facts = min(matches, key=lambda one: one.used_share).facts()
    say = query.reporter.warn if facts["used_genes_missing"] else query.reporter.say
    lacking = f"; {facts['used_genes_missing']:,} of those it uses are missing ({1 - match.used_share:.1%})"
    say(
        f"{facts['genes_matched']:,} of {len(genes):,} genes of the reference are there ({match.by})"
        + (lacking if facts["used_genes_missing"] else "")
    )
    return encoders


def _values(query: Query) -> ValueKind:
    """Decide what the values of the query are, and say so."""
    store = query.store
    rows = np.unique(np.linspace(0, store.n_cells - 1, min(DECIDED, store.n_cells)).astype(np.int64))
    x_mq = store.read(rows)
    check_block(x_mq, rows, store)
    decision = decide_values(x_mq, query.batches.codes[rows], query.batches.names, query.settings.values)
    query.reporter.say(f"values are {decision.reason}")
    if "log" in (decision.kind, query.frozen.values) and decision.kind != query.frozen.values:
        query.reporter.warn(
            f"the query's values are {decision.kind}, the reference's {query.frozen.values}: they only fit if the "
            "logarithms are log1p of counts per 10,000"
        )
    return decision.kind


def correct(query: Query) -> StageRecord:
    """Fit each batch's displacement, and write the corrected components."""
    frozen, batches = query.frozen, query.batches
    digest = hashlib.sha256(batches.codes.tobytes() + "\0".join(batches.names).encode()).hexdigest()

    def make() -> tuple[list[str], dict[str, Any]]:
        raw = [query.load(RAW.format(name)) for name in STREAMS]
        order = pd.util.hash_array(np.asarray(query.store.cell_names, dtype=object))  # no cell's place matters
        shifts, facts, n = [], [], query.store.n_cells
        files = [CORRECTED.format(name) for name in STREAMS]
        with ExitStack() as published, query.reporter.stage("correct", n) as progress:
            paths = [published.enter_context(query.directory.publish(file)) for file in files]
            out = [create_array(path, part.shape, "float32") for path, part in zip(paths, raw, strict=True)]
            for code, name in enumerate(batches.names):
                rows = np.flatnonzero(batches.codes == code)
                fit = rows[np.argsort(order[rows], kind="stable")[:FIT_CELLS]]
                shift = _shift(frozen, raw[0][fit], raw[1][fit])
                shifts.append(shift)
                facts.append({"batch": name, "cells": len(rows), "like": shift.like, "held_back": shift.held_back})
                for start, stop in row_blocks(len(rows)):
                    part = rows[start:stop]
                    out[0][part], out[1][part] = _moved(frozen, shift, raw[0][part], raw[1][part])
                    progress.advance(len(part))
            for array in out:
                array.flush()
        with query.directory.publish(SHIFTS) as path:
            np.savez(
                path,
                anchor_bkd=np.stack([shift.anchor_kd for shift in shifts]),
                variant_bkv=np.stack([shift.variant_kv for shift in shifts]),
            )
        return [*files, SHIFTS], {"corrected": frozen.corrects, "batches": facts}

    return query.stage("correct", {"batches": digest}, ["project"], make)


def _shift(frozen: Frozen, anchor_nd: np.ndarray, variant_nv: np.ndarray) -> BatchShift:
    """Fit a batch; none is displaced in a reference that corrects nothing."""
    if not frozen.corrects:
        k = len(frozen.clusters.centre_kd)
        return BatchShift(np.zeros((k, anchor_nd.shape[1])), np.zeros((k, variant_nv.shape[1])), -1, 0.0)
    return fit_batch(frozen.clusters, anchor_nd, variant_nv, np.arange(min(PROBES, len(anchor_nd))))


def _moved(
    frozen: Frozen, shift: BatchShift, anchor_md: np.ndarray, variant_mv: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if not frozen.corrects:
        return anchor_md, variant_mv
    return shifted(frozen.clusters, shift, anchor_md, variant_mv, frozen.streams.strength)


def find_neighbors(query: Query) -> StageRecord:
    """Write the nearest reference cells of every cell, and their distances."""
    frozen, n, k = query.frozen, query.store.n_cells, query.frozen.config.graph.k

    def make() -> tuple[list[str], dict[str, Any]]:
        anchor = query.load(CORRECTED.format("anchor"))
        index = frozen.index
        with (
            query.directory.publish(INDICES) as indices,
            query.directory.publish(DISTANCES) as distances,
            query.reporter.stage("neighbours", n) as progress,
        ):
            create_array(indices, (n, k), "int32" if frozen.n_cells < 2**31 else "int64")
            create_array(distances, (n, k), "float32")

            for start, stop in row_blocks(n, QUERY_BLOCK):
                found, far = index.query(np.asarray(anchor[start:stop]), k, query.threads)
                write_rows(indices, start, found)
                write_rows(distances, start, far)
                progress.advance(stop - start)
        return [INDICES, DISTANCES], {"k": k}

    return query.stage("neighbors", {}, ["correct"], make)
