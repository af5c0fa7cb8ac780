"""The verbs that fill a run: all of it, or stage by stage."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from schelix_scale.cli_app import app, make_reporter, one_or_all, reported
from schelix_scale.cli_options import (
    BatchKey,
    CensusUri,
    CensusVersion,
    Changes,
    ConfigFile,
    Device,
    GenesJoin,
    LabelKey,
    Layer,
    MaxMemory,
    NoSummary,
    Nproc,
    ObsFilter,
    Out,
    Overwrite,
    Protect,
    Quiet,
    RunPath,
    Scheduler,
    Seed,
    Setting,
    Sources,
    Strength,
    Threads,
)

ELSEWHERE = ("strength", "max_memory", "seed", "threads", "device", "scheduler")
NEXT = {"graph": "train", "train": "embed"}


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "  schelix integrate atlas.h5ad --batch-key donor -o atlas-run\n\n"
    "  schelix integrate atlas.zarr -b sample -o run --layer counts --protect condition\n\n"
    "  schelix integrate donors/*.h5ad -o donors-run\n\n"
    "  schelix integrate census:homo_sapiens --obs-filter \"tissue_general == 'lung' and is_primary_data == True\" "
    "-b dataset_id,assay -o lung-run\n\n"
    "  schelix integrate atlas.h5ad -b donor -o gentle-run --strength 0.5\n\n"
    "  schelix integrate atlas.h5ad -o run --config atlas.toml --set genes.n_hvg=3000 --set graph.k=50\n\n"
    "Then, in Python:  anndata.read_zarr('atlas-run/embedding.zarr').obsm\\['X_schelix']"
)
@reported
def integrate(
    context: typer.Context,
    source: Sources,
    out: Out,
    batch_key: BatchKey = None,
    strength: Strength = None,
    label_key: LabelKey = None,
    layer: Layer = None,
    genes_join: GenesJoin = None,
    obs_filter: ObsFilter = None,
    census_version: CensusVersion = None,
    census_uri: CensusUri = None,
    protect: Protect = None,
    config: ConfigFile = None,
    setting: Setting = None,
    max_memory: MaxMemory = None,
    seed: Seed = None,
    threads: Threads = None,
    device: Device = None,
    scheduler: Scheduler = None,
    nproc: Nproc = 1,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Integrate the batches of SOURCE into one embedding of all its cells.

    The embedding is written to RUN/embedding.zarr, SOURCE is only read. When RUN is there already, finished stages
    are skipped; other settings than before are refused, unless --overwrite.

    Options win over --set, and both over the file of --config.
    """
    from schelix_scale.config_io import load_config
    from schelix_scale.output import print_run, repeat_warnings
    from schelix_scale.pipeline import integrate as integrate_cells

    given = _given(context)
    reporter = make_reporter(quiet)
    run = integrate_cells(
        one_or_all(source),
        batch_key=batch_key,
        out=out,
        config=load_config(config, setting or ()),
        overwrite=overwrite,
        nproc=nproc,
        reporter=reporter,
        **_chosen(given),
    )
    repeat_warnings(reporter)
    if not quiet:
        print_run(run, out)


@app.command(
    epilog="[bold]Example[/]\n\n"
    "  schelix prepare atlas.h5ad --batch-key donor -o atlas-run\n\n"
    "  schelix graph atlas-run && schelix train atlas-run && schelix embed atlas-run"
)
@reported
def prepare(
    context: typer.Context,
    source: Sources,
    out: Out,
    batch_key: BatchKey = None,
    strength: Strength = None,
    label_key: LabelKey = None,
    layer: Layer = None,
    genes_join: GenesJoin = None,
    obs_filter: ObsFilter = None,
    census_version: CensusVersion = None,
    census_uri: CensusUri = None,
    protect: Protect = None,
    config: ConfigFile = None,
    setting: Setting = None,
    max_memory: MaxMemory = None,
    seed: Seed = None,
    threads: Threads = None,
    device: Device = None,
    scheduler: Scheduler = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Read SOURCE into RUN: gene roles, and the features of all cells.

    The first half of integrate, with the same options. All settings of the run are given here. The other half, graph,
    train and embed, needs RUN only, and may run on another machine.
    """
    from schelix_scale.config_io import load_config
    from schelix_scale.output import repeat_warnings
    from schelix_scale.pipeline import prepare as prepare_run

    given = _given(context)
    reporter = make_reporter(quiet)
    path = prepare_run(
        one_or_all(source),
        batch_key=batch_key,
        out=out,
        config=load_config(config, setting or ()),
        overwrite=overwrite,
        reporter=reporter,
        **_chosen(given),
    )
    repeat_warnings(reporter)
    if not quiet:
        typer.echo(f"{path} is prepared. Next: schelix graph {shlex.quote(str(path))}")


@app.command(epilog="[bold]Examples[/]\n\n  schelix graph atlas-run\n\n  schelix graph atlas-run --set graph.k=50")
@reported
def graph(context: typer.Context, run: RunPath, setting: Changes = None, quiet: Quiet = False) -> None:
    """Find the neighbours of all cells of RUN, which is prepared, and build the diffusion operator.

    Settings of graph.* may be others than RUN was prepared with; training and embedding are then due again.
    """
    _continue(run, "graph", setting, {}, quiet)


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "  schelix train atlas-run --embed\n\n"
    "  schelix train atlas-run --set train.refine_steps=1000\n\n"
    "  schelix train atlas-run --embed --nproc 4\n\n"
    "  schelix train atlas-run-2 --continue --embed\n\n"
    "  torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --max-restarts 3 "
    "-m schelix_scale train atlas-run --embed"
)
@reported
def train(
    context: typer.Context,
    run: RunPath,
    embed: Annotated[bool, typer.Option("--embed", help="Write the embedding after that.")] = False,
    warm: Annotated[
        bool,
        typer.Option("--continue", help="Train on from the weights of RUN's last training, as after extend."),
    ] = False,
    setting: Changes = None,
    device: Device = None,
    nproc: Nproc = 1,
    quiet: Quiet = False,
    no_summary: NoSummary = False,
) -> None:
    """Train the model of RUN, whose graph is built; or go on with a training that was interrupted.

    Settings of train.* may be others than RUN was prepared with. The source of RUN is not read, except with
    train.input = "stream".

    --nproc starts several processes on this machine; torchrun does on one or several that share a file system. Their
    number does not change what is trained, and may be another one each time a training goes on.
    """
    due = ["embed"] if embed else []
    _continue(run, "train", setting, {"device": device}, quiet, no_summary, nproc, due, warm)


@app.command(epilog="[bold]Example[/]\n\n  schelix embed atlas-run")
@reported
def embed(
    context: typer.Context,
    run: RunPath,
    setting: Changes = None,
    device: Device = None,
    nproc: Nproc = 1,
    quiet: Quiet = False,
    no_summary: NoSummary = False,
) -> None:
    """Write the embedding of all cells of RUN, whose model is trained, to RUN/embedding.zarr."""
    _continue(run, "embed", setting, {"device": device}, quiet, no_summary, nproc)


def _given(context: typer.Context) -> dict[str, Any]:
    """Return the options of a verb that are settings, by the settings' names."""
    from schelix_scale.config import OF_DATA

    settings = {name: f"data.{name}" for name in OF_DATA} | {name: name for name in ELSEWHERE}
    return {name: context.params[option] for option, name in settings.items() if context.params[option] != []}


def _chosen(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}


def _follows(stage: str) -> bool:
    """Whether this is a rank that leaves speaking to the main one."""
    if stage not in ("train", "embed"):
        return False
    from schelix_scale.training.dist import follows

    return follows()


def _continue(
    run: str,
    stage: str,
    setting: list[str] | None,
    given: Mapping[str, Any],
    quiet: bool,
    no_summary: bool = False,
    nproc: int = 1,
    then: Sequence[str] = (),
    warm: bool = False,
) -> None:
    """Do a stage of a run, and print the run if it is finished, else the next command."""
    from schelix_scale.config_io import flatten, load_config
    from schelix_scale.continuing import continue_run
    from schelix_scale.output import print_run, repeat_warnings

    reporter = make_reporter(quiet)
    changes = flatten(load_config(None, setting or ()).model_dump(exclude_unset=True)) | _chosen(given)
    done = continue_run(run, stage, then=then, nproc=nproc, warm=warm, reporter=reporter, **changes)
    repeat_warnings(reporter)
    if quiet or no_summary or _follows(stage):
        return
    if done is not None:
        print_run(done, run)
    else:
        typer.echo(f"Next: schelix {NEXT[stage]} {shlex.quote(run)}")
