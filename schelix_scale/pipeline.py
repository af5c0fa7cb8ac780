"""The order of the stages: from a source of cells to a finished run directory.

Each stage reads what the ones before it published, and is skipped when neither its inputs nor its settings changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from schelix_scale.compute import keep_memory_low, limited_threads, release_memory, share_cores
from schelix_scale.config import OF_DATA, Config
from schelix_scale.config_io import merge_settings
from schelix_scale.context import Context
from schelix_scale.continuing import check_device, continue_run, finish
from schelix_scale.errors import ConfigError
from schelix_scale.progress import Reporter, RichReporter
from schelix_scale.run import Run, RunDirectory
from schelix_scale.stages import STAGES
from schelix_scale.stages.graph import search_ahead
from schelix_scale.stores import Source, open_configured
from schelix_scale.stores.checks import check_names
from schelix_scale.stores.joined import source_address

PREPARED = 2  # stages that read the source
APART = 3  # stages before those that several processes can do together


def integrate(
    source: Source,
    *,
    batch_key: str | None = None,
    out: str | Path,
    label_key: str | None = None,
    strength: float | None = None,
    config: Config | str | Path | None = None,
    overwrite: bool = False,
    nproc: int = 1,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Run:
    """Integrate the batches of a data set into one embedding.

    Parameters
    ----------
    source
        Whatever `open_store` opens: an ``.h5ad`` file or ``.zarr`` directory in anndata layout, a list of such paths
        or a pattern (``"donors/*.h5ad"``), an AnnData in memory, or a store.
    batch_key
        The obs column that names each cell's batch, or several with commas between (``"dataset,assay"``);
        ``data.batch_key`` of the settings by default, and of several files that have no such column, each file.
    out
        The run directory. A run of the same settings that is there is continued, or returned if it is finished.
    label_key
        The obs column of cell types, where some are known: training pulls cells towards those of their type, and
        cells without a type towards those of the type that their neighbourhood has. Missing values, empty text and
        ``data.unknown_label`` ("unknown" in any case) are not known. Without it no label is ever used.
    strength
        How much is corrected and smoothed, from 0 to 1; that of the settings, which is 1, by default. 1 is the full
        method, 0 the PCA of all variable genes. Below 1, Variants count 1 - ``strength`` among the Anchors, and the
        correction, the smoothing over neighbours and what training adds are ``strength`` of what they are at 1.
        Lower it where batches are removed at the cost of differences that matter.
    config
        Settings, or the path of a TOML file of settings.
    overwrite
        Start over: remove the run that is in ``out``.
    nproc
        Processes that train and embed together, each on a GPU of its own if there are any. The result is the same up
        to rounding.
    reporter
        Where progress goes; standard error by default.
    **settings
        Single settings with ``__`` or a dot between levels, as ``genes__n_hvg=1000``, ``seed=1``, or
        ``**{"graph.k": 15}``; and ``layer``, ``protect``, ``genes_join``, ``obs_filter``, ``census_version`` and
        ``census_uri`` as they are. They win over ``config``.

    Returns
    -------
    The finished run: ``run.embedding`` (n, d) float32 in the order of the source's cells, ``run.genes``,
    ``run.to_anndata()`` with ``obsm["X_schelix"]``.

    Raises
    ------
    StoreError
        The source cannot be read.
    DataError
        Its content cannot be integrated.
    ConfigError
        A setting is unknown or has a bad value.
    RunError
        ``out`` holds something else.

    Examples
    --------
    >>> run = integrate("atlas.h5ad", batch_key="donor", out="atlas-run")  # doctest: +SKIP
    >>> run.embedding.shape  # doctest: +SKIP
    (13963, 30)
    """
    given = {"strength": strength, "data.label_key": label_key}
    with _started(source, batch_key, out, config, overwrite, reporter, given, settings) as (context, directory):
        with search_ahead(context, directory) as ready:
            for stage in STAGES if nproc == 1 else STAGES[:APART]:
                stage(ready, directory)
                release_memory()
        if nproc == 1:
            finish(context, directory)
    if nproc != 1:
        continue_run(out, "train", then=["embed"], nproc=nproc, reporter=reporter)
    return Run.open(out)


def prepare(
    source: Source,
    *,
    batch_key: str | None = None,
    out: str | Path,
    label_key: str | None = None,
    strength: float | None = None,
    config: Config | str | Path | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Path:
    """Do what `integrate` does up to the features of all cells; `continue_run` does the rest, from the directory alone.

    Parameters are those of `integrate`.

    Returns
    -------
    The run directory.

    Raises
    ------
    StoreError, DataError, ConfigError, RunError
        As `integrate`.
    """
    given = {"strength": strength, "data.label_key": label_key}
    with _started(source, batch_key, out, config, overwrite, reporter, given, settings) as (context, directory):
        for stage in STAGES[:PREPARED]:
            stage(context, directory)
            release_memory()
        return directory.path


@contextmanager
def _started(
    source: Source,
    batch_key: str | None,
    out: str | Path,
    config: Config | str | Path | None,
    overwrite: bool,
    reporter: Reporter | None,
    given: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Iterator[tuple[Context, RunDirectory]]:
    """Open the source and claim the run directory for the settings, of which ``given`` win over ``settings``."""
    share_cores()
    keep_memory_low()
    named = {f"data.{key}" if key in OF_DATA else key.replace("__", "."): value for key, value in settings.items()}
    label_key = given["data.label_key"]
    if label_key is not None and named.get("data.label_key", label_key) != label_key:
        raise ConfigError(f"label_key is {label_key!r} and data.label_key {named['data.label_key']!r}. Give one.")
    named |= {key: value for key, value in given.items() if value is not None}
    chosen = merge_settings(config, batch_key, named)
    check_device(chosen)
    reporter = reporter or RichReporter()
    store = open_configured(source, chosen.data)
    check_names(store)
    for notice in store.notices():
        reporter.warn(notice)
    context = Context.prepare(store, chosen, reporter)
    description: dict[str, Any] = {"uri": source_address(store), "layer": store.layer}
    description |= {"fingerprint": context.source_fingerprint, "nonzeros_per_cell": store.nonzeros_per_cell}
    description |= store.provenance()
    with RunDirectory.claim(out, context.config, description, overwrite) as directory, limited_threads(context.threads):
        yield context, directory
