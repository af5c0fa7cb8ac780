"""One data set: its methods are run one after the other, their embeddings scored together, and rows go out."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _ablations import ABLATIONS
from _cache import Cache
from _code import code_digest
from _guards import GUARD_LIBRARIES, guard_files
from _machine import versions_of
from _scores import SCORE_LIBRARIES, count_cells, score_files
from _starts import start_files
from _tasks import Outcome, Task, TaskFailed

Run = tuple[str, int]  # method and seed
REFERENCE: Run = ("pca", 0)


@dataclass(frozen=True)
class Problem:
    """A data set with one of its batch keys, and its labels."""

    data: Path
    batch_key: str
    label_key: str


def run_methods(
    problem: Problem, methods: Sequence[str], seeds: int, settings: Sequence[str], cache: Cache, scratch: Path
) -> tuple[dict[Run, Outcome], int]:
    """Run all methods with all seeds, PCA with seed 0 first; return what they made, and how many of those asked failed.

    Parameters
    ----------
    settings
        ``key=value`` for schelix.
    scratch
        Empty directory for embeddings and logs.

    Raises
    ------
    TaskFailed
        PCA, with which scores are compared, or all runs failed. Other failed runs are told on stderr and left out.
    """
    wanted = [(method, seed) for method in methods for seed in range(seeds)]
    outcomes: dict[Run, Outcome] = {}
    for method, seed in dict.fromkeys([REFERENCE, *wanted]):
        task = Task(
            str(problem.data), problem.batch_key, method, seed, settings_of(method, settings), problem.label_key
        )
        try:
            outcome = outcomes[method, seed] = cache.run(task, scratch / f"{method}-{seed}")
        except TaskFailed as error:
            if (method, seed) == REFERENCE:
                raise
            say(f"FAILED: {error}")
            continue
        kept = ", kept" if outcome.kept else ""
        say(f"  {method}, seed {seed}: {outcome.seconds:.1f} s, {outcome.peak_mb:,.0f} MB{kept}", *outcome.notes)
    done = {run: outcomes[run] for run in wanted if run in outcomes}
    if not done:
        raise TaskFailed(f"no method has a result on {problem.data}")
    return {**done, REFERENCE: outcomes[REFERENCE]}, len(wanted) - len(done)


def settings_of(method: str, settings: Sequence[str]) -> tuple[str, ...]:
    """Return the settings that a method is run with when these are given for schelix."""
    name, _, ablation = method.partition("@")
    if name not in ("schelix", "schelix_labels"):
        return ()
    return (*settings, *(ABLATIONS[ablation] if ablation else ()))


def solve(
    problem: Problem,
    methods: Sequence[str],
    seeds: int,
    settings: Sequence[str],
    scorer: Executor,
    scratch: Path,
    cache: Cache,
    n_starts: int = 0,
) -> tuple[list[dict[str, Any]], int]:
    """Run all methods with all seeds and score them; return a row an embedding, and how many runs failed.

    Parameters
    ----------
    settings
        ``key=value`` for schelix.
    scorer
        Where scoring is done.
    scratch
        Empty directory for embeddings and logs.
    n_starts
        Starts of k-means whose scores are kept beside the others, for embeddings and backbones, not for streams.

    Raises
    ------
    TaskFailed
        PCA, with which scores are compared, or all runs failed. Other failed runs are told on stderr and left out.
    ValueError
        The file lacks batches or labels, or cannot be scored.
    """
    labels = (str(problem.data), problem.batch_key, problem.label_key)
    counts = scorer.submit(count_cells, *labels).result()  # complain before the methods run
    outcomes, failed = run_methods(problem, methods, seeds, settings, cache, scratch)
    names = [(run, name) for run in outcomes if run[0] in methods for name in outcomes[run].embeddings]
    files = [outcomes[run].embeddings[name] for run, name in names]
    reference = outcomes[REFERENCE].embeddings["pca"]
    say(f"  scoring {len(names)} embeddings")
    known = {"data": cache.digest(str(problem.data)), "batch_key": problem.batch_key, "label_key": problem.label_key}
    found = []
    for function, libraries in ((score_files, SCORE_LIBRARIES), (guard_files, GUARD_LIBRARIES)):
        what = {
            **known,
            "reference": cache.digest(reference),
            "versions": versions_of(libraries),
            "code": code_digest(function),
        }
        compute = functools.partial(ask, scorer, function, *labels, reference)
        found.append(cache.scores(what, files, compute))
    shared = {"data": problem.data.stem, "batch_key": problem.batch_key, "label_key": problem.label_key, **counts}
    rows = [
        {**shared, "method": name, "seed": run[1], **_run_facts(outcomes[run]), "metrics": metrics, "guards": guards}
        for (run, name), metrics, guards in zip(names, *found, strict=True)
    ]
    if n_starts:
        whole = [i for i, (_, name) in enumerate(names) if name.partition(":")[2] in ("", "backbone")]
        say(f"  k-means from {n_starts} starts of {len(whole)} embeddings")
        what = {**known, "n": n_starts, "versions": versions_of(SCORE_LIBRARIES), "code": code_digest(start_files)}
        compute = functools.partial(_ask_starts, scorer, labels, n_starts)
        for i, starts in zip(whole, cache.scores(what, [files[i] for i in whole], compute), strict=True):
            rows[i]["starts"] = starts
    return rows, failed


def ask(scorer: Executor, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns that is called in the process of the scorer."""
    return scorer.submit(function, *arguments).result()


def _ask_starts(scorer: Executor, labels: Sequence[str], n_starts: int, files: Sequence[str]) -> Any:
    return ask(scorer, start_files, *labels, files, n_starts)


def _run_facts(outcome: Outcome) -> dict[str, Any]:
    return {
        "settings": list(outcome.settings),
        "notes": outcome.notes,
        "seconds": round(outcome.seconds, 2),
        "peak_mb": round(outcome.peak_mb, 1),
        "run": outcome.conditions,
    }


def say(*lines: object) -> None:
    """Tell what goes on, apart from the tables on stdout."""
    print(*lines, sep="\n    ", file=sys.stderr, flush=True)
