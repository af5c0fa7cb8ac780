"""Rows of `graph.py`: kept in a JSON file, shown as Markdown, and held against what the issue of the graph asks for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from _sections import marks, save_rows, write_section

Row = dict[str, Any]
KEY = ("what", "cells", "dims", "k", "data", "method", "search", "budget")
BEGIN, END = marks("graph")
OURS, FLOOR = "schelix", "pynndescent"
RECALL, MEMORY, TIME, GROWTH, DIFFUSION = 0.95, 1.5, 2.0, 6.0, 1.5


def save(path: Path, row: Row) -> list[Row]:
    """Put a row in the place of the one with the same key in a JSON file, keep the others, and return all."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = [other for other in rows if any(other[name] != row[name] for name in KEY)] + [row]
    save_rows(path, rows)
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Return all rows as Markdown: a table a size, growth from size to size, what was asked for, and where it ran."""
    parts = []
    for size in sorted({_size(row) for row in rows}):
        members = [row for row in rows if _size(row) == size]
        parts += [_searches(members), _diffusions(members)]
    parts += [_growth(rows), _asked(rows), "\n".join(sorted({_measured(row) for row in rows}))]
    return "\n\n".join(filter(None, parts))


def update_readme(readme: Path, rows: Sequence[Row]) -> None:
    """Replace what is between the two marks of the README.

    Raises
    ------
    ValueError
        The marks are not there once each, in this order.
    """
    write_section(readme, "graph", markdown(rows))


def _size(row: Row) -> tuple[int, int, int, str]:
    return row["cells"], row["dims"], row["k"], row["data"]


def _searches(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row["what"] == "neighbors"]
    if not rows:
        return ""
    first, floor = rows[0], next((row for row in rows if row["method"] == FLOOR), None)
    lines = [
        f"#### {first['cells']:,} cells x {first['dims']}, k = {first['k']} ({first['data']})",
        "",
        f"| search | settings | seconds | of {FLOOR} | recall@{first['k']} (95 % CI) | audit (95 % CI) | they agree "
        "| peak GB | PSS | own |",
        "|---|---|--:|--:|--:|--:|---|--:|--:|--:|",
    ]
    for row in rows:
        ratio = "" if floor is None or row is floor else _ratio(row, floor)
        audit, agrees = row.get("audit"), ""
        if audit:
            found = row["agreement"]
            agrees = f"{'yes' if found['agree'] else '**no**'} ({found['difference']:+.4f} of {found['allowed']:.4f})"
        cells = [_named(row), _settings(row), f"{row['seconds']:,.1f}{_busy(row)}", ratio, _interval(row["recall"])]
        lines.append(_line([*cells, _interval(audit), agrees, *_memory(row)]))
    return "\n".join(lines)


def _diffusions(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row["what"] == "diffusion"]
    if not rows:
        return ""
    theirs, first = next(row for row in rows if row["method"] != OURS), rows[0]
    lines = [
        f"#### Diffusion of {first['cells']:,} cells x {first['settings']['columns']}, hops "
        f"{first['settings']['hops']}, k = {first['k']}",
        "",
        "| diffusion | seconds | of scipy | whole process | peak GB | PSS | own | largest difference |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        seconds = row["parts"]["diffusion"]
        ratio = "" if row is theirs else f"{seconds / max(theirs['parts']['diffusion'], 0.01):.2f} x"
        difference = f"{row['difference']:.1e}" if "difference" in row else ""
        cells = [row["method"], f"{seconds:,.2f}{_busy(row)}", ratio, f"{row['seconds']:,.1f}"]
        lines.append(_line([*cells, *_memory(row), difference]))
    return "\n".join(lines)


def _growth(rows: Iterable[Row]) -> str:
    lines = [
        f"- {_named(small)}: {small['cells']:,} -> {large['cells']:,} cells (x {large['cells'] / small['cells']:.1f}): "
        f"time x {large['seconds'] / small['seconds']:.2f}"
        for small, large in growths(rows)
    ]
    return "\n".join(["Growth:", "", *lines]) if lines else ""


def growths(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Return pairs of one size and the next of the same search, budget and kind of data."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted((row for row in rows if row["what"] == "neighbors"), key=lambda row: row["cells"]):
        groups.setdefault(tuple(row[name] for name in KEY if name != "cells"), []).append(row)
    return [pair for group in groups.values() for pair in pairwise(group)]


def checks(rows: Sequence[Row]) -> list[tuple[str, str, float, bool]]:
    """Return what issue 5 asks for and the rows show: what, the bound, what was found, and whether it holds."""
    found = []
    for row in rows:
        ours = row["what"] == "neighbors" and row["method"] == OURS
        if row["what"] == "diffusion" and row["method"] == OURS:
            peer = next((r for r in rows if r["what"] == "diffusion" and r is not row and _size(r) == _size(row)), None)
            if peer is not None:
                ratio = row["parts"]["diffusion"] / max(peer["parts"]["diffusion"], 0.01)
                found.append((f"diffusion, {row['cells']:,} cells", *_at_most(ratio, DIFFUSION, "x scipy")))
        if not ours:
            continue
        what = f"{_named(row)}, {row['cells']:,} cells"
        share = row["recall"]["recall"]
        found.append((f"{what}: recall", f">= {RECALL}", share, share >= RECALL))
        found.append(
            (f"{what}: audit against exact", "agree", row["agreement"]["difference"], row["agreement"]["agree"])
        )
        if row["budget"] is None:
            continue
        peak = row["peak_bytes"] / row["answer"]["budget_bytes"]
        found.append((f"{what}: peak memory", *_at_most(peak, MEMORY, "x the budget")))
        floor = next((r for r in rows if r["method"] == FLOOR and _size(r) == _size(row)), None)
        if floor is not None:
            found.append((f"{what}: time", *_at_most(row["seconds"] / floor["seconds"], TIME, f"x {FLOOR}")))
    for small, large in growths(rows):
        if large["method"] == OURS and large["cells"] == 5 * small["cells"]:
            what = f"{_named(large)}: time from {small['cells']:,} to {large['cells']:,} cells"
            found.append((what, *_at_most(large["seconds"] / small["seconds"], GROWTH, "x")))
    return found


def _at_most(value: float, bound: float, unit: str) -> tuple[str, float, bool]:
    return f"<= {bound:g} {unit}", value, value <= bound


def _asked(rows: Sequence[Row]) -> str:
    found = checks(rows)
    if not found:
        return ""
    lines = ["| asked of schelix | bound | found | holds |", "|---|--:|--:|---|"]
    lines += [_line([what, bound, f"{value:.3f}", "yes" if holds else "**no**"]) for what, bound, value, holds in found]
    return "\n".join(lines)


def _named(row: Row) -> str:
    """Return a search with its budget, ours in bold."""
    if row["method"] != OURS:
        return str(row["method"])
    return f"**schelix** ({row['search']}), budget {row['budget'] or 'default'}"


def _settings(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row["settings"].items())


def _ratio(row: Row, floor: Row) -> str:
    """Return the ratio of times, with ~ where they come from different runs of the benchmark."""
    mark = "" if row["run"] == floor["run"] else "~"
    return f"{mark}{row['seconds'] / floor['seconds']:.2f} x"


def _busy(row: Row) -> str:
    """Return ~ for seconds that are not to be compared: other processes kept more than a tenth of a core busy."""
    return "~" if (row["others"] or 0) > 0.1 else ""


def _interval(found: Row | None) -> str:
    return "" if found is None else f"{found['recall']:.4f} ({found['low']:.4f}-{found['high']:.4f})"


def _memory(row: Row) -> list[str]:
    sizes = [row[name] for name in ("peak_bytes", "peak_pss_bytes", "own_bytes")]
    return ["" if size is None else f"{size / 1e9:.2f}" for size in sizes]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _measured(row: Row) -> str:
    machine, changed = row["machine"], " with uncommitted changes" if row["dirty"] else ""
    cores = f"{row['threads']} threads on {machine['cores']} cores"
    versions = ", ".join(f"{name} {number}" for name, number in row["searchers"].items())
    return (
        f"- {row['date'][:10]}, commit {(row['commit'] or 'unknown')[:10]}{changed}: {machine['cpu']}, "
        f"{cores}, {machine['ram_gb']:.0f} GB, Python {machine['python']}; {versions}"
    )
