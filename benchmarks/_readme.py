"""The section of the README that `quality.py --readme` writes: a summary, a picture, and the tables.

Rows of results come in, Markdown goes out.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from _methods import METHODS
from _picture import draw
from _report import COLUMNS, GUARDS, METRICS, Row, by_data, by_method, cell, summary, totals_of_starts
from _sections import marks, write_section

BEGIN, END = marks("quality")
DEFAULT = "schelix"
_GUARDS = {"isolated_labels": METRICS["isolated_labels"], **GUARDS}
_NAMED = ("harmonypy", "scanorama", "scvi-tools", "concord-sc", "torch", "scib-metrics")


def update_readme(readme: Path, rows: Sequence[Row], split: Sequence[Row] = (), picture: Path | None = None) -> None:
    """Replace what is between the two marks of the README with the tables of all rows, and draw the picture.

    Raises
    ------
    ValueError
        The marks are not there once each, in this order.
    """
    full = [row for row in rows if "@" not in row["method"]]
    parts = [("Totals", totals(full))]
    if picture is not None and full:
        draw(full, picture)
        link = f"![bio against batch]({picture.relative_to(readme.parent).as_posix()})"
        parts.append(("Bio against batch", f"{link}\n\nMeans over seeds. Grey lines join equal totals, .05 apart."))
    parts.append(("All scores", markdown(full)))
    if len(full) < len(rows):
        parts.append(("Ablations", ablations(rows)))
    if split:
        parts.append(("Neighbours after a split", splits(split)))
    body = "\n\n".join(f"### {title}\n\n{part}" for title, part in parts)
    write_section(readme, "quality", body)


def totals(rows: Sequence[Row]) -> str:
    """Return mean totals, a line a method and a column a data set, then the best peer, our distance, and the guards."""
    sets = by_data(rows)
    methods = [name for name in by_method(rows) if name.partition(":")[2] in ("", "backbone")]
    table = {
        name: [_mean([row for row in group if row["method"] == name]) for group in sets.values()] for name in methods
    }
    means = {name: _mean_of(values) for name, values in table.items()}
    rivals = [name for name in methods if name == DEFAULT or _is_peer(name)]
    best = [max((t for t in (table[m][i] for m in rivals) if t is not None), default=None) for i in range(len(sets))]
    best_mean = max((means[name] for name in rivals if means[name] is not None), default=None)
    guards = {name: [_guard(sets.values(), name, guard) for guard in _GUARDS] for name in methods}
    lines = [_line(["method", *(f"{data} ({key})" for data, key in sets), "mean", *_GUARDS.values()])]
    lines.append("|---|" + "--:|" * (len(sets) + 1 + len(_GUARDS)))
    for name in methods:
        cells = [_bold(value, best[i]) for i, value in enumerate(table[name])]
        cells += [_bold(means[name], best_mean), *(cell("total", value).strip() for value in guards[name])]
        lines.append(_line([_named(name), *cells]))
    lines += _of_starts(sets.values(), methods)
    peers = [name for name in methods if _is_peer(name)]
    if peers and DEFAULT in methods:
        best_peers = [_best(peers, [table[name][i] for name in peers]) for i in range(len(sets))]
        best_peers.append(_best(peers, [means[name] for name in peers]))
        ours = [*table[DEFAULT], means[DEFAULT]]
        gaps = [None if o is None or b is None else o - b[1] for o, b in zip(ours, best_peers, strict=True)]
        lines.append(_line(["best peer", *(b[0] if b else "-" for b in best_peers), *([""] * len(_GUARDS))]))
        lines.append(
            _line(["schelix - best peer", *(cell("total", g, "+").strip() for g in gaps), *([""] * len(_GUARDS))])
        )
    return "\n".join(lines)


def _of_starts(sets: Iterable[Sequence[Row]], methods: Sequence[str]) -> list[str]:
    """Return the lines of totals whose k-means has several starts, of the methods for which these are known.

    Each also says the largest standard deviation of single starts, over data sets and seeds.
    """
    sets, lines = list(sets), []
    for name in methods:
        known = [totals_of_starts(row) for group in sets for row in group if row["method"] == name]
        spread = max((statistics.stdev(totals) for totals in known if len(totals) > 1), default=0.0)
        values = [_mean([row for row in group if row["method"] == name], "total_of_starts") for group in sets]
        if any(value is not None for value in values):
            cells = [cell("total", value).strip() for value in [*values, _mean_of(values)]]
            title = f"{_named(name)}, k-means of several starts (one: ± {spread:.3f})"
            lines.append(_line([title, *cells, *([""] * len(_GUARDS))]))
    return lines


def markdown(rows: Sequence[Row]) -> str:
    """Return all rows as a Markdown table, the best total of each data set in bold, and where they were measured."""
    head = ["data (batch key)", "cells", "method", "seeds", *COLUMNS.values()]
    lines = [_line(head), "|---|--:|---|" + "--:|" * (len(head) - 3)]
    for (data, batch_key), members in by_data(rows).items():
        groups = by_method(members)
        found = {method: _mean(group) for method, group in groups.items()}
        best = max((total for total in found.values() if total is not None), default=None)
        for method, group in groups.items():
            cells = [f"{data} ({batch_key})", f"{group[0]['n_cells']:,}", _named(method), str(len(group))]
            cells += [_full_cell(group, column, bold=found[method] == best) for column in COLUMNS]
            lines.append(_line(cells))
    return "\n".join([*lines, "", *_notes(rows), *sorted({_measured(row) for row in rows})])


def ablations(rows: Sequence[Row]) -> str:
    """Return the totals of schelix with one part changed, and the mean difference to its defaults."""
    seeds = {row["seed"] for row in rows if "@" in row["method"]}
    rows = [row for row in rows if (row["method"] == DEFAULT or "@" in row["method"]) and row["seed"] in seeds]
    sets = by_data(rows)
    table = {
        name: [_mean([row for row in group if row["method"] == name]) for group in sets.values()]
        for name in by_method(rows)
    }
    settings = {row["method"]: ", ".join(row["settings"]) for row in rows}
    lines = [_line(["changed", "settings", *(f"{data} ({key})" for data, key in sets), "mean", "- default"])]
    lines.append("|---|---|" + "--:|" * (len(sets) + 2))
    base = _mean_of(table.get(DEFAULT, [None]))
    for name in sorted(table, key=lambda name: name != DEFAULT):
        mean = _mean_of(table[name])
        change = None if mean is None or base is None or name == DEFAULT else mean - base
        what = "nothing: the default" if name == DEFAULT else name.partition("@")[2]
        cells = [cell("total", value).strip() for value in [*table[name], mean]]
        code = f"`{settings[name]}`" if settings[name] else ""
        lines.append(_line([what, code, *cells, cell("total", change, "+").strip()]))
    return "\n".join(lines)


def splits(rows: Sequence[Row]) -> str:
    """Return how many neighbours are as before after one batch was split in two and integrated."""
    head = ["data (batch key): batch", "cells", "method", "seeds", "corrected", "against pca", "against own"]
    lines = [_line(head), "|---|--:|---|" + "--:|" * 4]
    for (data, batch_key), members in by_data(rows).items():
        for method, group in by_method(members).items():
            name = f"{data} ({batch_key}): {group[0]['largest']}"
            values = [f"{statistics.fmean(row[key] for row in group):.3f}" for key in ("against_pca", "against_own")]
            corrected = f"{sum(row['corrected'] for row in group)} of {len(group)}"
            lines.append(_line([name, f"{group[0]['n_cells']:,}", method, str(len(group)), corrected, *values]))
    return "\n".join(lines)


def is_clean(row: Row) -> bool:
    """Whether seconds are those of a machine with nothing else to do, all its cores in use, at normal priority."""
    run = row.get("run")
    if run is None:
        return True
    return (run["others"] or 0) <= 0.1 and run["threads"] >= run["machine"]["cores"] and run["nice"] <= 0


def _is_peer(method: str) -> bool:
    """Whether a method is another's that sees no labels, as schelix does not."""
    return method in METHODS and method != DEFAULT and not METHODS[method].sees_labels


def _named(method: str) -> str:
    seen = method in METHODS and METHODS[method].sees_labels
    return f"{method} (sees labels)" if seen else method


def _best(names: Sequence[str], values: Sequence[float | None]) -> tuple[str, float] | None:
    """Return the name of the highest value, and it; None when there is no value."""
    found = [(name, value) for name, value in zip(names, values, strict=True) if value is not None]
    return max(found, key=lambda pair: pair[1], default=None)


def _mean(rows: Sequence[Row], column: str = "total") -> float | None:
    found = summary(rows, column)
    return found and found[0]


def _mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean; None when a value is missing."""
    values = list(values)
    return None if not values or any(value is None for value in values) else statistics.fmean(values)


def _guard(groups: Iterable[Sequence[Row]], method: str, guard: str) -> float | None:
    """Return the mean of a guard over the data sets in which any method has it; None when this one lacks some."""
    defined = [group for group in groups if any(summary([row], guard) for row in group)]
    return _mean_of(_mean([row for row in group if row["method"] == method], guard) for group in defined)


def _bold(value: float | None, best: float | None) -> str:
    text = cell("total", value).strip()
    return f"**{text}**" if value is not None and value == best else text


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _full_cell(group: Sequence[Row], column: str, *, bold: bool) -> str:
    found = summary(group, column)
    if found is None:
        return "-"
    text = cell(column, found[0]).strip()
    if column == "total" and len(group) > 1:
        text += f" ± {found[1]:.3f}"
    if column == "seconds" and not all(map(is_clean, group)):
        text = f"~{text}"
    return f"**{text}**" if bold and column == "total" else text


def _notes(rows: Sequence[Row]) -> list[str]:
    """Return what runs said about themselves, once each."""
    found = {f"- {row['method'].partition(':')[0]} on {row['data']}: {note}" for row in rows for note in row["notes"]}
    return sorted(found)


def _measured(row: Row) -> str:
    machine = row.get("run", row)["machine"]
    changed = " with uncommitted changes" if row["dirty"] else ""
    settings = f"; schelix with {', '.join(row['settings'])}" if row["settings"] else ""
    versions = ", ".join(f"{name} {row['versions'][name]}" for name in _NAMED if name in row["versions"])
    return (
        f"- {row['date'][:10]}, commit {(row['commit'] or 'unknown')[:10]}{changed}: {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['ram_gb']:.0f} GB, Python {machine['python']}, {machine['platform']}; "
        f"{versions}{settings}"
    )
