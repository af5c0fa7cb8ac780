"""The order of the stages: from a source of cells to a finished run directory.

Each stage reads what the ones before it published, and is skipped when neither its inputs nor its settings changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schelix_scale.compute import (
    keep_memory_low,
    limited_threads,
    release_memory,
    resolve_device,
    share_cores,
    thread_count,
)
from schelix_scale.config import Config, config_differences, memory_budget
from schelix_scale.config_io import load_config
from schelix_scale.context import Context, not_done
from schelix_scale.errors import ConfigError, RunError
from schelix_scale.progress import QuietReporter, Reporter, RichReporter
from schelix_scale.recorded import RecordedStore
from schelix_scale.records import recorded_stages
from schelix_scale.run import Run, RunDirectory
from schelix_scale.stages import STAGES
from schelix_scale.stages.graph import search_ahead
from schelix_scale.stores import Source, open_configured
from schelix_scale.stores.checks import check_names
from schelix_scale.stores.joined import source_address

if TYPE_CHECKING:
    from schelix_scale.training.dist import Ranks

NAMES = ("genes", "features", "graph", "train", "embed")
PREPARED = 2  # stages that read the source
APART = 3  # stages before those that several processes can do together
LATER = NAMES[PREPARED:]


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
    given = {"strength": strength, "data.label_key": label_key}
    with _started(source, batch_key, out, config, overwrite, reporter, given, settings) as (context, directory):
        with search_ahead(context, directory) as ready:
            for stage in STAGES if nproc == 1 else STAGES[:APART]:
                stage(ready, directory)
                release_memory()
        if nproc == 1:
            _finish(context, directory)
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


def continue_run(
    run: str | Path,
    stage: str,
    *,
    then: Sequence[str] = (),
    nproc: int = 1,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Run | None:
    """Do a stage of a run that `prepare` or `integrate` has begun, with the settings and cells that it has recorded.

    The source is opened only by a training that reads expression. What a stage needs must be done: nothing before
    it is made again.

    Parameters
    ----------
    run
        The run directory.
    stage
        ``"graph"`` (neighbours and the diffusion operator), ``"train"`` or ``"embed"``.
    then
        Stages that follow it, as ``("embed",)``.
    nproc
        Processes on this machine that train and embed together; they are started as torchrun does. On several
        machines: ``torchrun ... -m schelix_scale train RUN`` on each.
    reporter
        Where progress goes; standard error by default.
    **settings
        Other settings for these stages than those recorded, as ``train__refine_steps=1000``: those of the stage's own
        section, and ``device`` and ``max_memory``.

    Returns
    -------
    The run, if it is finished with this; else None.

    Raises
    ------
    RunError
        It is no run, or a stage that comes before is not done: the message names the command that does it.
    ConfigError
        A setting is unknown, has a bad value, or belongs to another stage.

    Examples
    --------
    >>> prepare("atlas.h5ad", batch_key="donor", out="atlas-run")  # doctest: +SKIP
    >>> continue_run("atlas-run", "graph")  # doctest: +SKIP
    >>> continue_run("atlas-run", "train", then=["embed"]).embedding.shape  # doctest: +SKIP
    (13963, 30)
    """
    share_cores()
    keep_memory_low()
    due = [stage, *then]
    reporter = reporter or RichReporter()
    if stage not in LATER or not set(then) <= set(LATER[LATER.index(stage) + 1 :]):
        raise ConfigError(f"{' and '.join(due)}: a run is continued with {', '.join(LATER)}, in this order.")
    if stage == "graph":
        return _continue(run, due, settings, reporter, None)
    if nproc != 1:
        return _launched(run, due, nproc, settings, reporter)
    from schelix_scale.training.dist import joined

    with RunDirectory.open(run) as directory:
        config = _changed(directory, due, settings)
    with joined(_check_device(config, True), config.train.deterministic) as ranks:
        return _continue(run, due, settings, reporter if ranks.main else QuietReporter(), ranks)


def _launched(
    run: str | Path, due: Sequence[str], nproc: int, settings: Mapping[str, Any], reporter: Reporter
) -> Run | None:
    """Let other processes do the stages that are due, with settings that are known to be good."""
    from schelix_scale.training.launch import launch

    with RunDirectory.open(run) as directory:
        _changed(directory, due, settings)
    given = [f"{key.replace('__', '.')}={_written(value)}" for key, value in settings.items()]
    command = [due[0], str(run), *(["--embed"] if due[1:] else []), *(part for text in given for part in ("-s", text))]
    if isinstance(reporter, QuietReporter):
        command.append("--quiet")
    launch(nproc, [*command, "--no-summary"], reporter)
    return Run.open(run) if "embed" in due else None


def _written(value: Any) -> str:
    """Write the value of a setting as the command line takes it."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


def _continue(
    run: str | Path, due: Sequence[str], settings: Mapping[str, Any], reporter: Reporter, ranks: Ranks | None
) -> Run | None:
    """Do the stages that are due; the main rank holds the run, and the others do what they are told."""
    main = ranks is None or ranks.main
    with RunDirectory.open(run, writable=main) as directory:
        if main:
            config = _changed(directory, due, settings)
            _check_device(config)
            if config != directory.config:
                directory.configure(config)
            context = recorded_context(directory, due, reporter, ranks)
        if ranks is not None:
            said = ranks.agree(directory.config.model_dump_json() if main else "")
            directory.config = Config.model_validate_json(said)
            context = context if main else recorded_context(directory, due, reporter, ranks)
        threads = context.threads if ranks is None else ranks.threads(context.threads)
        ahead = search_ahead(context, directory) if "graph" in due else nullcontext(context)
        with limited_threads(threads), ahead as ready:
            last = max(map(NAMES.index, due))
            for name, do in zip(NAMES[1 : last + 1], STAGES[1 : last + 1], strict=True):
                if main or name in due:
                    do(ready, directory)
                    release_memory()
        if "embed" not in due:
            return None
        if main:
            _finish(context, directory)
    if ranks is not None:
        ranks.wait()
    return Run.open(run)


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
    named = {key.replace("__", "."): value for key, value in settings.items()}
    label_key = given["data.label_key"]
    if label_key is not None and named.get("data.label_key", label_key) != label_key:
        raise ConfigError(f"label_key is {label_key!r} and data.label_key {named['data.label_key']!r}. Give one.")
    named |= {key: value for key, value in given.items() if value is not None}
    chosen = merge_settings(config, batch_key, named)
    _check_device(chosen)
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


def recorded_context(directory: RunDirectory, due: Sequence[str], reporter: Reporter, ranks: Ranks | None) -> Context:
    """Make the context of a prepared run from what its directory holds."""
    if "genes" not in recorded_stages(directory.path):
        raise not_done(directory, "genes")
    damage = directory.damage("genes")
    if damage:
        raise RunError(f"{'; '.join(damage)}. Run the `schelix prepare` that made it again.")
    store, config = RecordedStore(directory), directory.config
    reads = config.train.enabled and ("train" in due and config.train.input == "stream")
    reads |= config.train.enabled and ("embed" in due and config.train.loadings == "learned")
    return Context(
        store.opened if reads else store,
        config,
        reporter,
        store.batches(),
        None,
        store.labels(),
        thread_count(config),
        memory_budget(config),
        store.fingerprint(),
        due=frozenset(due),
        ranks=ranks,
    )


def _changed(directory: RunDirectory, due: Sequence[str], settings: Mapping[str, Any]) -> Config:
    """Return the settings of a run with some changed that only matter to the stages that are due."""
    named = {key.replace("__", "."): value for key, value in settings.items()}
    config = merge_settings(directory.config, None, named)
    for change in config_differences(directory.config, config):
        section = change.partition(":")[0].partition(".")[0]
        if section not in due:
            where = f"`schelix {section} {directory.path}`" if section in NAMES[2:] else "another run"
            raise ConfigError(f"{change}: this cannot change in stage {' or '.join(due)}. Give it to {where}.")
    return config


def _check_device(config: Config, resolve: bool = False) -> str:
    """Return the device, which must be there; what ``auto`` stands for only if asked, which loads torch."""
    if resolve or config.device not in ("auto", "cpu"):  # complains now and not after hours
        return resolve_device(config.device)
    return config.device


def _finish(context: Context, directory: RunDirectory) -> None:
    if not (directory.path / "manifest.json").exists():
        directory.finish_run(context.summary(directory))


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
