"""The rows of `quality.py`: kept in a JSON file, and shown as a table (for the README see `_readme`)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
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
GUARDS = {"kept_neighbors": "kept", "private_purity": "private"}
STARTS = {"total_of_starts": "starts"}
COSTS = {"seconds": "seconds", "peak_mb": "MB"}
COLUMNS = METRICS | STARTS | GUARDS | COSTS
BIO = tuple(METRICS)[:5]
BIO_SHARE = 0.6


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
    if column in COSTS:
        return row[column]
    if column in STARTS:
        return statistics.fmean(totals) if (totals := totals_of_starts(row)) else None
    return row.get("guards" if column in GUARDS else "metrics", {}).get(column)


def totals_of_starts(row: Row) -> list[float]:
    """Return the total with the NMI and ARI of each start of k-means; none where only one start is known."""
    starts, metrics = row.get("starts"), row.get("metrics", {})
    if not starts or metrics.get("total") is None:
        return []
    weight = BIO_SHARE / sum(metrics[name] is not None for name in BIO)
    own = sum(metrics[f"nmi_ari_cluster_labels_kmeans_{name}"] for name in ("nmi", "ari"))
    both = zip(starts["nmi"], starts["ari"], strict=True)
    return [metrics["total"] + weight * (nmi + ari - own) for nmi, ari in both]


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
        lines.append(f"{method:{width}}" + "".join(cell(c, f and f[0]) for c, f in found.items()))
        if len(group) > 1:
            label = f"  ± sd of {len(group)}"
            lines.append(f"{label:{width}}" + "".join(cell(c, f and f[1]) for c, f in found.items()))
    if {"schelix", "harmony"} <= set(groups):
        lines.append(f"{'schelix-harmony':{width}}" + "".join(_gain(c, groups) for c in COLUMNS))
    return "\n".join(lines)


def by_data(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Group rows by data set and batch key, in order of first appearance."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["batch_key"]), []).append(row)
    return groups


def cell(column: str, value: float | None, sign: str = "") -> str:
    """Return a value as 8 characters or more, with the digits of its column."""
    if value is None:
        return f"{'-':>8}"
    digits = {"peak_mb": 0, "seconds": 1}.get(column, 3)
    return f"{value:>{sign}8.{digits}f}"


def _gain(column: str, groups: dict[str, list[Row]]) -> str:
    ours, theirs = summary(groups["schelix"], column), summary(groups["harmony"], column)
    return cell(column, ours[0] - theirs[0] if ours and theirs else None, "+")
