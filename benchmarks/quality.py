"""How good are the embeddings? Runs methods on labelled .h5ad files, scores them, prints a table and keeps it.

    python benchmarks/quality.py kang.h5ad pancreas.h5ad
    python benchmarks/quality.py kang.h5ad --batch-key kang.h5ad:batch --batch-key kang.h5ad:stim --seeds 3
    python benchmarks/quality.py atlas.h5ad --methods schelix,harmony --set graph.k=15 -o /tmp/try.json
    python benchmarks/quality.py kang.h5ad --ablations     # schelix with one part changed
    python benchmarks/quality.py kang.h5ad --split         # one batch split in two at random
    python benchmarks/quality.py --readme                  # only write the tables of kept results into the README

Every method runs in a process of its own, from the file, as its users run it; seconds and MB are the wall time and the
peak memory of that whole process. Scores are the default metrics of scib-metrics' Benchmarker (exact neighbours),
higher is better, total = .6 bio + .4 batch. What was computed before from the same data, settings, code and libraries
is taken from a cache. New results replace the older ones of the same data, batch key and method in the JSON file and
leave the others. See benchmarks/README.md for what the columns mean.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from _ablations import ABLATIONS
from _cache import Cache, default_directory
from _machine import circumstances, versions_of
from _methods import METHODS, method_of
from _readme import splits as split_table
from _readme import update_readme
from _report import Row, read_rows, text_table, write_rows
from _split import METHODS as SPLIT_METHODS
from _split import study_split
from _study import Problem, run_methods, say, settings_of, solve
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
        "--methods",
        help=f"comma-separated, of {', '.join(METHODS)} (default: all that see no labels), or schelix@ABLATION of "
        f"{', '.join(ABLATIONS)}",
    )
    parser.add_argument(
        "--ablations", action="store_true", help="run schelix and all its ablations, beside --methods if given"
    )
    parser.add_argument(
        "--split",
        action="store_true",
        help="instead: split the largest batch in two at random, and see whether neighbours stay the same",
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
        "--cache",
        type=Path,
        metavar="DIR",
        help="where embeddings and scores are kept, found again by content (default: $SCHELIX_BENCHMARK_CACHE, or "
        "schelix-benchmark in your cache directory)",
    )
    parser.add_argument("--no-cache", action="store_true", help="run and score everything anew, and keep nothing")
    parser.add_argument("--again", action="store_true", help="run the methods even when kept, and keep the new runs")
    parser.add_argument("--fill", action="store_true", help="run what is not in the cache yet, and score nothing")
    parser.add_argument(
        "--starts", type=int, default=0, metavar="N", help="also keep the scores of k-means from N starts (default: 0)"
    )
    parser.add_argument(
        "--readme", action="store_true", help="write tables of all results in the JSON files into the README beside"
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
    methods = chosen_methods(arguments)
    if arguments.seeds < 1:
        raise UsageError(f"--seeds {arguments.seeds}: at least 1 is needed")
    if arguments.starts < 0:
        raise UsageError(f"--starts {arguments.starts}: 0 or more")
    if importlib.util.find_spec("scib_metrics") is None:
        raise UsageError("scib-metrics is not installed. Install it: pip install -c constraints.txt -e '.[benchmark]'")
    for method in ["schelix", *methods]:
        try:
            load_config(overrides=settings_of(method, arguments.set))
        except SchelixError as error:
            raise UsageError(f"{method if '@' in method else '--set'}: {error}") from error
    if any(setting.partition("=")[0].strip() == "data.label_key" for setting in arguments.set):
        raise UsageError("--set data.label_key: the labels are what is scored; --methods schelix_labels uses a fifth")
    if arguments.no_cache and (arguments.fill or arguments.again):
        raise UsageError("--fill and --again keep embeddings in the cache, which --no-cache does without")
    needed = {library: name for name in methods for library in method_of(name).libraries}
    if missing := needed.keys() - versions_of(needed).keys():
        raise UsageError(
            f"not installed: {', '.join(f'{library} (for {needed[library]})' for library in sorted(missing))}. "
            f"Install it: pip install -c constraints.txt -e '.[benchmark]'; or leave the method out with --methods"
        )
    return methods


def chosen_methods(arguments: argparse.Namespace) -> list[str]:
    """Return the methods that are asked for, each once."""
    if arguments.split:
        if arguments.methods is not None or arguments.ablations or arguments.fill:
            raise UsageError(f"--split has its own methods, {', '.join(SPLIT_METHODS)}; give it alone")
        return list(SPLIT_METHODS)
    text = arguments.methods
    if text is None:
        text = "" if arguments.ablations else ",".join(name for name in METHODS if not METHODS[name].sees_labels)
    methods = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    known = [*METHODS, *(f"schelix@{name}" for name in ABLATIONS)]
    if unknown := [name for name in methods if name not in known]:
        raise UsageError(f"unknown method {', '.join(unknown)}. There are: {', '.join(known)}")
    if arguments.ablations:
        methods += [name for name in ["schelix", *known[len(METHODS) :]] if name not in methods]
    if not methods:
        raise UsageError(f"--methods names none. There are: {', '.join(known)}")
    return methods


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when all that was asked was done, 1 when something failed, 2 for bad usage."""
    arguments = parser().parse_args(argv)
    split_out = arguments.out.with_name(f"{arguments.out.stem}-split.json")
    try:
        if not arguments.data and not arguments.readme:
            raise UsageError("no DATA given. Try --help")
        for path in (arguments.out, split_out):
            read_rows(path)  # complain now, not after hours
        todo = problems(arguments.data, arguments.batch_key, arguments.label_key)
        failures = run_all(arguments, todo, check(arguments), split_out) if todo else 0
        if arguments.readme:
            picture = HERE / "results" / "quality.png"
            update_readme(HERE / "README.md", read_rows(arguments.out), read_rows(split_out), picture)
    except ValueError as error:
        say(f"quality.py: {error}")
        return 2
    return 1 if failures else 0


def run_all(arguments: argparse.Namespace, todo: Sequence[Problem], methods: Sequence[str], split_out: Path) -> int:
    """Run, print and keep one data set after the other; return how many things failed (each is told on stderr)."""
    failures = 0
    directory = None if arguments.no_cache else arguments.cache or default_directory()
    cache = Cache(directory, methods if arguments.again else ())
    # one process scores all: what scib-metrics compiles in its first minute serves the others, and this one stays small
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as scorer:
        for problem in todo:
            say(f"{problem.data.name}, batch key {problem.batch_key}")
            about = circumstances()
            try:
                with tempfile.TemporaryDirectory(prefix="quality-") as scratch:
                    asked = (problem, methods, arguments.seeds, arguments.set)
                    if arguments.fill:
                        failures += run_methods(*asked, cache, Path(scratch))[1]
                        continue
                    if arguments.split:
                        rows = study_split(problem, arguments.seeds, arguments.set, scorer, Path(scratch), cache)
                        keep([{**row, **about} for row in rows], split_table, split_out)
                        continue
                    rows, failed = solve(*asked, scorer, Path(scratch), cache, arguments.starts)
            except BrokenProcessPool:
                say("FAILED: the scoring process was killed; often the system is short of memory")
                return failures + 1
            except (TaskFailed, ValueError) as error:
                say(f"FAILED: {error}")
                failures += 1
                continue
            failures += failed
            keep([{**row, **about} for row in rows], text_table, arguments.out)
    return failures


def keep(rows: Sequence[Row], table: Callable[[Sequence[Row]], str], out: Path) -> None:
    """Print rows and put them into a results file."""
    print(table(rows), end="\n\n", flush=True)
    write_rows(out, rows)
    say(f"  written to {out}")


if __name__ == "__main__":
    sys.exit(main())
