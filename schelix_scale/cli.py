"""The command line: one verb per public function. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, ParamSpec

import typer

from schelix_scale._version import __version__
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
from schelix_scale.errors import SchelixError
from schelix_scale.progress import QuietReporter, Reporter, RichReporter

CONTINUED = {"integrate", "demo"}

P = ParamSpec("P")

app = typer.Typer(
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    app(prog_name="schelix")


def _reported(verb: Callable[P, None]) -> Callable[P, None]:
    """Show an error of ours as one message and not as a traceback, unless --debug; exit 1, or 130 when interrupted."""

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        from schelix_scale.output import complain

        context: Any = kwargs["context"]
        try:
            verb(*args, **kwargs)
        except SchelixError as error:
            if context.find_root().params.get("debug"):
                raise
            complain("error", str(error), "bold red")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interrupt:
            kept = context.command.name in CONTINUED
            hint = (
                "Run the same command again to continue: finished stages are kept." if kept else "Nothing was changed."
            )
            complain("interrupted", hint, "yellow")
            # Under python -m, CPython ends by SIGINT and not by 130 if the last string it executed (imports do) was
            # interrupted; executing another one clears that.
            exec("")
            raise typer.Exit(130) from interrupt

    # typer keeps the line breaks of a docstring; paragraphs of one line are wrapped to the terminal
    run.__doc__ = "\n\n".join(" ".join(part.split()) for part in (verb.__doc__ or "").split("\n\n"))
    return run


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"schelix {__version__}")
        raise typer.Exit


@app.callback(epilog="Try it on 700 cells that are installed already:  [bold]schelix demo[/]")
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="SCHELIX_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Integrate batches of single cells into one embedding, out of core.

    A run is a directory: a command that was stopped goes on where it was when it is given again.
    """


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
@_reported
def integrate(
    context: typer.Context,
    source: Sources,
    out: Annotated[str, typer.Option("--out", "-o", help="The run directory, made or continued.", metavar="RUN")],
    batch_key: BatchKey = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much is corrected and smoothed: 1 (the default) is the full method, 0 is plain PCA. "
            "Lower it if biology is lost with the batches.",
            metavar="0..1",
        ),
    ] = None,
    label_key: LabelKey = None,
    layer: Layer = None,
    genes_join: GenesJoin = None,
    obs_filter: ObsFilter = None,
    census_version: CensusVersion = None,
    census_uri: CensusUri = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(help="obs column whose effect is not batch (condition, time). May be repeated.", metavar="COLUMN"),
    ] = None,
    config: ConfigFile = None,
    setting: Setting = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Such as 4GB; half of the memory by default.", metavar="SIZE")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same threads: same embedding. 0 by default.")] = None,
    threads: Annotated[int | None, typer.Option(help="All cores by default.")] = None,
    device: Annotated[
        str | None, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 or mps.", metavar="NAME")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="A dask.distributed cluster that passes over all cells; threads by default. Its workers need SOURCE "
            "and RUN at the same paths.",
            metavar="tcp://HOST:PORT",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over: remove the run that is in RUN.")] = False,
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

    given: dict[str, Any] = {
        "strength": strength,
        "data.label_key": label_key,
        "data.layer": layer,
        "data.genes_join": genes_join,
        "data.obs_filter": obs_filter,
        "data.census_version": census_version,
        "data.census_uri": census_uri,
        "data.protect": protect or None,
        "max_memory": max_memory,
        "seed": seed,
        "threads": threads,
        "device": device,
        "scheduler": scheduler,
    }
    reporter = _reporter(quiet)
    run = integrate_cells(
        _one_or_all(source),
        batch_key=batch_key,
        out=out,
        config=load_config(config, setting or ()),
        overwrite=overwrite,
        reporter=reporter,
        **{key: value for key, value in given.items() if value is not None},
    )
    repeat_warnings(reporter)
    if not quiet:
        print_run(run, out)


@app.command(
    epilog="[bold]Examples[/]\n\n"
    "  schelix inspect atlas.h5ad\n\n"
    "  schelix inspect atlas.h5ad --batch-key donor --json > atlas.json"
)
@_reported
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
    found = inspect_source(_one_or_all(source), batch_key, settings)
    if as_json:
        print_json(found.to_dict())
    else:
        print_inspection(found)
    if found.problems:
        raise typer.Exit(1)


@app.command(epilog="[bold]Example[/]\n\n  schelix verify atlas-run")
@_reported
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
@_reported
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
    written = export_to(run, file, overwrite, _reporter(quiet))
    if not quiet:
        typer.echo(f"wrote {written} with obsm[{KEY!r}]")


@app.command(epilog="[bold]Example[/]\n\n  schelix demo -o demo-run")
@_reported
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

    reporter = _reporter(quiet)
    result = run_demo(out, reporter)
    repeat_warnings(reporter)
    if not quiet:
        print_demo(result)


def _one_or_all(source: list[str]) -> str | list[str]:
    return source[0] if len(source) == 1 else source


def _reporter(quiet: bool) -> Reporter:
    return QuietReporter() if quiet else RichReporter()
