"""Rows of `mapping.py` -> tables, for the terminal and between marks of the README."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
BEGIN, END = "<!-- mapping:begin -->", "<!-- mapping:end -->"
COLUMNS = {
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "ece": "ECE",
    "coverage": "coverage",
    "set_size": "set size",
    "auroc": "AUROC",
    "overlap": "overlap",
    "map_seconds": "map s",
    "seconds": "all s",
    "peak_mb": "MB",
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
    rows = [row for row in read_rows(path) if identity(row) not in fresh] + list(new)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def table(rows: Sequence[Row]) -> str:
    """Return means over folds as Markdown: a line for each data set and method, and one for each method's mean."""
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


def update_readme(readme: Path, rows: Sequence[Row]) -> None:
    """Replace what is between the two marks of the README.

    Raises
    ------
    ValueError
        The marks are not there once each, in this order.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not (begin and end) or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme} needs the lines {BEGIN} and {END} once each, in this order; put them back.")
    partial = readme.with_name(f"{readme.name}.partial")
    partial.write_text(f"{before}{begin}{table(rows)}\n{END}{after}", encoding="utf-8")
    partial.replace(readme)


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
