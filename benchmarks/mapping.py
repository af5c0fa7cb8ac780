"""How well are new batches mapped? Leaves out donors or technologies, maps them back, and scores labels and positions.

    python benchmarks/mapping.py kang.h5ad:donor sc_mixology.h5ad:batch pancreas.h5ad:batch
    python benchmarks/mapping.py kang.h5ad:donor --folds 2 --methods schelix,symphony
    python benchmarks/mapping.py kang.h5ad:donor --methods scarches --folds 2 --epochs 50
    python benchmarks/mapping.py kang.h5ad:donor --methods schelix,symphony --jobs 2
    python benchmarks/mapping.py --readme

DATA:COLUMN is a file and the obs column whose values are left out in turn; the batch key stays --batch-key. Each fold
is done twice: with all types in the reference (macro-F1, accuracy, ECE, coverage of 90 % label sets, overlap with the
joint integration) and with one type taken out of it (AUROC of novelty on its cells). Every method runs in a process of
its own. Rows replace older ones of the same fold and method in the JSON file. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _machine import ROOT, circumstances, threads, versions_of
from _mapping_folds import Fold, folds, read_obs, write_fold
from _mapping_methods import METHODS, Job, joint_job
from _mapping_report import Row, read_rows, table, update_readme, write_rows
from _mapping_scores import flagged_shares, label_scores, novel_above, novelty_auroc, overlap

HERE = ROOT / "benchmarks"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}  # numba sets the threads of OpenMP, and so of torch
sys.path.append(str(ROOT))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", metavar="DATA:COLUMN", help="an .h5ad file and the column that is left out")
    parser.add_argument("--methods", default=",".join(METHODS), help="(default: %(default)s)")
    parser.add_argument("--batch-key", default="batch", help="obs column of the batches (default: %(default)s)")
    parser.add_argument("--label-key", default="cell_type", help="obs column of the labels (default: %(default)s)")
    parser.add_argument("--folds", type=int, metavar="N", help="the first N values of each column alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, metavar="N", help="at most N epochs of scVI (default: its own rule)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="folds at once, one thread each if several")
    parser.add_argument("--no-novel", action="store_true", help="leave out the folds in which a type is taken out")
    parser.add_argument("--no-joint", action="store_true", help="leave out the joint integrations, and the overlap")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting for schelix")
    parser.add_argument(
        "-o", "--out", type=Path, default=HERE / "results" / "mapping.json", help="JSON file (default: %(default)s)"
    )
    parser.add_argument("--readme", action="store_true", help="write the table of all results into the README beside")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when all was done, 1 when something failed, 2 for bad usage."""
    arguments = parser().parse_args(argv)
    try:
        methods, problems = check(arguments)
    except ValueError as error:
        print(f"mapping.py: {error}", file=sys.stderr)
        return 2
    failures = sum(run_problem(path, by, methods, arguments) for path, by in problems)
    if arguments.readme:
        speed = read_rows(arguments.out.with_name("mapping-speed.json"))
        update_readme(HERE / "README.md", read_rows(arguments.out), speed)
    return 1 if failures else 0


def check(arguments: argparse.Namespace) -> tuple[list[str], list[tuple[Path, str]]]:
    """Return methods and (file, column) pairs; complain about what can be known before hours of work."""
    methods = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    if unknown := [name for name in methods if name not in METHODS]:
        raise ValueError(f"unknown method {', '.join(unknown)}. There are: {', '.join(METHODS)}")
    needed = {library for name in methods for library in METHODS[name].libraries}
    if missing := needed - versions_of(needed).keys():
        raise ValueError(
            f"not installed: {', '.join(sorted(missing))}. pip install -c constraints.txt -e '.[benchmark]'"
        )
    if importlib.util.find_spec("sklearn") is None:
        raise ValueError("scikit-learn is not installed")
    problems = []
    for text in arguments.data:
        path, _, by = text.rpartition(":")
        if not path or not Path(path).is_file():
            raise ValueError(f"{text}: write FILE:COLUMN, with an .h5ad file that is there")
        columns = read_obs(Path(path)).columns
        if lacking := [name for name in (by, arguments.batch_key, arguments.label_key) if name not in columns]:
            raise ValueError(f"{path} has no obs column {', '.join(lacking)}")
        problems.append((Path(path), by))
    if not problems and not arguments.readme:
        raise ValueError("no DATA:COLUMN given. Try --help")
    return methods, problems


def run_problem(path: Path, by: str, methods: Sequence[str], arguments: argparse.Namespace) -> int:
    """Run all folds of a file; return how many mappings failed. Rows are kept method by method."""
    failures = 0
    with tempfile.TemporaryDirectory(prefix="mapping-") as scratch:
        todo = list(folds(path, by, arguments.label_key, not arguments.no_novel))
        values = list(dict.fromkeys(fold.value for fold in todo))[: arguments.folds]
        for method in methods:
            job = Job(
                method,
                "",
                "",
                arguments.batch_key,
                arguments.label_key,
                arguments.seed,
                arguments.epochs,
                tuple(arguments.set),
            )
            z_joint = None
            if not arguments.no_joint:
                z_joint = attempt(joint_job(job, path), Path(scratch) / f"{method}-joint")
                failures += z_joint is None
            about = {**circumstances(), "threads": threads() if arguments.jobs == 1 else 1, "jobs": arguments.jobs}
            pairs = [[fold for fold in todo if fold.value == value] for value in values]
            z = None if z_joint is None else z_joint["z"]
            with ThreadPoolExecutor(arguments.jobs) as pool:
                run = partial(run_fold, job=job, z_joint=z, scratch=Path(scratch), one_thread=arguments.jobs > 1)
                done = pool.map(run, pairs)
                for row in done:
                    failures += row is None
                    if row is not None:
                        write_rows(arguments.out, [{**row, **about}])
        shown = [row for row in read_rows(arguments.out) if (row["data"], row["by"]) == (path.stem, by)]
        print(table(shown), end="\n\n", flush=True)
    return failures


def run_fold(
    pair: Sequence[Fold], job: Job, z_joint: np.ndarray | None, scratch: Path, one_thread: bool = False
) -> Row | None:
    """Map a left-out value, with all types in the reference and with one taken out; return the row, None if failed."""
    row: Row = {"data": pair[0].data.stem, "by": pair[0].by, "fold": pair[0].value, "method": job.method}
    row |= {"seed": job.seed, "epochs": job.epochs, "settings": list(job.settings), "query_cells": len(pair[0].query)}
    for fold in pair:
        folder = Path(tempfile.mkdtemp(dir=scratch))
        reference, query = write_fold(fold, job.batch_key, job.label_key, folder)
        answer = attempt(
            Job(**{**asdict(job), "reference": str(reference), "query": str(query)}), folder / "work", one_thread
        )
        if answer is None:
            return None
        obs = read_obs(fold.data)
        labels = obs[job.label_key].astype(str).to_numpy()
        truth = labels[fold.query]
        if fold.lacking is not None:
            novel = ~np.isin(truth, labels[fold.reference])  # beside the type that was taken out there can be others
            row |= {"lacking": fold.lacking, "auroc": novelty_auroc(answer, novel), **flagged_shares(answer, novel)}
            row["novel_above"] = novel_above(answer, novel)
            continue
        row |= label_scores(answer, truth, np.isin(truth, labels[fold.reference]))
        row |= {key: float(answer[key]) for key in ("map_seconds", "seconds", "peak_mb")}
        if z_joint is not None and len(answer["z_reference"]) == len(fold.reference):
            row["overlap"] = overlap(z_joint, answer["z_reference"], answer["z_query"], fold.reference, fold.query)
    shown = {key: value for key, value in row.items() if isinstance(value, float)}
    print(
        f"{row['data']} {row['fold']} {job.method}: {json.dumps({k: round(v, 3) for k, v in shown.items()})}",
        flush=True,
    )
    return row


def attempt(job: Job, work: Path, one_thread: bool = False) -> dict[str, Any] | None:
    """Run a job in a process of its own; return its arrays with its peak memory, None if it failed."""
    work.mkdir(parents=True)
    (work / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (work / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "_mapping_worker.py"), str(work)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path, **(ONE_THREAD if one_thread else {})},
        )
        process.wait()
    if process.returncode:
        tail = (work / "log.txt").read_text(errors="replace").splitlines()[-25:]
        print("\n".join([f"FAILED: {job.method} on {job.reference}", *tail]), file=sys.stderr, flush=True)
        return None
    with np.load(work / "answer.npz") as file:
        return {name: file[name] for name in file.files}


if __name__ == "__main__":
    sys.exit(main())
