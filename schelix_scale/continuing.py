"""A prepared run -> the rest of it, from its directory alone, in one process or in several that work together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
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
from schelix_scale.config import Config, memory_budget
from schelix_scale.config_changes import config_differences
from schelix_scale.config_io import merge_settings
from schelix_scale.context import Context, not_done
from schelix_scale.errors import ConfigError, RunError
from schelix_scale.progress import QuietReporter, Reporter, RichReporter
from schelix_scale.recorded import RecordedStore
from schelix_scale.records import LATER, recorded_stages, refuse_mapped
from schelix_scale.run import Run, RunDirectory
from schelix_scale.stages import STAGES
from schelix_scale.stages.graph import search_ahead

if TYPE_CHECKING:
    from schelix_scale.training.dist import Ranks

NAMES = ("genes", "features", "graph", "train", "embed")
TOGETHER = "train", "embed"  # stages in which all ranks take part, also to hear that they are done


def continue_run(
    run: str | Path,
    stage: str,
    *,
    then: Sequence[str] = (),
    nproc: int = 1,
    warm: bool = False,
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
    warm
        Train on from the weights of the run's last training, as after `extend`, instead of from the beginning.
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
    if warm and stage != "train":
        raise ConfigError(f"only a training is continued from its weights, and not {stage}.")
    if stage == "graph":
        return _continue(run, due, settings, reporter, None)
    if nproc != 1:
        return _launched(run, due, nproc, settings, reporter, warm)
    from schelix_scale.training.dist import joined

    with RunDirectory.open(run) as directory:
        config = _changed(directory, due, settings)
    with joined(check_device(config, True), config.train.deterministic) as ranks:
        return _continue(run, due, settings, reporter if ranks.main else QuietReporter(), ranks, warm)


def _launched(
    run: str | Path, due: Sequence[str], nproc: int, settings: Mapping[str, Any], reporter: Reporter, warm: bool
) -> Run | None:
    """Let other processes do the stages that are due, with settings that are known to be good."""
    from schelix_scale.training.launch import launch

    with RunDirectory.open(run) as directory:
        _changed(directory, due, settings)
    given = [f"{key.replace('__', '.')}={_written(value)}" for key, value in settings.items()]
    command = [due[0], str(run), *(["--embed"] if due[1:] else []), *(["--continue"] if warm else [])]
    command += [*(part for text in given for part in ("-s", text))]
    if isinstance(reporter, QuietReporter):
        command.append("--quiet")
    launch(nproc, [*command, "--no-summary"], reporter)
    return Run.open(run) if "embed" in due else None


def _written(value: Any) -> str:
    """Write the value of a setting as the command line takes it."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


def _continue(
    run: str | Path,
    due: Sequence[str],
    settings: Mapping[str, Any],
    reporter: Reporter,
    ranks: Ranks | None,
    warm: bool = False,
) -> Run | None:
    """Do the stages that are due; the main rank holds the run, and the others do what they are told."""
    main = ranks is None or ranks.main
    with RunDirectory.open(run, writable=main) as directory:
        if main:
            config = _changed(directory, due, settings)
            check_device(config)
            if config != directory.config:
                directory.configure(config)
            context = recorded_context(directory, due, reporter, ranks, warm)
        if ranks is not None:
            said = ranks.agree(directory.config.model_dump_json() if main else "")
            directory.config = Config.model_validate_json(said)
            context = context if main else recorded_context(directory, due, reporter, ranks, warm)
        threads = context.threads if ranks is None else ranks.threads(context.threads)
        ahead = search_ahead(context, directory) if "graph" in due else nullcontext(context)
        with limited_threads(threads), ahead as ready:
            last = max(map(NAMES.index, due))
            for name, do in zip(NAMES[1 : last + 1], STAGES[1 : last + 1], strict=True):
                if main or name in TOGETHER:
                    do(ready, directory)
                    release_memory()
        if "embed" not in due:
            return None
        if main:
            finish(context, directory)
    if ranks is not None:
        ranks.wait()
    return Run.open(run)


def recorded_context(
    directory: RunDirectory, due: Sequence[str], reporter: Reporter, ranks: Ranks | None, warm: bool = False
) -> Context:
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
        warm=warm,
    )


def _changed(directory: RunDirectory, due: Sequence[str], settings: Mapping[str, Any]) -> Config:
    """Return the settings of a run with some changed that only matter to the stages that are due."""
    refuse_mapped(directory.path, directory.source)
    named = {key.replace("__", "."): value for key, value in settings.items()}
    config = merge_settings(directory.config, None, named)
    for change in config_differences(directory.config, config):
        section = change.partition(":")[0].partition(".")[0]
        if section not in due:
            where = f"`schelix {section} {directory.path}`" if section in NAMES[2:] else "another run"
            raise ConfigError(f"{change}: this cannot change in stage {' or '.join(due)}. Give it to {where}.")
    return config


def check_device(config: Config, resolve: bool = False) -> str:
    """Return the device, which must be there; what ``auto`` stands for only if asked, which loads torch."""
    if resolve or config.device not in ("auto", "cpu"):  # complains now and not after hours
        return resolve_device(config.device)
    return config.device


def finish(context: Context, directory: RunDirectory) -> None:
    """Write the manifest of a run whose stages are done, if it is not there."""
    if not (directory.path / "manifest.json").exists():
        directory.finish_run(context.summary(directory))
