"""Rows of `ddp.py`: kept in a JSON file, shown as Markdown, and held against what the issue of training asks for."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _sections import save_rows, write_section

Row = dict[str, Any]
KEY = ("run", "cells", "batch", "cores")
ASKED = {  # ratio: least, or most
    "one thread, to the floor": (0.9, None),
    "all threads, to the floor": (0.9, None),
    "ranks, to threads": (0.9, None),
    "MB of another rank beyond torch's own": (None, 400.0),
    "to scVI": (10.0, None),
}


def keep(path: Path, row: Row) -> list[Row]:
    """Put a row in the place of the one with the same key in a JSON file, keep the others, and return all."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = [other for other in rows if any(other[name] != row[name] for name in KEY)] + [row]
    save_rows(path, rows)
    return rows


def update_readme(readme: Path, rows: Sequence[Row]) -> None:
    """Replace what is between the two marks of the README.

    Raises
    ------
    ValueError
        The marks are not there once each, in this order.
    """
    write_section(readme, "ddp", markdown(rows))


def markdown(rows: Sequence[Row]) -> str:
    """Return all rows as Markdown: speeds and memory, what was asked for, and where it ran."""
    rows = sorted(rows, key=lambda row: tuple(row[name] for name in KEY))
    return "\n\n".join([*map(_table, rows), _asked(rows), "\n".join(sorted({_measured(row) for row in rows}))])


def speed_of(rounds: Sequence[Sequence[Row]]) -> list[float]:
    """Return cells a second of each round: the cells of all phases by the time of all phases."""
    return [statistics.harmonic_mean(list(ranks[0]["speed"].values())) for ranks in rounds]


def _table(row: Row) -> str:
    lines = [
        f"#### {row['cells']:,} cells, steps of {row['batch']:,}, {row['cores']} cores",
        "",
        "| | ranks | threads | cells/s | Align | Refine | private MB a rank |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for one in row["contenders"]:
        first = [ranks[0] for ranks in one["rounds"]]
        told = [f"{statistics.median(speed_of(one['rounds'])):,.0f}" if "speed" in first[0] else ""]
        for phase in ("align", "refine"):
            speeds = [ranks["speed"][phase] for ranks in first if phase in ranks.get("speed", {})]
            told.append(f"{statistics.median(speeds):,.0f}" if speeds else "")
        held = [ranks[-1]["private_mb"] for ranks in one["rounds"] if "private_mb" in ranks[-1]]
        told.append(f"{statistics.median(held):,.0f}" if held else "")
        lines.append(f"| {one['label']} | {one['ranks']} | {one['threads']} | {' | '.join(told)} |")
    return "\n".join(lines)


def _asked(rows: Sequence[Row]) -> str:
    lines = ["| median of the rounds' ratios | batch | asked | found | holds |", "|---|--:|--:|--:|---|"]
    for row in rows:
        for name, value in row["ratios"].items():
            least, most = ASKED[name]
            holds = (least is None or value >= least) and (most is None or value <= most)
            bound = f">= {least:g}" if least is not None else f"<= {most:g}"
            lines.append(f"| {name} | {row['batch']:,} | {bound} | {value:g} | {'yes' if holds else '**no**'} |")
    return "\n".join(lines)


def _measured(row: Row) -> str:
    machine, changed = row["machine"], " with uncommitted changes" if row["dirty"] else ""
    peers = [f"{name} {number}" for name, number in row["peer_versions"].items()] if row["scvi_cells"] else []
    versions = ", ".join([f"torch {row['versions']['torch']}", *peers])
    rounds = len(row["contenders"][0]["rounds"])
    scvi = f"; scVI on {row['scvi_cells']:,} cells" if row["scvi_cells"] else ""
    return (
        f"- {row['date'][:10]}, commit {(row['commit'] or 'unknown')[:10]}{changed}: batch {row['batch']:,}, {rounds} "
        f"rounds of {row['steps']} steps a phase{scvi}; {machine['cpu']}, {row['cores']} cores, "
        f"{machine['ram_gb']:.0f} GB, Python {machine['python']}; {versions}"
    )
