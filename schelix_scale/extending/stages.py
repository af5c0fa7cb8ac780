"""The stages of a run's next version: each is recorded as the run's own stage would be, with rows appended."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import pandas as pd

from schelix_scale.arrays import load_arrays, map_array
from schelix_scale.config import memory_budget
from schelix_scale.context import BATCH, ROW, Context
from schelix_scale.extending.files import append_embedding, append_rows, appended_cells, link
from schelix_scale.extending.index import append_index
from schelix_scale.extending.rows import NewRows, diffuse_rows, new_rows
from schelix_scale.features.streams import Streams
from schelix_scale.graph.scratch import INDEX
from schelix_scale.graph.vectors import row_blocks
from schelix_scale.mapping.correction import BatchShift
from schelix_scale.mapping.encode import latents
from schelix_scale.mapping.query import BLOCK, CORRECTED, MOVES, RAW, SHIFTS, STREAMS, Query
from schelix_scale.mapping.reference import Frozen
from schelix_scale.publish import write_json
from schelix_scale.recorded import RecordedStore
from schelix_scale.records import read_json
from schelix_scale.run_directory import RunDirectory
from schelix_scale.scheduling import run_tasks
from schelix_scale.stages import STAGES

EXTENSION = "extension"
KEPT = ("genes.parquet", "sketch.npz")
FILES = {"anchor": RAW.format("anchor"), "anchor_corrected": CORRECTED.format("anchor")}
NAMES = ("genes", "features", "graph", "train", "embed")

Made = tuple[list[str], dict[str, Any]]


@dataclass(frozen=True)
class Extension:
    """A query that is projected and corrected, and the claimed directory of the next version.

    Attributes
    ----------
    query
        Of the new cells; its directory holds their features.
    directory
        The next version's.
    """

    query: Query
    directory: RunDirectory

    @property
    def frozen(self) -> Frozen:
        """The run that is extended."""
        return self.query.frozen

    def fill(self) -> None:
        """Do all stages that are not done."""
        source = self.directory.source["fingerprint"]
        genes = self.directory.fingerprint("genes", 1, {"source": source, "extends": self.frozen.fingerprint})
        self._stage("genes", genes, self._genes)
        for name, stage, make in zip(
            NAMES[1:], STAGES[1:], (self._features, self._graph, self._train, self._embed), strict=True
        ):
            self._stage(name, self._fingerprint(name, stage), make)

    def _stage(self, name: str, fingerprint: str, make: Callable[[], Made]) -> None:
        directory, reporter = self.directory, self.query.reporter
        if directory.is_done(name, fingerprint):
            reporter.say(f"{name}: done before, skipped")
            return
        directory.begin(name)
        started = time.monotonic()
        with reporter.stage(f"extend {name}", self.query.store.n_cells) as progress:
            artifacts, details = make()
            progress.advance(self.query.store.n_cells)
        directory.finish(name, fingerprint, artifacts, time.monotonic() - started, details)

    def _fingerprint(self, name: str, stage: Callable[[Context, RunDirectory], None]) -> str:
        """Return what the run's own stage would be recorded under, so that later stages take it for done."""
        config = self.frozen.config
        if config.train.input == "stream" and name in ("train", "embed"):  # their cells come from several sources
            return self.directory.fingerprint(name, 0, {}, ["graph"])
        probe = _Probe(self._context)
        stage(cast(Context, probe), self.directory)
        return probe.fingerprint

    @cached_property
    def _context(self) -> Context:
        """The context of the stages after the genes: what they read of the cells is in cells.parquet by then."""
        config, store = self.frozen.config, RecordedStore(self.directory)
        return Context(
            store,
            config,
            self.query.reporter,
            store.batches(),
            None,
            store.labels(),
            self.query.threads if config.threads is None else config.threads,
            memory_budget(config),
            store.fingerprint(),
        )

    def _details(self, stage: str) -> dict[str, Any]:
        return dict(self.frozen.directory.record(stage).details)

    def _genes(self) -> Made:
        root, query = self.frozen.directory.path, self.query
        for name in KEPT:
            with self.directory.publish(name) as path:
                link(root / name, path)
        table = pd.read_parquet(root / "cells.parquet")
        version = len(self.directory.source["extends"]) + 1
        joined = appended_cells(table, query.store, query.batches, self.frozen.config.data.batch_key, version)
        with self.directory.publish("cells.parquet") as path:
            joined.to_parquet(path)
        return [*KEPT, "cells.parquet"], self._details("genes")

    def _features(self) -> Made:
        root, frozen = self.frozen.directory.path, self.frozen
        with self.directory.publish("streams.npz") as path:
            _with_batches(frozen, load_arrays(self.query.directory.path / SHIFTS)).save(path)
        files = FILES | ({"variant": CORRECTED.format("variant")} if self._details("genes")["variants"] else {})
        made = []
        for name, new in files.items():
            made.append(f"features/{name}.npy")
            with self.directory.publish(made[-1]) as path:
                append_rows(map_array(root / made[-1]), self.query.load(new), path)
        return ["streams.npz", *made], self._details("features")

    @cached_property
    def _corrected(self) -> list[np.ndarray]:
        return [np.asarray(self.query.load(CORRECTED.format(name))) for name in STREAMS]

    def _graph(self) -> Made:
        query, frozen = self.query, self.frozen
        codes = query.batches.codes + int(frozen.batch_n.max()) + 1
        folder = query.directory.path / "neighbors.building"
        rows, audit = new_rows(frozen, self._corrected[0], codes, folder, query.threads, query.budget)
        query.reporter.say(f"neighbour recall of new cells {audit['recall']:.3f}")
        details = self._details("graph")
        known = details.get("extensions", [])
        facts = {"cells": query.store.n_cells, "batches": query.directory.record("correct").details["batches"]}
        learned_on = self._details("train")["operator_id"]
        made, names = [], {}
        for old in dict.fromkeys((details["operator_id"], learned_on)):
            names[old] = self._next_id(old)
            made += self._append_operator(old, names[old], rows, [*known, audit])
        more = {"operator_id": names[details["operator_id"]], "learned_on": names[learned_on]}
        return made, {**details, **more, "extensions": [*known, {**audit, **facts}]}

    def _next_id(self, name: str) -> str:
        content = f"{name} {self.directory.source['fingerprint']}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _append_operator(self, old: str, name: str, rows: NewRows, audits: list[dict[str, Any]]) -> list[str]:
        """Publish an operator with rows of new cells, and what they are diffused to under it."""
        root, made = self.frozen.directory.path, [f"graph/{name}", f"diffused/{name}"]
        levels = dict(zip(STREAMS, self.frozen.levels(old), strict=True))
        with ExitStack() as published:
            graph, diffused = (published.enter_context(self.directory.publish(folder)) for folder in made)
            graph.mkdir()
            diffused.mkdir()

            def diffuse(stream: str, own: np.ndarray) -> None:
                file = f"{stream}.npy"
                new = diffuse_rows(self.frozen, levels[stream], rows, own)
                append_rows(map_array(root / "diffused" / old / file), new, diffused / file)

            def append(file: str, new: np.ndarray) -> None:
                append_rows(map_array(root / "graph" / old / file), new, graph / file)

            tasks = [partial(diffuse, *pair) for pair in zip(STREAMS, self._corrected, strict=True)]  # longest first
            tasks += [partial(append, "indices.npy", rows.indices_mk), partial(append, "weights.npy", rows.weights_mk)]
            of_features = old == self._details("graph")["operator_id"]  # others are of latents, and are not searched
            if of_features and (root / "graph" / old / INDEX).is_dir():
                tasks.append(partial(append_index, root / "graph" / old / INDEX, self._corrected[0], graph / INDEX))
            run_tasks(_called, tasks, self.query.threads)
            audit = read_json(root / "graph" / old / "audit.json")
            write_json(graph / "audit.json", {**audit, "extensions": audits})
        return made

    def _train(self) -> Made:
        root = self.frozen.directory.path
        with self.directory.publish("checkpoints") as path:  # copied: a later training adds to its log in place
            shutil.copytree(root / "checkpoints", path)
        learned_on = self.directory.record("graph").details["learned_on"]
        return ["checkpoints"], {**self._details("train"), "operator_id": learned_on}

    def _embed(self) -> Made:
        frozen, query = self.frozen, self.query
        folder = self.directory.path / "diffused" / self.directory.record("train").details["operator_id"]
        diffused = [map_array(folder / f"{stream}.npy")[frozen.n_cells :] for stream in STREAMS]
        learned = query.directory.record("project").details["learned"]
        moves = [query.load(MOVES.format(name)) for name in STREAMS] if learned else None
        parts: dict[str, list[np.ndarray]] = {}
        for start, stop in row_blocks(query.store.n_cells, BLOCK):
            block = [np.array(part[start:stop]) for part in diffused]
            if moves is not None:
                for hops, move in zip(block, moves, strict=True):
                    hops[:, 0] += move[start:stop]
            for key, latent in latents(frozen, block).items():
                parts.setdefault(key, []).append(latent)
        obs = pd.read_parquet(self.directory.path / "cells.parquet").drop(columns=[ROW, BATCH])
        uns = {
            "source": self.directory.source["uri"],
            "source_fingerprint": self.directory.source["fingerprint"],
            "operator_id": self.directory.record("train").details["operator_id"],
        }
        new = {key: np.concatenate(found) for key, found in parts.items()}
        with self.directory.publish("embedding.zarr") as path:
            append_embedding(frozen.directory.path / "embedding.zarr", path, obs, new, uns)
        return ["embedding.zarr"], self._details("embed")


def _called(task: Callable[[], None]) -> int:
    task()
    return 1


class _Probe:
    """Stands for a `Context`, and keeps the fingerprint of the stage that it is given to; nothing is done."""

    def __init__(self, context: Context) -> None:
        self._context, self.fingerprint = context, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def run_stage(
        self, directory: RunDirectory, name: str, version: int, inputs: Any, after: list[str], make: object
    ) -> None:
        self.fingerprint = directory.fingerprint(name, version, inputs, after)


def _with_batches(frozen: Frozen, shifts: Mapping[str, np.ndarray]) -> Streams:
    """Return the run's streams with the displacements of new batches after its own."""
    streams = frozen.streams
    if streams.correction is None:
        return streams
    fitted = [
        BatchShift(anchor, variant, 0.0)
        for anchor, variant in zip(shifts["anchor_bd"], shifts["variant_bv"], strict=True)
    ]
    correction, variant_shift = frozen.clusters.extended(fitted)
    kept = None if streams.variant_shift_kbd is None else variant_shift
    return replace(streams, correction=correction, variant_shift_kbd=kept)
