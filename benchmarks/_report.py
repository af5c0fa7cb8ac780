"""The rows of `quality.py`: kept in a JSON file, shown as a table, written into the README."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
BEGIN, END = "<!-- quality:begin -->", "<!-- quality:end -->"
METRICS = {
    "isolated_labels": "isolab",
    "nmi_ari_cluster_labels_kmeans_nmi": "NMI",
    "nmi_ari_cluster_labels_kmeans_ari": "ARI",
    "silhouette_label": "silh",
    "clisi_knn": "cLISI",
    "bras": "BRAS",
    "ilisi_knn": "iLISI",
    "kbet_per_label": "kBET",
    "graph_connectivity": "graph",
    "pcr_comparison": "PCR",
    "bio": "bio",
    "batch": "batch",
    "total": "total",
}
COSTS = {"seconds": "seconds", "peak_mb": "MB"}
COLUMNS = METRICS | COSTS


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a results file; none when it does not exist.

    Raises
    ------
    ValueError
        It is not a results file.
    """
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a results file ({error!r}). Move it away, or choose another with -o."
        ) from error


def write_rows(path: Path, new: Sequence[Row]) -> list[Row]:
    """Put new rows in the place of older ones of the same data, batch key and method; return all."""
    fresh = {_family(row) for row in new}
    rows = [row for row in read_rows(path) if _family(row) not in fresh] + list(new)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return rows


def _family(row: Row) -> tuple[str, str, str]:
    """All seeds and parts of a method on a data set are replaced together."""
    return row["data"], row["batch_key"], row["method"].partition(":")[0]


def _value(row: Row, column: str) -> float | None:
    return row[column] if column in COSTS else row["metrics"].get(column)


def summary(rows: Iterable[Row], column: str) -> tuple[float, float] | None:
    """Return mean and standard deviation (0 for one row) of a column; None when a row has no value there."""
    values = [_value(row, column) for row in rows]
    if not values or any(value is None for value in values):
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by method, in order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    return groups


def text_table(rows: Sequence[Row]) -> str:
    """Return the rows of one data set and batch key as a table of fixed columns.

    With several seeds a line of standard deviations follows each method; the last line is schelix - harmony.
    """
    first = rows[0]
    groups = by_method(rows)
    width = max(16, *(len(name) + 1 for name in groups))
    lines = [
        f"{first['data']}, batch key {first['batch_key']}: {first['n_cells']:,} cells, {first['n_batches']} batches, "
        f"{first['n_labels']} labels",
        f"{'method':{width}}" + "".join(f"{name:>8}" for name in COLUMNS.values()),
    ]
    for method, group in groups.items():
        found = {column: summary(group, column) for column in COLUMNS}
        lines.append(f"{method:{width}}" + "".join(_cell(c, f and f[0]) for c, f in found.items()))
        if len(group) > 1:
            label = f"  ± sd of {len(group)}"
            lines.append(f"{label:{width}}" + "".join(_cell(c, f and f[1]) for c, f in found.items()))
    if {"schelix", "harmony"} <= set(groups):
        lines.append(f"{'schelix-harmony':{width}}" + "".join(_gain(c, groups) for c in COLUMNS))
    return "\n".join(lines)


def _cell(column: str, value: float | None, sign: str = "") -> str:
    if value is None:
        return f"{'-':>8}"
    digits = {"peak_mb": 0, "seconds": 1}.get(column, 3)
    return f"{value:>{sign}8.{digits}f}"


def _gain(column: str, groups: dict[str, list[Row]]) -> str:
    ours, theirs = summary(groups["schelix"], column), summary(groups["harmony"], column)
    return _cell(column, ours[0] - theirs[0] if ours and theirs else None, "+")


def markdown(rows: Sequence[Row]) -> str:
    """Return all rows as a Markdown table, the best total of each data set in bold, and where they were measured."""
    head = ["data (batch key)", "cells", "method", "seeds", *COLUMNS.values()]
    lines = [f"| {' | '.join(head)} |", "|---|--:|---|" + "--:|" * (len(head) - 3)]
    sets: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        sets.setdefault((row["data"], row["batch_key"]), []).append(row)
    for (data, batch_key), members in sets.items():
        groups = by_method(members)
        totals = {method: found[0] for method, group in groups.items() if (found := summary(group, "total"))}
        best = max(totals, key=totals.__getitem__, default=None)
        for method, group in groups.items():
            cells = [f"{data} ({batch_key})", f"{group[0]['n_cells']:,}", method, str(len(group))]
            cells += [_markdown_cell(group, column, bold=method == best) for column in COLUMNS]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *sorted({_measured(row) for row in rows})])


def _markdown_cell(group: Sequence[Row], column: str, *, bold: bool) -> str:
    found = summary(group, column)
    if found is None:
        return "-"
    text = _cell(column, found[0]).strip()
    if column == "total" and len(group) > 1:
        text += f" ± {found[1]:.3f}"
    return f"**{text}**" if bold and column == "total" else text


def _measured(row: Row) -> str:
    machine = row["machine"]
    changed = " with uncommitted changes" if row["dirty"] else ""
    settings = f"; schelix with {', '.join(row['settings'])}" if row["settings"] else ""
    return (
        f"- {row['date'][:10]}, commit {(row['commit'] or 'unknown')[:10]}{changed}: {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['ram_gb']:.0f} GB, Python {machine['python']}, {machine['platform']}, "
        f"scib-metrics {row['versions'].get('scib-metrics', 'unknown')}{settings}"
    )


def update_readme(readme: Path, rows: Sequence[Row]) -> None:
    """Replace what is between the two marks of the README with the table of all rows.

    Raises
    ------
    ValueError
        The README has not exactly one pair of marks, in order.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not (begin and end) or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme} needs the lines {BEGIN} and {END} once each, in this order; put them back.")
    partial = readme.with_name(f"{readme.name}.partial")
    partial.write_text(f"{before}{begin}{markdown(rows)}\n{END}{after}", encoding="utf-8")
    partial.replace(readme)
