"""Rows of `mapping.py` -> tables, for the terminal and between marks of the README."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _sections import marks, save_rows, write_section

Row = dict[str, Any]
BEGIN, END = marks("mapping")
COLUMNS = {
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "ece": "ECE",
    "coverage": "coverage",
    "set_size": "set size",
    "auroc": "AUROC",
    "novel_above": "unseen above 99 % of seen",
    "unknown_novel": "unseen flagged",
    "unknown_others": "seen flagged",
    "overlap": "overlap",
    "map_seconds": "map s",
    "seconds": "all s",
    "peak_mb": "MB",
}
SPEED = {
    "cells": 0,
    "reference_cells": 0,
    "seconds": 1,
    "cpu_seconds": 1,
    "cells_per_second": 0,
    "cells_per_second_steady": 0,
    "peak_mb": 0,
}
DIGITS = {"map_seconds": 1, "seconds": 1, "peak_mb": 0, "set_size": 2}


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a results file; none if there is none."""
    return list(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path.exists() else []


def write_rows(path: Path, new: Sequence[Row]) -> None:
    """Put rows in the place of older ones of the same data, column, fold, method and seed."""

    def identity(row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in ("data", "by", "fold", "method", "seed"))

    fresh = {identity(row) for row in new}
    save_rows(path, [*(row for row in read_rows(path) if identity(row) not in fresh), *new])


def table(rows: Sequence[Row]) -> str:
    """Return means over folds as Markdown: a line for each data set and method, and one for each method's mean.

    A method that was run on some folds alone is compared once more on these, in a table of their own.
    """
    tables = [_table(rows)]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    every = {_fold(row) for row in rows}
    for method in methods:
        own = {_fold(row) for row in rows if row["method"] == method}
        if own < every:
            same = [row for row in rows if _fold(row) in own]
            tables.append(f"On the {len(own)} folds of {method}:\n\n{_table(same)}")
    notes = [*_bounded(rows), *sorted({_measured(row) for row in rows if "machine" in row})]
    return "\n\n".join([*tables, *(["\n".join(notes)] if notes else [])])


def _fold(row: Row) -> tuple[Any, ...]:
    return row["data"], row["by"], row["fold"]


def _table(rows: Sequence[Row]) -> str:
    header = ["data, left out", "method", "folds", *COLUMNS.values()]
    lines = [_line(header), "|---|---|" + "--:|" * (len(header) - 2)]
    sets = list(dict.fromkeys((row["data"], row["by"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for data, by in sets:
        lines += [_mean_line(f"{data}, {by}", method, _of(rows, data, by, method)) for method in methods]
    for method in methods:
        means = [_means(found) for data, by in sets if (found := _of(rows, data, by, method))]
        if len(means) == len(sets) > 1:  # a method that was not run on all has no mean to compare
            cells = [_text(column, _mean([mean[column] for mean in means])) for column in COLUMNS]
            lines.append(_line(["**mean of the data sets**", method, "", *cells]))
    return "\n".join(line for line in lines if line)


def speed_table(rows: Sequence[Row]) -> str:
    """Return what `_mapping_speed.py` has measured as Markdown."""
    head = ["what", "cells", "onto", "seconds", "CPU s", "cells/s", "cells/s without what is done once", "peak MB", ""]
    lines = [_line(head), "|---|" + "--:|" * 7 + "---|"]
    for row in rows:
        numbers = [_number(row.get(key), digits) for key, digits in SPEED.items()]
        lines.append(_line([row["verb"], *numbers, row.get("note", "")]))
    return "\n".join([*lines, "", *sorted({_measured(row) for row in rows})])


def update_readme(readme: Path, rows: Sequence[Row], speed: Sequence[Row] = ()) -> None:
    """Replace what is between the two marks of the README.

    Raises
    ------
    ValueError
        The marks are not there once each, in this order.
    """
    parts = [table(rows), *(["### Speed", speed_table(speed)] if speed else [])]
    write_section(readme, "mapping", "\n\n".join(parts))


def _bounded(rows: Sequence[Row]) -> list[str]:
    """Say what was not run whole: methods on fewer folds than others, and bounds of epochs."""
    notes = []
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        folds = {(row["data"], row["by"], row["fold"]) for row in own}
        most = {(row["data"], row["by"], row["fold"]) for row in rows if row["data"] in {one["data"] for one in own}}
        said = [f"{len(folds)} of {len(most)} folds"] if len(folds) < len(most) else []
        epochs = sorted({row["epochs"] for row in own if row.get("epochs")}) if method == "scarches" else []
        said += [f"at most {' or '.join(map(str, epochs))} epochs"] if epochs else []
        notes += [f"- {method}: {', '.join(said)}"] if said else []
    jobs = {row["jobs"] for row in rows if row.get("jobs", 1) > 1}
    return [*notes, *[f"- seconds with {number} folds at once" for number in sorted(jobs)]]


def _measured(row: Row) -> str:
    machine, changed = row["machine"], " with uncommitted changes" if row["dirty"] else ""
    return (
        f"- {row['date'][:10]}, commit {(row['commit'] or 'unknown')[:10]}{changed}: {machine['cpu']}, "
        f"{row['threads']} threads on {machine['cores']} cores, {machine['ram_gb']:.0f} GB, Python {machine['python']}"
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _of(rows: Sequence[Row], data: str, by: str, method: str) -> list[Row]:
    return [row for row in rows if (row["data"], row["by"], row["method"]) == (data, by, method)]


def _mean_line(data: str, method: str, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    means = _means(rows)
    return _line([data, method, str(len(rows)), *(_text(column, means[column]) for column in COLUMNS)])


def _means(rows: Sequence[Row]) -> dict[str, float | None]:
    return {column: _mean([row.get(column) for row in rows]) for column in COLUMNS}


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def _text(column: str, value: float | None) -> str:
    return "-" if value is None else f"{value:,.{DIGITS.get(column, 3)}f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
