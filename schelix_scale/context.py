"""What the stages of a run share: the store, the settings, the batches, and how a stage is done or skipped."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from schelix_scale.budget import require_memory
from schelix_scale.compute import thread_count
from schelix_scale.config import Config, memory_budget
from schelix_scale.errors import RunError
from schelix_scale.genes.sketch import SKETCH_SHARE, sketch_size
from schelix_scale.progress import Reporter
from schelix_scale.requirements import BATCH, ROW, carried_columns, requirements, with_batch_key
from schelix_scale.run import RunDirectory, StageRecord
from schelix_scale.stores.base import CellStore, Measured, partly_measured
from schelix_scale.stores.batches import Batches, default_batch_key
from schelix_scale.stores.joined import JoinedStore
from schelix_scale.stores.known_labels import KnownLabels

if TYPE_CHECKING:
    from schelix_scale.graph.search import SearchProcess
    from schelix_scale.training.dist import Ranks

__all__ = ["BATCH", "ROW", "Context"]

PLAIN = ("string", "boolean", "integer", "floating", "mixed-integer-float", "empty")

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
    known_labels
        Cell types of the cells where they are known, or None.
    threads, budget
        Threads and bytes that the stages may use.
    source_fingerprint
        Of the store's content.
    search
        A process that gets ready to find neighbours, or None: they are found in this one.
    due
        The stages that may be done; any other one must be done already. None: all.
    ranks
        Who does the stages together, or None: this process alone.
    warm
        Whether a training starts from the weights of the one before.
    """

    store: CellStore
    config: Config
    reporter: Reporter
    batches: Batches
    level_n: np.ndarray | None
    known_labels: KnownLabels | None
    threads: int
    budget: int
    source_fingerprint: str
    search: SearchProcess | None = None
    due: frozenset[str] | None = None
    ranks: Ranks | None = None
    warm: bool = False

    @classmethod
    def prepare(cls, store: CellStore, config: Config, reporter: Reporter) -> Context:
        """Read what every stage needs: batches and protected levels.

        Of several files without a batch key, each is a batch: the settings of the context say so.

        Raises
        ------
        DataError
            The batch key or a protected column is missing or cannot be used.
        """
        config = _settle_batch_key(store, config, reporter)
        found = {name: check() for name, check in requirements(store, config).items()}
        return cls(
            store,
            config,
            reporter,
            found["batches"],
            found["levels"],
            found["labels"],
            thread_count(config),
            memory_budget(config),
            store.fingerprint(),
        )

    @property
    def sketch_cells(self) -> int:
        """Cells of the sketch, as the settings and the memory budget allow."""
        return sketch_size(self.store, self.config.sketch, int(SKETCH_SHARE * self.budget))

    @cached_property
    def measured(self) -> Measured | None:
        """Which genes were measured in which cells; None: all in all."""
        return partly_measured(self.store)

    def obs(self) -> pd.DataFrame:
        """Read the obs columns that are carried into the run, in forms that parquet and zarr can hold."""
        table = self.store.obs(carried_columns(self.store, self.config)).copy()
        for name in table.columns:
            if not _storable(table[name]):
                self.reporter.say(f"obs column {name!r} ({table[name].dtype}) is carried along as text")
                table[name] = table[name].astype(str)
        table.columns = [str(name).replace("/", "_") for name in table.columns]
        table.index.name = None
        return table

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
        """Do a stage, or skip it if it was done with the same inputs; return its record.

        Raises
        ------
        RunError
            The stage is not done and not ``due``.
        ConfigError
            The memory budget is too small for the stage, or one after it.
        """
        fingerprint = directory.fingerprint(name, version, inputs, after)
        if directory.was_done(name, fingerprint):
            damage = directory.damage(name)
            if not damage:
                self.reporter.say(f"{name}: done before, skipped")
                return directory.record(name)
            if self.due is None or name in self.due:
                self.reporter.warn(f"{'; '.join(damage)}; {name} is done again")
        if self.due is not None and name not in self.due:
            raise not_done(directory, name)
        require_memory(self.store, self.config, name, self.due)
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
            "choices": self._choices(genes, directory),
            "dims": directory.record("embed").details["dims"],
            "operator_id": directory.record("train").details["operator_id"],
            "seconds": round(sum(record.seconds for record in directory.records()), 1),
            **version_facts(directory),
        }

    def _choices(self, genes: Mapping[str, Any], directory: RunDirectory) -> dict[str, Any]:
        """Return what the data decided, and the settings that are the same for all data, of how much is corrected."""
        config, corrected = self.config, not genes["single_stream"]
        return {
            "corrected": corrected,
            "batch_signal": genes["batch_signal"],
            "anchor_cut": genes["cut"] if corrected else None,
            "partition_rounds": genes["rounds"],
            "gene_scaling": f"sd^{config.features.scale_power:g}",
            "anchor_components": config.features.anchor_dims,
            "clusters": directory.record("features").details.get("clusters"),  # None: an earlier version made it
            "neighbours": config.graph.k,
            "hops": list(config.graph.hops),
            "reach": config.train.reach,
            "pull": config.train.pull,
            "strength": config.strength,
            "labelled_cells": 0 if self.known_labels is None else self.known_labels.known,
        }


def version_facts(directory: RunDirectory) -> dict[str, Any]:
    """Return which version of a run it is and what its last extension added, nothing if it was not extended.

    A run whose graph was built anew since then knows no more of what was found when it was extended.
    """
    if "extends" not in directory.source:
        return {}
    found = directory.record("graph").details.get("extensions", [{}])[-1]
    added = {key: found[key] for key in ("cells", "batches", "recall") if key in found}
    return {"version": len(directory.source["extends"]) + 1, "extension": added}


def not_done(directory: RunDirectory, stage: str) -> RunError:
    """Return the error of a stage that another command must do first."""
    if stage in ("genes", "features"):
        command = f"schelix prepare SOURCE -o {directory.path}"
        return RunError(f"{directory.path} is not prepared: stage {stage} is not done, or damaged. Run `{command}`.")
    why = "is not done, is damaged, or is older than what it was made from"
    return RunError(f"stage {stage} of {directory.path} {why}. Run `schelix {stage} {directory.path}` first.")


def _settle_batch_key(store: CellStore, config: Config, reporter: Reporter) -> Config:
    """Say how several files are joined, and return the settings with the batch key that is used."""
    if isinstance(store, JoinedStore):
        for note in store.notes:
            reporter.say(note)
    key = default_batch_key(store, config.data)
    if key == config.data.batch_key:
        return config
    reporter.say(f"no batch key was given and no file has {config.data.batch_key!r}: each file is a batch ({key!r})")
    return with_batch_key(config, key)


def _storable(column: pd.Series) -> bool:
    """Whether parquet and zarr both hold a column as it is."""
    kind = column.dtype
    if isinstance(kind, pd.CategoricalDtype):
        return kind.categories.dtype.kind in "OUSbiuf" and pd.api.types.infer_dtype(kind.categories) in PLAIN
    if kind.kind == "O":
        return pd.api.types.infer_dtype(column, skipna=True) in ("string", "boolean", "empty")
    return kind.kind in "biufUS"
