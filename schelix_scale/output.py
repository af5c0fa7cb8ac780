"""What the verbs print: runs, inspections and demos go to standard output, complaints to standard error."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schelix_scale.progress import QuietReporter, Reporter, duration

if TYPE_CHECKING:
    from rich.console import Console

    from schelix_scale.demo import DemoResult
    from schelix_scale.inspection import Inspection
    from schelix_scale.run import Run

SHOWN_BATCHES = 10


def print_run(run: Run, out: str) -> None:
    """Print where the embedding is, what was found, how long it took, and what to do next."""
    summary, console = run.manifest["summary"], _console()
    folder = Path(out).expanduser()
    embedding = folder / "embedding.zarr"
    source = Path(run.manifest["source"]["uri"])
    shape = f"{summary['cells']:,} cells x {summary['dims']}"
    _line(console, "embedding", f"{embedding}, obsm['X_schelix']: {shape}")
    _line(console, "cells", f"{summary['cells']:,} in {counted(summary['batches'], 'batch', 'batches')}")
    _line(console, "genes", _roles(summary))
    _line(console, "values", summary["values_reason"])
    _line(console, "time", _times(run))
    _line(console, "next", f"anndata.read_zarr({str(embedding)!r})  in Python")
    if source.is_absolute() and source.exists():  # else there is no file to copy
        copy = f"{source.stem}-integrated{'.zarr' if source.is_dir() else '.h5ad'}"
        what = "a copy of your file with the embedding"
        if (source / "__group").is_dir():  # a SOMA experiment is not copied
            what = f"obs and the embedding; or add it to {source.name} with --into-source"
        command = f"schelix export {shlex.quote(str(folder))} {shlex.quote(copy)}"
        _line(console, "", f"{command}  {what}")


def print_inspection(found: Inspection) -> None:
    """Print what was found, and the problems last."""
    from schelix_scale.provenance import available_cores

    console = _console()
    elsewhere = "not on this disk" if ":" in found.source else "in memory"
    stored = elsewhere if found.stored_bytes is None else f"{_bytes(found.stored_bytes)} on disk"
    layers = ", ".join(found.layers)
    _line(console, "source", f"{found.source}, {stored}; layer {found.layer} of {layers}")
    for note in found.notes:
        _line(console, "files" if found.files else "note", note)
    _line(console, "cells", f"{found.n_cells:,}")
    _line(console, "genes", f"{found.n_genes:,}, of which {found.nonzeros_per_cell:,.0f} values a cell are stored")
    _line(console, "batches", _batches(found))
    _line(console, "values", found.value_reason or "could not be decided, see below")
    _line(
        console,
        "needs",
        f"about {_bytes(found.memory_bytes)} of memory and {duration(found.seconds)} here "
        f"({available_cores()} cores, no GPU)",
    )
    for problem in found.problems:
        console.print(f"problem: {problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def print_demo(result: DemoResult) -> None:
    """Print the run, the stages' times, and the scores before and after."""
    from rich.table import Table

    console = _console()
    print_run(result.run, str(result.run.path))
    _line(console, "picture", str(result.picture))
    times = Table("stage", "seconds", title="Time", title_justify="left")
    for stage, seconds in result.seconds.items():
        times.add_row(stage, f"{seconds:.1f}")
    times.columns[1].justify = "right"
    scores = Table("score (0 to 1, higher is better)", "before", "after", title="Scores", title_justify="left")
    for name, before in result.before.items():
        scores.add_row(name, f"{before:.3f}", f"{result.after[name]:.3f}")
    for table in (times, scores):
        console.print()
        console.print(table)
    console.print(
        f"Batch mixing is {result.mixing_at_random:.3f} if the wells are dealt to the cells at random.", soft_wrap=True
    )
    if result.single_stream:
        console.print(
            "The wells do not differ beyond chance, so nothing was corrected: the run is single-stream.", soft_wrap=True
        )


def counted(count: int, one: str, more: str) -> str:
    """Return a number and what it counts: "1 batch", "2 batches"."""
    return f"{count:,} {one if count == 1 else more}"


def print_lines(lines: Mapping[str, str]) -> None:
    """Print labels and their texts, a line each; those without text are left out."""
    console = _console()
    for label, text in lines.items():
        if text:
            _line(console, label, text)


def print_json(content: Mapping[str, Any]) -> None:
    """Print indented JSON."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def complain(kind: str, message: str, style: str) -> None:
    """Write ``kind: message`` to standard error, coloured on a terminal; lines are never cut."""
    from rich.console import Console

    text = f"{kind}: {message}"
    Console(stderr=True, soft_wrap=True).print(text, style=style, markup=False, highlight=False)


def repeat_warnings(reporter: Reporter) -> None:
    """Show the warnings that a quiet reporter has kept."""
    if isinstance(reporter, QuietReporter):
        for message in reporter.messages:
            kind, _, text = message.partition(": ")
            if kind == "warning":
                complain(kind, text, "yellow")


def _console() -> Console:
    from rich.console import Console

    return Console()


def _line(console: Console, label: str, text: str) -> None:
    """Print a label and its text on one line, however long, so that paths and commands can be copied."""
    from rich.text import Text

    console.print(Text.assemble((f"{label:<11}", "bold"), text), soft_wrap=True)


def _roles(summary: Mapping[str, Any]) -> str:
    if summary["single_stream"]:
        return f"{summary['genes']:,}; single stream, since batches do not differ beyond chance: nothing was corrected"
    return f"{summary['genes']:,}: {summary['anchors']:,} Anchors, {summary['variants']:,} Variants"


def _times(run: Run) -> str:
    stages = {name: record["seconds"] for name, record in run.manifest["stages"].items()}
    return f"{duration(sum(stages.values()))}: {', '.join(f'{name} {duration(s)}' for name, s in stages.items())}"


def _batches(found: Inspection) -> str:
    if found.batch_key is None:
        likely = ", ".join(found.likely_batch_columns) or "none"
        return f"no batch key; columns that could name batches: {likely} (--batch-key COLUMN)"
    largest = sorted(found.batch_sizes.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} ({size:,})" for name, size in largest[:SHOWN_BATCHES])
    more = f", {len(largest) - SHOWN_BATCHES:,} more down to {largest[-1][1]:,}" if len(largest) > SHOWN_BATCHES else ""
    return f"{len(largest):,} of {found.batch_key!r}: {shown}{more}"


def _bytes(count: float) -> str:
    """Return bytes as people say them: 512 B, 20.1 MB, 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
