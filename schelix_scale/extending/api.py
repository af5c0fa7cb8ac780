"""`extend`: a finished run and new batches come in, the next version of the run goes out, in a directory of its own.

Nothing of the run is made again: its files are linked or copied and rows are appended, so that the work is that of the
new cells. The run that is extended is only read. The new version is a run like any other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from schelix_scale.compute import keep_memory_low, limited_threads, reused_memory, share_cores
from schelix_scale.context import version_facts
from schelix_scale.errors import DataError, RunError
from schelix_scale.extending.stages import EXTENSION, Extension
from schelix_scale.mapping.api import NEEDED, Reference
from schelix_scale.mapping.inputs import (
    batches_digest,
    merged_settings,
    open_query,
    parted,
    query_batches,
    refuse_inside,
)
from schelix_scale.mapping.project import project
from schelix_scale.mapping.query import Query, correct
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.progress import Reporter, RichReporter
from schelix_scale.publish import remove
from schelix_scale.records import START
from schelix_scale.run import Run, RunDirectory
from schelix_scale.stores import CellStore, Source
from schelix_scale.stores.batches import Batches
from schelix_scale.stores.joined import source_address

LEAST = 2
NOT_NEEDED = "novelty", "profiles", "diffused"  # of a mapping: new cells are diffused among each other as well


def extend(
    run: str | Path,
    query: Source,
    *,
    out: str | Path,
    batch_key: str | None = None,
    layer: str = "X",
    overwrite: bool = False,
    config: MapConfig | str | Path | None = None,
    threads: int | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Run:
    """Append new batches to a finished run, as its next version: features, graph and embedding, without training.

    Cells of the run keep their rows, neighbours and embedding, bit by bit. New cells are projected and corrected as
    `Reference.map` does it, and have neighbours among all cells, each other included; they come after the run's.

    Parameters
    ----------
    run
        The finished run. It is only read.
    query
        Whatever `open_store` opens.
    out
        The directory of the new version. An extension that was stopped there goes on.
    batch_key
        As in `Reference.map`. A batch whose name the run has already is a new one, and gets the version after it.
    layer
        Where the values of the query are.
    overwrite
        Start over: remove the run that is in ``out``.
    config, **settings
        Of the mapping: values, gene_key, min_genes. And what is read, as in `Reference.map`.
    threads
        Those of the run by default.
    reporter
        Where progress goes; standard error by default.

    Raises
    ------
    StoreError, DataError
        The query cannot be read, or does not fit the run.
    GraphError
        Neighbours of new cells are found with a lower recall than ``graph.min_recall`` of the run.
    RunError
        ``run`` is not finished, ``out`` holds something else, or was trained on and is not finished.

    Examples
    --------
    >>> extend("atlas-run", "new.h5ad", batch_key="donor", out="atlas-run-2")  # doctest: +SKIP
    """
    share_cores()
    keep_memory_low()
    reference = Reference.open(run, threads)
    out = Path(out).expanduser()
    refuse_inside(reference.path, out)
    reading, single = parted(settings)
    chosen = merged_settings(config, single)
    store = open_query(query, layer, reading)
    batches = query_batches(store, batch_key, reference.frozen.config.data.batch_key)
    _check_size(reference, store)
    reporter = reporter or RichReporter()
    source = _description(reference, store, batches, chosen)
    with (
        RunDirectory.claim(out, reference.frozen.config, source, overwrite) as directory,
        reused_memory(),
        limited_threads(1),  # blocks are shared out to threads, each of which does the work of one
    ):
        if not (directory.path / "manifest.json").exists() or directory.verify():
            _fill(reference, store, batches, directory, chosen, reporter)
    return Run.open(out)


def _fill(
    reference: Reference,
    store: CellStore,
    batches: Batches,
    directory: RunDirectory,
    settings: MapConfig,
    reporter: Reporter,
) -> None:
    """Do the stages, and write the manifest."""
    if (directory.path / START).exists():  # its embedding is no longer what the run's own model makes
        raise RunError(
            f"{directory.path} was trained on after it had been extended. To finish it run `schelix embed "
            f"{directory.path}`, or `schelix train {directory.path} --continue --embed` if its training is not done."
        )
    scratch = directory.path / EXTENSION
    with RunDirectory.claim(scratch, directory.config, directory.source) as inner:
        query = reference.query(
            store, batches, inner, settings, reporter, [name for name in NEEDED if name not in NOT_NEEDED]
        )
        project(query)
        correct(query)
        extension = Extension(query, directory)
        extension.fill()
        summary = _summary(reference, query, directory)
    remove(scratch)
    directory.finish_run(summary)


def _check_size(reference: Reference, store: CellStore) -> None:
    if store.n_cells < LEAST:
        raise DataError(f"{store.source} has {store.n_cells} cell; an extension needs {LEAST}. Map it instead.")


def _description(reference: Reference, store: CellStore, batches: Batches, settings: MapConfig) -> dict[str, Any]:
    """Describe the cells of the new version: those of the run, and the new ones; with the chain of versions.

    Batches and settings are part of what they are: an extension goes on only with the same.
    """
    before = reference.frozen.directory.source
    own: dict[str, Any] = {"uri": source_address(store), "layer": store.layer, "fingerprint": store.fingerprint()}
    own |= {**store.provenance(), "cells": store.n_cells}
    known: dict[str, Any] = {key: before[key] for key in ("uri", "layer", "fingerprint") if key in before}
    first: dict[str, Any] = {**known, "cells": reference.frozen.n_cells}
    parts: Sequence[Any] = before["parts"] if "extends" in before else [first]  # else parts are those of a joined store
    how = settings.model_dump(include={"values", "gene_key", "min_genes"})
    own |= {"batches": batches_digest(batches), "settings": how}
    new = [own["fingerprint"], store.obs_fingerprint(), own["batches"], how]
    content = f"{before['fingerprint']} + {new} onto {reference.frozen.fingerprint}"
    link = {
        "path": str(reference.path.resolve()),
        "fingerprint": reference.frozen.fingerprint,
        "cells": reference.frozen.n_cells,
    }
    return {
        "uri": f"extension of {reference.path.name} by {Path(store.source).name}",
        "layer": store.layer,
        "nonzeros_per_cell": _nonzeros(reference, store),
        "fingerprint": hashlib.sha256(content.encode()).hexdigest()[:32],
        "extends": [*before.get("extends", []), link],
        "parts": [*parts, own],
    }


def _nonzeros(reference: Reference, store: CellStore) -> float:
    """Return the mean number of stored values of a cell, old or new; training derives its blocks from it."""
    n, m = reference.frozen.n_cells, store.n_cells
    before = reference.frozen.directory.source.get("nonzeros_per_cell", store.nonzeros_per_cell)
    return float((n * before + m * store.nonzeros_per_cell) / (n + m))


def _summary(reference: Reference, query: Query, directory: RunDirectory) -> dict[str, Any]:
    """Return the run's summary, with what the extension changed."""
    before = Run.open(reference.path).manifest["summary"]
    genes, facts = query.directory.record("project").details, version_facts(directory)
    return {
        **before,
        "cells": reference.frozen.n_cells + query.store.n_cells,
        "batches": before["batches"] + len(query.batches.names),
        "operator_id": directory.record("train").details["operator_id"],
        "seconds": round(sum(record.seconds for record in directory.records()), 1),
        **facts,
        "extension": {**facts["extension"], **genes},
    }
