"""The order of the stages: from a source of cells to a finished run directory.

Each stage reads what the ones before it published, and is skipped when neither its inputs nor its settings changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from schelix_scale.compute import keep_memory_low, limited_threads, release_memory, resolve_device, share_cores
from schelix_scale.config import Config
from schelix_scale.config_io import load_config
from schelix_scale.context import Context
from schelix_scale.errors import ConfigError
from schelix_scale.progress import Reporter, RichReporter
from schelix_scale.run import Run, RunDirectory
from schelix_scale.stages import STAGES
from schelix_scale.stages.graph import search_ahead
from schelix_scale.stores import CellStore, Source, open_configured
from schelix_scale.stores.checks import check_names
from schelix_scale.stores.joined import JoinedStore


def integrate(
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
    reporter
        Where progress goes; standard error by default.
    **settings
        Single settings with ``__`` or a dot between levels, as ``genes__n_hvg=1000``, ``seed=1``, or
        ``**{"graph.k": 15}``. They win over ``config``.

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
    share_cores()
    keep_memory_low()
    given = {"strength": strength, "data.label_key": label_key}
    named = {key.replace("__", "."): value for key, value in settings.items()}
    if label_key is not None and named.get("data.label_key", label_key) != label_key:
        raise ConfigError(f"label_key is {label_key!r} and data.label_key {named['data.label_key']!r}. Give one.")
    settings = named | {key: value for key, value in given.items() if value is not None}
    chosen = merge_settings(config, batch_key, settings)
    if chosen.device not in ("auto", "cpu"):  # loads torch, to complain now and not after hours
        resolve_device(chosen.device)
    reporter = reporter or RichReporter()
    store = open_configured(source, chosen.data)
    check_names(store)
    for notice in store.notices():
        reporter.warn(notice)
    context = Context.prepare(store, chosen, reporter)
    description = {"uri": _uri(store), "layer": store.layer, "fingerprint": context.source_fingerprint}
    description |= store.provenance()
    with RunDirectory.claim(out, context.config, description, overwrite) as directory, limited_threads(context.threads):
        with search_ahead(context, directory) as ready:
            for stage in STAGES:
                stage(ready, directory)
                release_memory()
        if not (directory.path / "manifest.json").exists():
            directory.finish_run(context.summary(directory))
    return Run.open(out)


def merge_settings(config: Config | str | Path | None, batch_key: str | None, settings: Mapping[str, Any]) -> Config:
    """Combine a Config or TOML file with single settings, which win.

    Raises
    ------
    ConfigError
        A setting is unknown or has a bad value.
    """
    overrides = {key.replace("__", "."): value for key, value in settings.items()}
    if batch_key is not None:
        if overrides.get("data.batch_key", batch_key) != batch_key:
            raise ConfigError(
                f"batch_key is {batch_key!r} and data.batch_key {overrides['data.batch_key']!r}. Give one."
            )
        overrides["data.batch_key"] = batch_key
    if isinstance(config, Config):
        given = config.model_dump(exclude_unset=True)
        return load_config(None, {**flatten(given), **overrides})
    return load_config(config, overrides)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _uri(store: CellStore) -> str:
    if isinstance(store, JoinedStore):  # its source is a text of several names, which may be too long for a path
        return store.source
    path = Path(store.source).expanduser()
    return str(path.resolve()) if path.exists() else store.source
