"""The command line: one verb per public function. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from schelix_scale import cli_map, cli_run
from schelix_scale.cli_app import app, make_reporter, one_or_all, reported
from schelix_scale.cli_options import (
    BatchKey,
    CensusUri,
    CensusVersion,
    ConfigFile,
    GenesJoin,
    LabelKey,
    Layer,
    ObsFilter,
    Quiet,
    RunPath,
    Setting,
    Sources,
)

__all__ = ["app", "cli_map", "cli_run", "main"]


def main() -> None:
    """Run the command line."""
    try:
        app(prog_name="schelix")
    except SystemExit as end:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from schelix_scale.training.dist import end_at_once

            end_at_once(int(end.code or 0))
        raise


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "  schelix inspect atlas.h5ad\n\n"
    "  schelix inspect atlas.h5ad --batch-key donor --json > atlas.json"
)
@reported
def inspect(
    context: typer.Context,
    source: Sources,
    batch_key: BatchKey = None,
    label_key: LabelKey = None,
    layer: Layer = None,
    genes_join: GenesJoin = None,
    obs_filter: ObsFilter = None,
    census_version: CensusVersion = None,
    census_uri: CensusUri = None,
    config: ConfigFile = None,
    setting: Setting = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")] = False,
) -> None:
    """Look at SOURCE before it is integrated: cells, genes, batches, values, and what it will need.

    Reads names, batches and a sample of cells. Problems that would stop an integration are listed with their
    remedies, and the exit code is 1 if there are any.
    """
    from schelix_scale.config_io import load_config
    from schelix_scale.inspection import inspect_source
    from schelix_scale.output import print_inspection, print_json

    options = {"data.layer": layer, "data.label_key": label_key, "data.genes_join": genes_join}
    options |= {"data.obs_filter": obs_filter, "data.census_version": census_version, "data.census_uri": census_uri}
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    settings = load_config(config, [*(setting or ()), *given])
    found = inspect_source(one_or_all(source), batch_key, settings)
    if as_json:
        print_json(found.to_dict())
    else:
        print_inspection(found)
    if found.problems:
        raise typer.Exit(1)


@app.command(epilog="[bold]Example[/]\n\n  schelix verify atlas-run")
@reported
def verify(context: typer.Context, run: RunPath) -> None:
    """Recompute the checksum of everything in RUN.

    Problems are listed, each with its remedy, and the exit code is 1 if there are any.
    """
    from schelix_scale.output import complain
    from schelix_scale.run import RunDirectory

    directory = RunDirectory.open(run)
    problems = directory.verify()
    for problem in problems:
        complain("problem", problem, "yellow")
    if problems:
        raise typer.Exit(1)
    artifacts = sum(len(record.artifacts) for record in directory.records())
    typer.echo(f"{run} is complete: {artifacts} artifacts are as they were written.")


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "  schelix export atlas-run atlas-integrated.h5ad\n\n"
    "Then, in Python:  adata = anndata.read_h5ad('atlas-integrated.h5ad'); adata.obsm\\['X_schelix']"
)
@reported
def export(
    context: typer.Context,
    run: RunPath,
    file: Annotated[
        str,
        typer.Argument(
            help="The copy to write: .h5ad if the source was one, .zarr if not; either for a source that is not "
            "copied (SOMA, Census, several files).",
            metavar="FILE",
        ),
    ],
    into_source: Annotated[
        bool,
        typer.Option(
            "--into-source", help="FILE is the SOMA experiment that RUN has read: the embedding is added to it."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace FILE, or the embedding that is in it, if it is there.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write a copy of the source file of RUN with the embedding in it, as obsm 'X_schelix'.

    The source must be where it was, and unchanged; it is only read. Of a SOMA experiment, the Census or several
    files, obs and the embedding are written without X; --into-source adds the embedding to a SOMA experiment.
    """
    from schelix_scale.export import KEY, export_run
    from schelix_scale.export_soma import export_into_source

    export_to = export_into_source if into_source else export_run
    written = export_to(run, file, overwrite, make_reporter(quiet))
    if not quiet:
        typer.echo(f"wrote {written} with obsm[{KEY!r}]")


@app.command(epilog="[bold]Example[/]\n\n  schelix demo -o demo-run")
@reported
def demo(
    context: typer.Context,
    out: Annotated[
        str, typer.Option("--out", "-o", help="A directory, made or continued.", metavar="DIR")
    ] = "demo-run",
    quiet: Quiet = False,
) -> None:
    """Integrate 700 blood cells of 8 GEM wells that come with scanpy, and compare before and after.

    Takes a minute or two. Writes the cells, the run, scores and a picture to DIR.
    """
    from schelix_scale.demo import run_demo
    from schelix_scale.output import print_demo, repeat_warnings

    reporter = make_reporter(quiet)
    result = run_demo(out, reporter)
    repeat_warnings(reporter)
    if not quiet:
        print_demo(result)
