"""How good are the embeddings? Runs methods on labelled .h5ad files, scores them, prints a table and keeps it.

    python benchmarks/quality.py kang.h5ad pancreas.h5ad
    python benchmarks/quality.py kang.h5ad --batch-key kang.h5ad:batch --batch-key kang.h5ad:stim --seeds 3
    python benchmarks/quality.py atlas.h5ad --methods schelix,harmony --set graph.k=15 -o /tmp/try.json
    python benchmarks/quality.py --readme                  # only write the table of kept results into the README

Every method runs in a process of its own, from the file, as its users run it; seconds and MB are the wall time and the
peak memory of that whole process. Scores are the default metrics of scib-metrics' Benchmarker (exact neighbours),
higher is better, total = .6 bio + .4 batch. New results replace the older ones of the same data, batch key and method
in the JSON file and leave the others. See benchmarks/README.md for what the columns mean.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from _machine import circumstances
from _methods import METHODS
from _report import read_rows, text_table, update_readme, write_rows
from _study import Problem, say, solve
from _tasks import HERE, ROOT, TaskFailed

sys.path.append(str(ROOT))
from schelix_scale.config_io import load_config
from schelix_scale.errors import SchelixError


class UsageError(ValueError):
    """What was asked for cannot be done; the message says why and what to do."""


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", type=Path, metavar="DATA", help=".h5ad file with batches and labels in obs")
    parser.add_argument(
        "--methods", default="schelix,pca,harmony", help=f"comma-separated, of {', '.join(METHODS)} (default: all)"
    )
    parser.add_argument(
        "--batch-key",
        action="append",
        default=[],
        metavar="KEY|DATA:KEY",
        help="obs column of the batches (default: batch); DATA:KEY is for one file alone, named by path, name or stem. "
        "Repeat it for more: a file with two keys is run with each",
    )
    parser.add_argument("--label-key", default="cell_type", help="obs column of the labels (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run with seeds 0 to N-1 (default: 1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="setting for schelix; repeat it for more"
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=HERE / "results" / "quality.json", help="JSON file (default: %(default)s)"
    )
    parser.add_argument(
        "--readme", action="store_true", help="write the table of all results in the JSON file into the README beside"
    )
    return parser


def problems(data: Sequence[Path], keys: Sequence[str], label_key: str) -> list[Problem]:
    """Return each file with its batch keys: those given for it alone, else those given for all, else ``batch``.

    Raises
    ------
    UsageError
        A file does not exist, or a DATA:KEY names none of them.
    """
    if missing := [str(path) for path in data if not path.is_file()]:
        raise UsageError(f"there is no file {', '.join(missing)}")
    own: dict[Path, list[str]] = {path: [] for path in data}
    general = []
    for text in keys:
        name, colon, key = text.rpartition(":")
        matches = [path for path in data if name in (str(path), path.name, path.stem)]
        if not key or (colon and not matches):
            raise UsageError(
                f"--batch-key {text}: {name!r} is none of the files. Write KEY, or DATA:KEY as in a.h5ad:donor"
            )
        if not colon:
            general.append(key)
        for path in matches:
            own[path].append(key)
    chosen = {path: own[path] or general or ["batch"] for path in data}
    return [Problem(path, key, label_key) for path in chosen for key in dict.fromkeys(chosen[path])]


def check(arguments: argparse.Namespace) -> list[str]:
    """Return the methods; complain about everything that can be known before hours of work."""
    methods = list(dict.fromkeys(name.strip() for name in arguments.methods.split(",") if name.strip()))
    if unknown := [name for name in methods if name not in METHODS]:
        raise UsageError(f"unknown method {', '.join(unknown)}. There are: {', '.join(METHODS)}")
    if not methods:
        raise UsageError(f"--methods names none. There are: {', '.join(METHODS)}")
    if arguments.seeds < 1:
        raise UsageError(f"--seeds {arguments.seeds}: at least 1 is needed")
    if importlib.util.find_spec("scib_metrics") is None:
        raise UsageError("scib-metrics is not installed. Install it: pip install -c constraints.txt -e '.[benchmark]'")
    try:
        load_config(overrides=arguments.set)
    except SchelixError as error:
        raise UsageError(f"--set: {error}") from error
    return methods


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when all that was asked was done, 1 when something failed, 2 for bad usage."""
    arguments = parser().parse_args(argv)
    try:
        if not arguments.data and not arguments.readme:
            raise UsageError("no DATA given. Try --help")
        read_rows(arguments.out)  # complain now, not after hours
        failures = run_all(arguments, check(arguments)) if arguments.data else 0
        if arguments.readme:
            update_readme(HERE / "README.md", read_rows(arguments.out))
    except ValueError as error:
        say(f"quality.py: {error}")
        return 2
    return 1 if failures else 0


def run_all(arguments: argparse.Namespace, methods: Sequence[str]) -> int:
    """Run, print and keep one data set after the other; return how many things failed (each is told on stderr)."""
    failures = 0
    todo = problems(arguments.data, arguments.batch_key, arguments.label_key)
    # one process scores all: what scib-metrics compiles in its first minute serves the others, and this one stays small
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as scorer:
        for problem in todo:
            say(f"{problem.data.name}, batch key {problem.batch_key}")
            about = circumstances()
            try:
                with tempfile.TemporaryDirectory(prefix="quality-") as scratch:
                    rows, failed = solve(problem, methods, arguments.seeds, arguments.set, scorer, Path(scratch))
            except BrokenProcessPool:
                say("FAILED: the scoring process was killed; often the system is short of memory")
                return failures + 1
            except (TaskFailed, ValueError) as error:
                say(f"FAILED: {error}")
                failures += 1
                continue
            failures += failed
            rows = [{**row, **about} for row in rows]
            print(text_table(rows), end="\n\n", flush=True)
            write_rows(arguments.out, rows)
            say(f"  written to {arguments.out}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
