"""How fast does a run train, in one process and in several, and beside what it could? Beside scVI on the same cells.

    schelix prepare atlas200k.zarr --batch-key batch -o run && schelix graph run
    python benchmarks/ddp.py run
    python benchmarks/ddp.py run --batch 4096 --scvi-cells 0 --readme

Every figure comes from processes of their own, round by round: all tasks once a round, so that a busy minute does
not fall on one of them alone; ratios are those of a round. Starting Python, importing, opening and the first ten steps
are not counted. The floor makes the same steps of minibatches that lie in RAM: what is left is the model. scVI trains
with its defaults on the run's genes. Memory is private memory (USS) of a rank; torch's own is that of ranks which have
joined and do nothing. A row for each run, number of cells, batch and number of cores is kept in the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _ddp_report import keep, markdown, speed_of, update_readme
from _machine import circumstances, versions_of
from _tasks import HERE, ROOT
from _watch import CommandFailed, python, watch

sys.path.append(str(ROOT))


@dataclass(frozen=True)
class Contender:
    """What is measured: a task in ``ranks`` processes of ``threads`` threads each."""

    label: str
    task: str
    ranks: int
    threads: int


def contenders(cores: int, scvi: bool) -> list[Contender]:
    """Return what is measured on so many cores."""
    found = [
        Contender("one process, one thread", "train", 1, 1),
        Contender("one process, one thread, in RAM", "floor", 1, 1),
    ]
    if cores > 1:
        found += [
            Contender("one process, all threads", "train", 1, cores),
            Contender("one process, all threads, in RAM", "floor", 1, cores),
            Contender("a rank on each core", "train", cores, 1),
            Contender("a rank on each core, idle", "idle", cores, 1),
        ]
    return [*found, Contender("scVI", "scvi", 1, cores)] if scvi else found


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run whose graph is built")
    parser.add_argument("--batch", type=int, default=1_024, help="cells of a step (default: that of runs, %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="of each phase (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--cores", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--scvi-cells", type=int, default=20_000, help="0: without scVI (default: %(default)s)")
    parser.add_argument("--readme", action="store_true", help="write all rows of the results into the README here")
    parser.add_argument("-o", "--out", type=Path, default=HERE / "results" / "ddp.json", help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when all was done, 1 when something failed, 2 for bad usage."""
    arguments = parser().parse_args(argv)
    if not (arguments.run / "stages" / "graph.json").exists() or min(arguments.rounds, arguments.cores) < 1:
        print(f"ddp.py: {arguments.run} must be a run whose graph is built (schelix graph RUN)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="ddp-") as temporary:
        try:
            row = measure(arguments, Path(temporary))
        except CommandFailed as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
    rows = keep(arguments.out, row)
    print(markdown([row]))
    print(f"written to {arguments.out}")
    if arguments.readme:
        update_readme(HERE / "README.md", rows)
    return 0


def measure(arguments: argparse.Namespace, temporary: Path) -> dict[str, Any]:
    """Run all contenders in turn."""
    from schelix_scale.run import RunDirectory

    chosen = contenders(arguments.cores, arguments.scvi_cells > 0)
    found: dict[str, list[list[dict[str, Any]]]] = {one.label: [] for one in chosen}
    for number in range(arguments.rounds):
        for place, one in enumerate(chosen):
            ranks = run(one, arguments, temporary / f"{number}-{place}")
            speeds = {name: f"{speed:,.0f}" for name, speed in ranks[0].get("speed", {}).items()}
            print(f"round {number}: {one.label}: {speeds or 'memory only'}", flush=True)
            found[one.label].append(ranks)
    cells = int(RunDirectory.open(arguments.run).record("genes").details.get("cells", 0)) or _cells(arguments.run)
    return {
        **{"run": arguments.run.name, "cells": cells, "batch": arguments.batch, "cores": arguments.cores},
        **{"steps": arguments.steps, "scvi_cells": arguments.scvi_cells},
        "contenders": [{**asdict(one), "rounds": found[one.label]} for one in chosen],
        "ratios": ratios(found, arguments.cores),
        **circumstances(),
        "peer_versions": versions_of(("scvi-tools", "lightning")),
    }


def _cells(run: Path) -> int:
    import pyarrow.parquet

    return int(pyarrow.parquet.read_metadata(run / "cells.parquet").num_rows)


def run(one: Contender, arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Run a contender; return what each of its ranks has found."""
    scratch.mkdir(parents=True)
    task: dict[str, Any] = {"task": one.task, "run": str(arguments.run.resolve()), "batch": arguments.batch}
    task |= {"steps": arguments.steps, "threads": one.threads}
    if one.task == "scvi":
        task["cells"] = arguments.scvi_cells
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(one.ranks)] if one.ranks > 1 else []
    command = python(*start, str(HERE / "_ddp_tasks.py"), json.dumps(task), str(scratch))
    watch(command, scratch / "log.txt", {"OMP_NUM_THREADS": str(one.threads)})
    return [json.loads((scratch / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(one.ranks)]


def ratios(found: dict[str, list[list[dict[str, Any]]]], cores: int) -> dict[str, float]:
    """Return the median over rounds of what the figures are to each other."""

    def ratio(one: str, other: str) -> float:
        pairs = zip(speed_of(found[one]), speed_of(found[other]), strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    whole = "one process, all threads" if cores > 1 else "one process, one thread"
    told = {
        "one thread, to the floor": ratio("one process, one thread", "one process, one thread, in RAM"),
    }
    if cores > 1:
        told["all threads, to the floor"] = ratio(whole, f"{whole}, in RAM")
        told["ranks, to threads"] = ratio("a rank on each core", whole)
        pairs = zip(found["a rank on each core"], found["a rank on each core, idle"], strict=True)
        extra = [ranks[-1]["private_mb"] - idle[-1]["private_mb"] for ranks, idle in pairs]
        told["MB of another rank beyond torch's own"] = round(statistics.median(extra), 1)
    if "scVI" in found:
        told["to scVI"] = ratio(whole, "scVI")
    return told


if __name__ == "__main__":
    sys.exit(main())
