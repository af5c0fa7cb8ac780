"""`Reference` and `map_cells`: a finished run and new cells come in, a `Mapped` goes out. Nothing is trained."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, final

from schelix_scale.compute import keep_memory_low, limited_threads, reused_memory, share_cores, thread_count
from schelix_scale.config import memory_budget
from schelix_scale.mapping.calibration import Calibration
from schelix_scale.mapping.columns import check_keys
from schelix_scale.mapping.encode import encode_query, find_calibration
from schelix_scale.mapping.held_out import sizes_of_pools
from schelix_scale.mapping.inputs import merged_settings, open_query, parted, query_batches, refuse_inside
from schelix_scale.mapping.mapped import Mapped, read_mapped
from schelix_scale.mapping.pools import wanted_sizes
from schelix_scale.mapping.project import project
from schelix_scale.mapping.query import Query, correct, find_neighbors
from schelix_scale.mapping.reference import MAPPED_ONTO, Frozen
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.progress import QuietReporter, Reporter, RichReporter
from schelix_scale.records import read_json
from schelix_scale.run_directory import RunDirectory
from schelix_scale.stores import CellStore, Source
from schelix_scale.stores.batches import Batches
from schelix_scale.stores.joined import source_address
from schelix_scale.transfer import Labels

NEEDED = ("clusters", "novelty", "profiles", "index", "model", "diffused", "neighbor_operator", "fingerprint")

__all__ = ["Mapped", "Reference", "map_cells"]


@final
class Reference:
    """A finished run that new batches are mapped onto.

    Opening reads little; what is needed is read once and kept, so that a service opens one and maps many queries,
    from several threads at once if it likes: each call has its own answers. The run is only read.

    Examples
    --------
    >>> reference = Reference.open("atlas-run")  # doctest: +SKIP
    >>> mapped = reference.map("new.h5ad", batch_key="donor", label_key="cell_type")  # doctest: +SKIP
    >>> mapped.obs["schelix_cell_type"]  # doctest: +SKIP
    """

    def __init__(self, frozen: Frozen, threads: int | None = None) -> None:
        self.frozen = frozen
        self.threads = threads or thread_count(frozen.config)
        self._once = _Once(frozen)
        self._lock = threading.Lock()
        self._labels: dict[str, Labels] = {}
        self._calibrations: dict[tuple[object, ...], Calibration] = {}

    @classmethod
    def open(cls, path: str | Path, threads: int | None = None) -> Self:
        """Open the finished run in directory ``path``; ``threads`` of each mapping are those of the run by default.

        Raises
        ------
        RunError
            It is not a run, or not a finished one.
        """
        return cls(Frozen.open(path), threads)

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.frozen.directory.path

    def map(
        self,
        query: Source,
        *,
        batch_key: str | None = None,
        label_key: str | Sequence[str] = (),
        out: str | Path | None = None,
        layer: str = "X",
        overwrite: bool = False,
        config: MapConfig | str | Path | None = None,
        reporter: Reporter | None = None,
        **settings: Any,
    ) -> Mapped:
        """Map new batches.

        Parameters
        ----------
        query
            Whatever `open_store` opens.
        batch_key
            The obs column (or columns, with commas between) that names each cell's batch. By default that of the
            reference, if the query has it, else each file of several, else all is one batch.
        label_key
            obs columns of the reference whose labels are transferred. How novel a cell is depends on them, too: its
            neighbours' labels can be mixed as those of no known type are. Latents do not.
        out
            A directory for the mapping; one that is there is continued. Nothing is kept without it.
        layer
            Where the values of the query are.
        overwrite
            Start over: remove the mapping that is in ``out``.
        config
            Settings, or a TOML file of them.
        reporter
            Where progress goes; nowhere by default.
        **settings
            Single settings, as ``coverage=0.95``; they win over ``config``. Also ``obs_filter``, ``census_version`` and
            ``census_uri``, which say what is read of a SOMA experiment or the Census, see `open_store`.

        Raises
        ------
        StoreError, DataError
            The query cannot be read, shares too few genes with the reference, or has no such batches; the reference
            carries no such labels.
        ConfigError
            A setting is unknown or has a bad value.
        RunError
            ``out`` holds something else.
        """
        reading, single = parted(settings)
        chosen = merged_settings(config, single)
        keys = (label_key,) if isinstance(label_key, str) else tuple(dict.fromkeys(label_key))
        store = open_query(query, layer, reading)
        if out is not None:
            self._fill(store, batch_key, keys, Path(out).expanduser(), overwrite, chosen, reporter)
            return Mapped.open(out)
        with tempfile.TemporaryDirectory(prefix="schelix-map-") as scratch:
            folder = Path(scratch) / "mapped"
            self._fill(store, batch_key, keys, folder, False, chosen, reporter)
            return Mapped(read_mapped(folder), read_json(folder / "manifest.json"), None)

    def _fill(
        self,
        store: CellStore,
        batch_key: str | None,
        keys: tuple[str, ...],
        out: Path,
        overwrite: bool,
        settings: MapConfig,
        reporter: Reporter | None,
    ) -> None:
        """Do the stages of a mapping in a directory, and write its manifest."""
        refuse_inside(self.path, out)
        batches = query_batches(store, batch_key, self.frozen.config.data.batch_key)
        check_keys(keys)
        labels = self._label_columns(keys)
        source = self._description(store)
        with RunDirectory.claim(out, self.frozen.config, source, overwrite) as directory:
            query = self.query(store, batches, directory, settings, reporter)
            project(query, sizes_of_pools(self.frozen, settings)[0])  # first: genes that do not fit are found at once
            correct(query)
            wanted = wanted_sizes(query)
            calibration_key = (keys, settings.calibration_cells, settings.calibration_batches)
            with self._lock:  # calibrated once for all threads
                known = self._calibrations.get(calibration_key)
                calibration, _ = find_calibration(query, labels, wanted, known)
                before = {} if known is None else known.of_pools
                self._calibrations[calibration_key] = replace(calibration, of_pools={**before, **calibration.of_pools})
            find_neighbors(query)
            encode_query(query, labels, calibration)
            if not (directory.path / "manifest.json").exists():
                directory.finish_run(self._summary(query, keys))

    def query(
        self,
        store: CellStore,
        batches: Batches,
        directory: RunDirectory,
        settings: MapConfig,
        reporter: Reporter | None = None,
        needs: Sequence[str] = NEEDED,
    ) -> Query:
        """Return a mapping of a store in a claimed directory, with all that threads share computed before."""
        frozen = self.frozen
        self._once.ready(*needs)
        if "diffused" in needs and store.n_cells * frozen.config.graph.k >= frozen.n_cells:
            self._once.materialize(self.threads)
        return Query(
            store,
            batches,
            frozen,
            directory,
            settings,
            reporter or QuietReporter(),
            self.threads,
            memory_budget(frozen.config),
        )

    def _label_columns(self, keys: tuple[str, ...]) -> list[Labels]:
        with self._lock:
            for key in keys:
                if key not in self._labels:
                    self._labels |= {key: self.frozen.labels((key,))[0]}
            return [self._labels[key] for key in keys]

    def _description(self, store: CellStore) -> dict[str, Any]:
        onto = {"path": str(self.path.resolve()), "fingerprint": self.frozen.fingerprint}
        fingerprint = f"{store.fingerprint()} onto {self.frozen.fingerprint}"
        return {
            "uri": source_address(store),
            "layer": store.layer,
            "fingerprint": fingerprint,
            MAPPED_ONTO: onto,
            **store.provenance(),
        }

    def _summary(self, query: Query, keys: tuple[str, ...]) -> dict[str, Any]:
        directory = query.directory
        genes = directory.record("project").details
        return {
            "cells": query.store.n_cells,
            "batches": len(query.batches.names),
            "reference": str(self.path),
            "reference_fingerprint": self.frozen.fingerprint,
            "reference_cells": self.frozen.n_cells,
            **genes,
            "labels": list(keys),
            "settings": query.settings.model_dump(mode="json"),
            **{key: value for key, value in directory.record("map").details.items() if key.startswith("novel_")},
            "seconds": round(sum(record.seconds for record in directory.records()), 1),
        }


@final
class _Once:
    """Computes cached properties of a `Frozen` under a lock, so that threads do not compute them twice."""

    def __init__(self, frozen: Frozen) -> None:
        self.frozen, self._lock = frozen, threading.RLock()

    def ready(self, *names: str) -> None:
        """Compute these properties, if they are not computed yet."""
        with self._lock:
            for name in names:
                getattr(self.frozen, name)

    def materialize(self, threads: int) -> None:
        """See `Frozen.materialize`."""
        with self._lock:
            self.frozen.materialize(threads)


def map_cells(
    run: str | Path,
    query: Source,
    *,
    batch_key: str | None = None,
    label_key: str | Sequence[str] = (),
    out: str | Path | None = None,
    layer: str = "X",
    overwrite: bool = False,
    config: MapConfig | str | Path | None = None,
    threads: int | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Mapped:
    """Map new batches onto a finished run, without training; see `Reference.map`.

    Parameters are those of `Reference.map`; ``run``, the directory of the reference; and ``threads``, all cores by
    default. Progress goes to standard error.

    Examples
    --------
    >>> mapped = map_cells("atlas-run", "new.h5ad", batch_key="donor", label_key="cell_type")  # doctest: +SKIP
    >>> mapped.embedding.shape  # doctest: +SKIP
    (4200, 30)
    """
    share_cores()
    keep_memory_low()
    reference = Reference.open(run, threads)
    with reused_memory(), limited_threads(1):  # blocks are shared out to threads, each of which does the work of one
        return reference.map(
            query,
            batch_key=batch_key,
            label_key=label_key,
            out=out,
            layer=layer,
            overwrite=overwrite,
            config=config,
            reporter=reporter or RichReporter(),
            **settings,
        )
