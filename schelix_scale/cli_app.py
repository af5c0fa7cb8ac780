"""The command line itself: the app that verbs register with, and how their errors are shown."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, ParamSpec

import typer

from schelix_scale._version import __version__
from schelix_scale.errors import SchelixError
from schelix_scale.interruptions import listening
from schelix_scale.progress import QuietReporter, Reporter, RichReporter

_AGAIN = "Run the same command again to continue: finished stages are kept."
INTERRUPTED = {
    **dict.fromkeys(("integrate", "prepare", "graph", "train", "embed", "map", "extend"), _AGAIN),
    "demo": _AGAIN,
    "export": "What was there is as it was, or, if the export was complete already, replaced as a whole.",
}

P = ParamSpec("P")

app = typer.Typer(
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def reported(verb: Callable[P, None]) -> Callable[P, None]:
    """Show an error of ours as one message and not as a traceback, unless --debug; exit 1, or 130 when interrupted."""

    @wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        from schelix_scale.output import complain

        context: Any = kwargs["context"]
        try:
            with listening():
                verb(*args, **kwargs)
        except SchelixError as error:
            if context.find_root().params.get("debug"):
                raise
            if str(error):  # a rank whose main rank speaks has nothing to say
                complain("error", str(error), "bold red")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interrupt:
            complain("interrupted", INTERRUPTED.get(context.command.name, "Nothing was changed."), "yellow")
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


def one_or_all(source: list[str]) -> str | list[str]:
    """Return the only source as a text, several as a list."""
    return source[0] if len(source) == 1 else source


def make_reporter(quiet: bool) -> Reporter:
    """Return where a verb's progress goes."""
    return QuietReporter() if quiet else RichReporter()
