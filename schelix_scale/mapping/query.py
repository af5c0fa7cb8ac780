"""New batches -> features, corrected features, and neighbours in the reference: the stages of a mapping on disk.

What comes in: a reference, a store of cells and a claimed directory. What goes out: .npy files in it, stage by stage,
so that a mapping that was stopped goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from schelix_scale.arrays import create_array, map_array
from schelix_scale.features.onepass import write_rows
from schelix_scale.graph.vectors import row_blocks
from schelix_scale.mapping.correction import BatchShift, fit_batch, shifted
from schelix_scale.mapping.inputs import batches_digest
from schelix_scale.mapping.matched import Matched, matched
from schelix_scale.mapping.reference import Frozen
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.progress import Reporter
from schelix_scale.records import StageRecord, recorded_stages
from schelix_scale.run_directory import RunDirectory
from schelix_scale.scheduling import run_tasks
from schelix_scale.stores.base import CellStore, Measured, partly_measured
from schelix_scale.stores.batches import Batches

DECIDED = 5_000
BLOCK, QUERY_BLOCK = 8_192, 131_072
FIT_CELLS = 20_000
DRAWN_STEPS = 1024  # in a standard deviation: rounding hardly ever changes which cells are drawn
RAW, CORRECTED = "features/{}_raw.npy", "features/{}.npy"
STREAMS = ("anchor", "variant")
MOVES = "features/{}_learned.npy"
MEASURED = "features/measured.npy"
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
        elif name in recorded_stages(directory.path):
            self.reporter.warn(
                f"{name}: was done otherwise (settings, labels or version of schelix); it is done again, and what "
                f"{directory.path} holds is replaced. Another directory (-o) would keep both."
            )
        directory.begin(name)
        started = time.monotonic()
        artifacts, details = make()
        return directory.finish(name, fingerprint, artifacts, time.monotonic() - started, details)

    def load(self, name: str) -> np.ndarray:
        """Memory-map an array of the directory."""
        found: np.ndarray = map_array(self.directory.path / name)
        return found

    @cached_property
    def measured(self) -> Measured | None:
        """Which genes were measured in which cells of the query; None: all in all."""
        return partly_measured(self.store)

    @cached_property
    def matched(self) -> list[Matched]:
        """The query's genes as the reference has them, for each group of cells that measured the same ones."""
        return matched(self.store, self.frozen, self.settings.gene_key, self.measured)


def correct(query: Query) -> StageRecord:
    """Fit each batch's displacement, and write the corrected components."""
    frozen, batches = query.frozen, query.batches

    def make() -> tuple[list[str], dict[str, Any]]:
        raw = [query.load(RAW.format(name)) for name in STREAMS]
        order = content_order(raw[0], drawn_step(frozen))
        shifts, facts, n = [], [], query.store.n_cells
        files = [CORRECTED.format(name) for name in STREAMS]
        with ExitStack() as published, query.reporter.stage("correct", n) as progress:
            paths = [published.enter_context(query.directory.publish(file)) for file in files]
            out = [create_array(path, part.shape, "float32") for path, part in zip(paths, raw, strict=True)]
            of_batch = [np.flatnonzero(batches.codes == code) for code in range(len(batches.names))]
            fitted: dict[int, BatchShift] = {}

            def fit(code: int) -> int:
                drawn = of_batch[code][np.argsort(order[of_batch[code]], kind="stable")[:FIT_CELLS]]
                fitted[code] = _shift(frozen, raw[0][drawn], raw[1][drawn])
                return 0

            run_tasks(fit, range(len(of_batch)), query.threads)
            for code, name in enumerate(batches.names):
                rows, shift = of_batch[code], fitted[code]
                shifts.append(shift)
                facts.append({"batch": name, "cells": len(rows), "held_back": shift.held_back})
                spans = row_blocks(len(rows), BLOCK)

                def task(span: tuple[int, int], rows: np.ndarray = rows, shift: BatchShift = shift) -> int:
                    part = rows[slice(*span)]
                    out[0][part], out[1][part] = _moved(frozen, shift, raw[0][part], raw[1][part])
                    return len(part)

                run_tasks(task, list(spans), query.threads, None, progress.advance)
            for array in out:
                array.flush()
        with query.directory.publish(SHIFTS) as path:
            np.savez(
                path,
                anchor_bd=np.stack([shift.anchor_d for shift in shifts]),
                variant_bv=np.stack([shift.variant_v for shift in shifts]),
            )
        return [*files, SHIFTS], {"corrected": frozen.corrects, "batches": facts}

    return query.stage("correct", {"batches": batches_digest(batches), "version": 3}, ["project"], make)


def drawn_step(frozen: Frozen) -> np.ndarray:
    """Return the steps (2,) in which components are rounded to draw cells, see `content_order`."""
    spread = np.asarray(frozen.raw_na[frozen.sample, :2], np.float64).std(axis=0)
    return np.asarray(np.maximum(spread / DRAWN_STEPS, 1e-12))


def content_order(anchor_nd: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Numbers (n,) by which cells are drawn at random: from what is measured, so that no place or name matters."""
    steps = np.rint(np.asarray(anchor_nd[:, :2], np.float64) / step).astype(np.int64)
    return np.asarray(pd.util.hash_array(steps @ np.array([1, 1 << 32])))


def _shift(frozen: Frozen, anchor_nd: np.ndarray, variant_nv: np.ndarray) -> BatchShift:
    """Fit a batch; none is displaced in a reference that corrects nothing."""
    if not frozen.corrects:
        return BatchShift(np.zeros(anchor_nd.shape[1]), np.zeros(variant_nv.shape[1]), 0.0)
    return fit_batch(frozen.clusters, anchor_nd, variant_nv)


def _moved(
    frozen: Frozen, shift: BatchShift, anchor_md: np.ndarray, variant_mv: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if not frozen.corrects:
        return anchor_md, variant_mv
    return shifted(shift, anchor_md, variant_mv, frozen.streams.strength)


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
