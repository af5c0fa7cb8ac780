"""Which types are called `unknown`? Those that the reference lacks, and those that one batch of it alone has.

    python benchmarks/_mapping_types.py kang_ifnb_donor.h5ad:donor --query 1016 --alone 1488
    python benchmarks/_mapping_types.py pancreas_cross.h5ad:batch --query smartseq2 --alone indrop_human1 --readme

The query is one batch; all others are the reference, from which the cells of a type are taken: all of them, or all but
those of the batch --alone. It is integrated, and the query is mapped, with labels and without. That is done for each
type that has 10 cells in the query and 20 in that batch. Rows go to results/mapping-types.json: which share of the
cells of the type, and of all other types that the reference has, have a p-value of novelty of .01 and .05 at most.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _machine import ROOT, circumstances, threads
from _mapping_report import read_rows
from _sections import save_rows, write_section

HERE = ROOT / "benchmarks"
LEAST, LEAST_ALONE = 10, 20
LEVELS = 0.01, 0.05
NOWHERE, ALONE = "no batch", "one batch"
sys.path.append(str(ROOT))


def references(
    group_n: np.ndarray, label_n: np.ndarray, query: str, alone: str
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield types, which batches of the reference have them, and rows (r,) of that reference."""
    there = group_n != query
    for label in sorted(set(label_n)):
        mine = label_n == label
        if (mine & ~there).sum() >= LEAST and (mine & (group_n == alone)).sum() >= LEAST_ALONE:
            yield label, NOWHERE, np.flatnonzero(there & ~mine)
            yield label, ALONE, np.flatnonzero(there & (~mine | (group_n == alone)))


def shares(p_m: np.ndarray, true_m: np.ndarray, label: str, known: set[str], name: str) -> dict[str, float]:
    """Which share of the cells of a type, and of the others that the reference knows, is novel at each level."""
    mine, others = true_m == label, (true_m != label) & np.isin(true_m, sorted(known))
    parts = (("type", mine), ("others", others))
    return {
        f"{part}_{name}_{level:g}": float((p_m[chosen] <= level).mean()) for part, chosen in parts for level in LEVELS
    }


def measure(data: Path, batch_key: str, label_key: str, query: str, alone: str) -> Iterator[dict[str, Any]]:
    """Integrate each reference, map the query onto it with and without labels, and yield rows."""
    import anndata

    import schelix_scale
    from schelix_scale.progress import QuietReporter

    cells = anndata.read_h5ad(data)
    group_n, label_n = (cells.obs[key].astype(str).to_numpy() for key in (batch_key, label_key))
    new = cells[group_n == query].copy()
    for label, where, rows in references(group_n, label_n, query, alone):
        with tempfile.TemporaryDirectory(prefix="mapping-types-") as folder:
            run = Path(folder) / "run"
            quiet = QuietReporter()
            schelix_scale.integrate(cells[rows].copy(), batch_key=batch_key, out=run, reporter=quiet)
            reference = schelix_scale.Reference.open(run)
            row: dict[str, Any] = {"data": data.stem, "query": query, "alone": alone, "label": label, "where": where}
            row["cells"], row["reference_cells"] = (
                int((new.obs[label_key] == label).sum()),
                int((label_n[rows] == label).sum()),
            )
            for name, keys in (("labels", (label_key,)), ("plain", ())):
                p = reference.map(new, batch_key=batch_key, label_key=keys).obs["schelix_novelty_p"].to_numpy()
                row |= shares(p, label_n[group_n == query], label, set(label_n[rows]), name)
        yield row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as Markdown, and the means of each data set."""
    head = [
        "data, mapped",
        "type",
        "cells",
        "of the reference",
        "`unknown`",
        "without labels",
        "others",
        "at .05",
        "without labels",
        "others",
    ]
    lines = [f"| {' | '.join(head)} |", "|---|---|--:|---|" + "--:|" * 6]
    columns = [
        f"{part}_{name}_{level:g}"
        for level in LEVELS
        for part, name in (("type", "labels"), ("type", "plain"), ("others", "labels"))
    ]
    for row in sorted(rows, key=lambda row: (row["where"], row["data"], row["query"], row["label"])):
        had = "none" if row["where"] == NOWHERE else f"{row['reference_cells']} in {row['alone']}"
        numbers = [f"{row[column]:.2f}" if column.startswith("type") else f"{row[column]:.3f}" for column in columns]
        cells = [f"{row['data']}, {row['query']}", row["label"], f"{row['cells']:,}", had, *numbers]
        lines.append(f"| {' | '.join(cells)} |")
    for where in (NOWHERE, ALONE):
        of = [row for row in rows if row["where"] == where]
        if of:
            means = [np.mean([row[column] for row in of]) for column in columns]
            lines.append(f"| **mean** | | | {where} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    seen = {
        f"- {row['date'][:10]}, commit {(row['commit'] or 'unknown')[:10]}, {row['threads']} threads" for row in rows
    }
    return "\n".join([*lines, "", *sorted(seen)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = parser().parse_args(argv)
    name, _, batch_key = arguments.data.rpartition(":")
    about = {**circumstances(), "threads": threads()}
    for row in measure(Path(name), batch_key, arguments.label_key, arguments.query, arguments.alone):
        identity = ("data", "query", "alone", "label", "where")
        kept = [
            old for old in read_rows(arguments.out) if [old[key] for key in identity] != [row[key] for key in identity]
        ]
        save_rows(arguments.out, [*kept, {**row, **about}])
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    if arguments.readme:
        write_section(HERE / "README.md", "mapping-types", table(read_rows(arguments.out)))
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA:COLUMN", help="an .h5ad file and the obs column of its batches")
    parser.add_argument("--query", required=True, help="the batch that is mapped")
    parser.add_argument("--alone", required=True, help="the batch that alone has a type")
    parser.add_argument("--label-key", default="cell_type")
    parser.add_argument("--readme", action="store_true", help="write the table of all rows into the README beside")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=HERE / "results" / "mapping-types.json",
        help="JSON file (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
