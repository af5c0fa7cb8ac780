"""What the stages of a run share: the store, the settings, the batches, and how a stage is done or skipped."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from schelix_scale.compute import thread_count
from schelix_scale.config import Config, memory_budget
from schelix_scale.progress import Reporter
from schelix_scale.run import RunDirectory, StageRecord
from schelix_scale.stores.base import CellStore
from schelix_scale.stores.batches import Batches, read_batches

SKETCH_SHARE = 0.4
PASS_SHARE = 0.25

Make = Callable[[str], tuple[list[str], dict[str, Any]]]


@dataclass(frozen=True)
class Context:
    """What all stages of a run share.

    Attributes
    ----------
    store, config, reporter
        Where cells come from, the settings, where progress goes.
    batches
        Batch codes, names and sizes.
    level_n
        (n,) codes of the protected levels, or None.
    threads, budget
        Threads and bytes that the stages may use.
    source_fingerprint
        Of the store's content.
    """

    store: CellStore
    config: Config
    reporter: Reporter
    batches: Batches
    level_n: np.ndarray | None
    threads: int
    budget: int
    source_fingerprint: str

    @classmethod
    def prepare(cls, store: CellStore, config: Config, reporter: Reporter) -> Context:
        """Read what every stage needs: batches and protected levels.

        Raises
        ------
        DataError
            The batch key or a protected column is missing or cannot be used.
        """
        batches = read_batches(store, config.data.batch_key)
        levels = None
        if config.data.protect:
            columns = store.obs(config.data.protect).astype(str)
            levels = columns.agg(" | ".join, axis=1).factorize(sort=True)[0].astype(np.int32)
        return cls(
            store, config, reporter, batches, levels, thread_count(config), memory_budget(config), store.fingerprint()
        )

    @property
    def cells_hash(self) -> str:
        """Hash of batches and protected levels of all cells."""
        digest = hashlib.sha256(self.batches.codes.tobytes() + "\0".join(self.batches.names).encode())
        if self.level_n is not None:
            digest.update(self.level_n.tobytes())
        return digest.hexdigest()

    def run_stage(
        self,
        directory: RunDirectory,
        name: str,
        version: int,
        inputs: Mapping[str, Any],
        after: Sequence[str],
        make: Make,
    ) -> StageRecord:
        """Do a stage, or skip it if it was done with the same inputs; return its record."""
        fingerprint = directory.fingerprint(name, version, inputs, after)
        if directory.is_done(name, fingerprint):
            self.reporter.say(f"{name}: done before, skipped")
            return directory.record(name)
        directory.begin(name)
        started = time.monotonic()
        artifacts, details = make(fingerprint)
        return directory.finish(name, fingerprint, artifacts, time.monotonic() - started, details)

    def summary(self, directory: RunDirectory) -> dict[str, Any]:
        """Return what the manifest says of the run at a glance."""
        genes = directory.record("genes").details
        return {
            "cells": self.store.n_cells,
            "genes": len(self.store.gene_names),
            "batches": len(self.batches.names),
            **{key: genes[key] for key in ("anchors", "variants", "single_stream", "values", "values_reason")},
            "dims": directory.record("embed").details["dims"],
            "operator_id": directory.record("train").details["operator_id"],
            "seconds": round(sum(record.seconds for record in directory.records()), 1),
        }
