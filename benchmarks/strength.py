"""What does `strength` trade? Runs schelix at several strengths, and PCA, on a labelled .h5ad file; scores and draws.

    python benchmarks/strength.py kang.h5ad --batch-key donor
    python benchmarks/strength.py kang.h5ad --strengths 0,.1,1 --set graph.k=15 -o /tmp/try.json --picture /tmp/try.png

At strength 0 schelix is PCA of its own variable genes, at 1 the full method. Every run has a process of its own. Scores
are those of `quality.py`, kept is its guard of neighbours inside one type of one batch. New results replace the older
ones of the same data and batch key in the JSON file and leave the others; the picture is of the data given now.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from _cache import Cache, default_directory
from _guards import guard_files
from _machine import circumstances
from _report import Row, cell, read_rows, write_rows
from _scores import count_cells, score_files
from _study import ask, say
from _tasks import HERE, ROOT, Outcome, Task, TaskFailed

sys.path.append(str(ROOT))
from schelix_scale.config_io import load_config
from schelix_scale.errors import SchelixError

# Okabe and Ito's colours, which colour-blind readers can tell apart
CURVES = {
    "bio": ("#0072b2", "o", "bio conservation"),
    "batch": ("#d55e00", "s", "batch correction"),
    "total": ("#000000", "D", "total"),
    "kept": ("#009e73", "^", "kept neighbours"),
}
DEFAULT = "0,.25,.5,.75,1"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    results = HERE / "results"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help=".h5ad file with batches and labels in obs")
    parser.add_argument("--batch-key", default="batch", help="obs column of the batches (default: %(default)s)")
    parser.add_argument("--label-key", default="cell_type", help="obs column of the labels (default: %(default)s)")
    parser.add_argument("--strengths", default=DEFAULT, help="comma-separated, each 0 to 1 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all runs (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="setting for schelix; repeat it for more"
    )
    parser.add_argument("-o", "--out", type=Path, default=results / "strength.json", help="default: %(default)s")
    parser.add_argument("--picture", type=Path, default=results / "strength.png", help="default: %(default)s")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="where embeddings are kept (default: that of quality.py)"
    )
    parser.add_argument("--no-cache", action="store_true", help="run everything anew, and keep nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when all was done, 1 when something failed, 2 for bad usage."""
    arguments = parser().parse_args(argv)
    try:
        if not arguments.data.is_file():
            raise ValueError(f"there is no file {arguments.data}")
        strengths = chosen_strengths(arguments.strengths, arguments.set)
        read_rows(arguments.out)  # complain now, not after hours
    except (ValueError, SchelixError) as error:
        say(f"strength.py: {error}")
        return 2
    cache = Cache(None if arguments.no_cache else arguments.cache or default_directory())
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as scorer:
            rows = measure(arguments, strengths, cache, scorer)
    except (TaskFailed, ValueError, BrokenProcessPool) as error:
        say(f"FAILED: {error}")
        return 1
    print(table(rows), flush=True)
    write_rows(arguments.out, rows)
    draw(rows, arguments.picture)
    say(f"written to {arguments.out} and {arguments.picture}")
    return 0


def chosen_strengths(text: str, settings: Sequence[str]) -> list[float]:
    """Return the strengths that are asked for, ascending, each once; complain about bad ones and bad settings.

    Raises
    ------
    ValueError
        None is given, or one is no number.
    SchelixError
        A strength or setting is not allowed.
    """
    try:
        strengths = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError as error:
        raise ValueError(f"--strengths {text}: {error}. Write numbers with commas between, as {DEFAULT}") from error
    if not strengths:
        raise ValueError(f"--strengths names none. Write numbers with commas between, as {DEFAULT}")
    for strength in strengths:
        load_config(overrides=settings_at(strength, settings))
    return strengths


def settings_at(strength: float, settings: Sequence[str]) -> tuple[str, ...]:
    """Return the settings of a run: the strength wins over those given."""
    return (*settings, f"strength={strength!r}")


def measure(arguments: argparse.Namespace, strengths: Sequence[float], cache: Cache, scorer: Executor) -> list[Row]:
    """Run PCA and schelix at every strength, score them together, and return a row each."""
    labels = (str(arguments.data), arguments.batch_key, arguments.label_key)
    counts, about = ask(scorer, count_cells, *labels), circumstances()  # complain before the methods run
    with tempfile.TemporaryDirectory(prefix="strength-") as scratch:
        outcomes: dict[float | None, Outcome] = {}
        for strength in (None, *strengths):
            method, given = ("pca", ()) if strength is None else ("schelix", settings_at(strength, arguments.set))
            task = Task(labels[0], arguments.batch_key, method, arguments.seed, given, arguments.label_key)
            outcomes[strength] = cache.run(task, Path(scratch) / f"{method}-{strength}")
            say(f"  {name_of(strength)}: {outcomes[strength].seconds:.1f} s", *outcomes[strength].notes)
        files = [outcome.embeddings["pca" if key is None else "schelix"] for key, outcome in outcomes.items()]
        say(f"  scoring {len(files)} embeddings")
        metrics, guards = (ask(scorer, score, *labels, files[0], files) for score in (score_files, guard_files))
    shared = {"data": arguments.data.stem, "batch_key": arguments.batch_key, "label_key": arguments.label_key}
    return [
        {
            **{**shared, **counts, "method": "pca" if strength is None else "schelix", "strength": strength},
            **{"seed": arguments.seed, "settings": list(outcome.settings), "seconds": round(outcome.seconds, 2)},
            **{"metrics": found, "guards": guarded, "run": outcome.conditions, **about},
        }
        for (strength, outcome), found, guarded in zip(outcomes.items(), metrics, guards, strict=True)
    ]


def name_of(strength: float | None) -> str:
    """Return what a run is called in tables."""
    return "pca" if strength is None else f"strength {strength:g}"


def value(row: Row, curve: str) -> float | None:
    """Return what a curve shows of a row."""
    return row["guards"]["kept_neighbors"] if curve == "kept" else row["metrics"][curve]


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table of fixed columns."""
    first = rows[0]
    head = f"{first['data']}, batch key {first['batch_key']}: {first['n_cells']:,} cells, {first['n_batches']} batches"
    lines = [head, f"{'':16}" + "".join(f"{curve:>8}" for curve in CURVES)]
    lines += [f"{name_of(row['strength']):16}" + "".join(cell(c, value(row, c)) for c in CURVES) for row in rows]
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw every curve against strength, with PCA as dotted lines, and write a PNG file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ours = [row for row in rows if row["strength"] is not None]
    strengths = [row["strength"] for row in ours]
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        axis = figure.subplots()
        for curve, (color, marker, label) in CURVES.items():
            values = [value(row, curve) for row in ours]
            if all(v is not None for v in values):
                axis.plot(strengths, values, c=color, marker=marker, label=label)
            for row in rows:
                if row["strength"] is None and value(row, curve) is not None:
                    axis.axhline(value(row, curve), c=color, ls=":", lw=1)
        axis.plot([], [], c="0.4", ls=":", lw=1, label="pca")
        axis.set(xlabel="strength", ylabel="score", title=f"{rows[0]['data']} ({rows[0]['batch_key']})")
        axis.grid(color="0.92")
        figure.legend(loc="outside right center", frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        figure.savefig(partial, dpi=110, metadata={"Software": None})
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
