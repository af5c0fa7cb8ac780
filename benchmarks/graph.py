"""How long, how much memory and how many of the true neighbours: schelix's graph beside pynndescent, FAISS and hnswlib.

    python benchmarks/graph.py --like run/features/anchor_corrected.npy --scratch /data/graph
    python benchmarks/graph.py --like ... --scratch ... --methods schelix --budget 4GB --cells 1000000 --cells 5000000

The searches of schelix are `schelix` (its default, in --budget), `schelix-small` (the same in --small-budget), `single`
(graph.method = pynndescent, all cells at once if --budget holds them) and `partitioned` (the same in --small-budget).

Features of any number of cells are made from the real ones of --like (see `_graph_features`), once, and kept in
--scratch. Every search runs in a process of its own with --threads threads, one after the other, and its time is that
of the whole process: start, imports, compilation and reading are in it. Recall is that of the same 2,000 random cells
against exact neighbours, which the benchmark computes itself; schelix' own audit is shown beside it. Diffusion is
compared with SciPy's sparse matrices in memory, on the neighbours of the first search that ran.
"""

from __future__ import annotations

import argparse
import datetime
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _graph_diffusion import measure_diffusion, order_of
from _graph_features import write_features
from _graph_report import markdown, save, update_readme
from _graph_run import run_task
from _graph_scores import agreement, as_row, exact_limits, recall_of, sampled_rows
from _machine import circumstances, versions_of
from _tasks import HERE, ROOT
from _watch import CommandFailed

sys.path.append(str(ROOT))
# of schelix: graph.method, and whether --small-budget is its budget
OURS = {
    "schelix": ("auto", False),
    "schelix-small": ("auto", True),
    "single": ("pynndescent", False),
    "partitioned": ("pynndescent", True),
}
METHODS = (*OURS, "pynndescent", "faiss-ivf", "faiss-hnsw", "hnswlib", "diffusion")
LIBRARIES = ("numpy", "scipy", "numba", "pynndescent", "faiss-cpu", "hnswlib")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", type=Path, required=True, metavar="NPY", help="real features, (cells, dimensions)")
    parser.add_argument("--as-is", action="store_true", help="search these themselves: --cells must be theirs")
    parser.add_argument("--cells", type=int, action="append", help="repeat for several sizes (default: 1000000)")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: %(default)s")
    parser.add_argument("--budget", help="memory that schelix may use, e.g. 4GB (default: its own default)")
    parser.add_argument("--small-budget", default="1GB", help="of schelix-small and partitioned (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="METHOD.NAME=NUMBER", help="of a peer, e.g. faiss-ivf.nprobe=20"
    )
    parser.add_argument("--k", type=int, default=30, help="neighbours (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of every search (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=2_000, help="cells that are scored (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--scratch", type=Path, required=True, help="where features and neighbours are kept")
    parser.add_argument("--readme", action="store_true", help="write all rows of the results into the README here")
    parser.add_argument("-o", "--out", type=Path, default=HERE / "results" / "graph.json", help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when all was done, 1 when something failed, 2 for bad usage."""
    arguments = parser().parse_args(argv)
    arguments.methods = arguments.methods.split(",")
    arguments.cells = sorted(set(arguments.cells or [1_000_000]))
    complaint = _complaint(arguments)
    if complaint:
        print(f"graph.py: {complaint}", file=sys.stderr)
        return 2
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    started, failed, rows = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), False, []
    for cells in arguments.cells:
        features = arguments.like
        if not arguments.as_is:
            features = write_features(arguments.like, cells, arguments.seed, arguments.scratch)
        base = {"cells": cells, "dims": int(np.load(features, mmap_mode="r").shape[1]), "k": arguments.k}
        base |= {"data": _data(arguments), "seed": arguments.seed, "threads": arguments.threads, "run": started}
        base["features"] = features.name
        limits = _limits(features, arguments)
        for method in arguments.methods:
            try:
                if method == "diffusion":
                    graph = arguments.scratch / f"graph-{cells}-{arguments.k}.npy"
                    found = measure_diffusion(features, graph, arguments.scratch / "diffusion", base)
                else:
                    found = [measure(method, features, limits, arguments, base)]
            except CommandFailed as error:
                print(f"FAILED: {method}, {cells:,} cells: {error}", file=sys.stderr, flush=True)
                failed = True
                continue
            for row in found:
                row |= {**circumstances(), "searchers": versions_of(LIBRARIES)}
                rows = save(arguments.out, row)
                recall = f", recall {row['recall']['recall']:.4f}" if "recall" in row else ""
                print(f"{cells:,} cells, {method}: {row['method']} {row['seconds']:,.1f} s{recall}", flush=True)
    if rows:
        print(markdown(rows))
        print(f"written to {arguments.out}")
    if rows and arguments.readme:
        update_readme(HERE / "README.md", rows)
    return int(failed)


def measure(
    method: str,
    features: Path,
    limits: tuple[np.ndarray, np.ndarray],
    arguments: argparse.Namespace,
    base: dict[str, Any],
) -> dict[str, Any]:
    """Run one search and score it; the neighbours of the first one of a size stay in scratch, for the diffusion."""
    name, search, budget = method, None, None
    if method in OURS:
        name, (search, small) = "schelix", OURS[method]
        budget = arguments.small_budget if small else arguments.budget
    settings = settings_of(method, base["cells"], arguments.set)
    task = {"features": str(features), **{key: base[key] for key in ("k", "seed", "threads")}, **settings}
    out = arguments.scratch / f"{method}-{base['cells']}"
    shutil.rmtree(out, ignore_errors=True)
    answer, cost = run_task(name, task | {"search": search, "budget": _bytes(budget)}, out)
    rows, nearest = limits
    found_nk = np.load(answer.pop("indices"), mmap_mode="r")
    recall = recall_of(np.load(features, mmap_mode="r"), rows, nearest, np.asarray(found_nk[rows]), base["k"])
    row = {
        "what": "neighbors",
        **base,
        "method": name,
        "search": answer.pop("search", None),
        "budget": budget,
        "settings": settings,
        **cost,
    }
    row["recall"] = as_row(recall)
    if "audit" in answer:
        row["audit"] = answer.pop("audit")
        row["agreement"] = agreement(recall, row["audit"])
    row["answer"] = answer
    graph = arguments.scratch / f"graph-{base['cells']}-{base['k']}.npy"
    if not graph.exists():
        np.save(graph, found_nk)
    order, found_order = order_of(graph), out / "index" / "cells.npy"
    if found_order.exists() and not order.exists():
        shutil.copyfile(found_order, order)
    del found_nk
    shutil.rmtree(out)
    return row


def settings_of(method: str, n: int, changes: Sequence[str] = ()) -> dict[str, int]:
    """Return the settings of a peer for n cells: common ones, with which recall at 30 is about .95 or above.

    FAISS recommends 4 to 16 sqrt(n) lists (wiki, Guidelines to choose an index): the power of two next to 4 sqrt(n).
    ``changes`` are METHOD.NAME=NUMBER.

    Raises
    ------
    ValueError
        A change is none of any peer's settings.
    """
    small_world = {"m": 16, "ef_construction": 100, "ef": 100}
    lists = {"nlist": 2 ** round(math.log2(4 * math.sqrt(n))), "nprobe": 32}
    settings = {"faiss-ivf": lists, "faiss-hnsw": small_world, "hnswlib": dict(small_world)}
    for change in changes:
        name, _, number = change.partition("=")
        peer, _, setting = name.partition(".")
        if setting not in settings.get(peer, {}) or not number.isdigit():
            known = ", ".join(f"{peer}.{setting}" for peer, found in settings.items() for setting in found)
            raise ValueError(f"--set {change}: write NAME=NUMBER, where NAME is one of {known}")
        settings[peer][setting] = int(number)
    return settings.get(method, {})


def _limits(features: Path, arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Return the scored rows and the cosines of their k-th exact neighbours; none where nothing is to be scored."""
    if set(arguments.methods) == {"diffusion"}:
        return np.empty(0, np.int64), np.empty(0)
    features_nd = np.load(features, mmap_mode="r")
    rows = sampled_rows(len(features_nd), arguments.rows, arguments.seed)
    return rows, exact_limits(features_nd, rows, arguments.k)


def _bytes(text: str | None) -> int | None:
    from schelix_scale.config import parse_bytes

    return None if text is None else parse_bytes(text)


def _data(arguments: argparse.Namespace) -> str:
    return "real" if arguments.as_is else "drawn from real"


def _complaint(arguments: argparse.Namespace) -> str | None:
    """Return what is wrong with the command line."""
    unknown = set(arguments.methods) - set(METHODS)
    if unknown:
        return f"--methods: {', '.join(sorted(unknown))} is none of {', '.join(METHODS)}"
    if not arguments.like.exists():
        return f"there is no {arguments.like}; name features/anchor_corrected.npy of a run with --like"
    if min(arguments.k, arguments.threads) < 1 or arguments.rows < 2 or min(arguments.cells) <= arguments.k:
        return "--k and --threads must be 1 or more, --rows 2 or more, and --cells more than --k"
    if arguments.as_is and arguments.cells != [len(np.load(arguments.like, mmap_mode="r"))]:
        return f"--as-is: {arguments.like} has {len(np.load(arguments.like, mmap_mode='r'))} cells, not --cells"
    try:
        settings_of("", 1, arguments.set)
        for budget in (arguments.budget, arguments.small_budget):
            _bytes(budget)
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
