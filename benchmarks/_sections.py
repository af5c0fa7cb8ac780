"""Text that a benchmark writes -> the README, between a pair of marks that name the benchmark; and results files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def marks(name: str) -> tuple[str, str]:
    """Return the lines between which the section ``name`` stands."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def write_section(readme: Path, name: str, body: str) -> None:
    """Replace what is between the two marks of a section, atomically; the rest of the file stays.

    Raises
    ------
    ValueError
        The marks are not there once each, in this order.
    """
    first, last = marks(name)
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(f"{first}\n")
    _, end, after = rest.partition(last)
    if not (begin and end) or text.count(first) != 1 or text.count(last) != 1:
        raise ValueError(f"{readme} needs the lines {first} and {last} once each, in this order; put them back.")
    _replace(readme, f"{before}{begin}{body}\n{last}{after}")


def save_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of a results file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps({"rows": list(rows)}, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
