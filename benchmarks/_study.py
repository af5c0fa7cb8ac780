"""One data set: its methods are run one after the other, their embeddings scored together, and rows go out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _scores import read_labels, score_files
from _tasks import Outcome, Task, TaskFailed, run_task

Run = tuple[str, int]  # method and seed
_REFERENCE: Run = ("pca", 0)


@dataclass(frozen=True)
class Problem:
    """A data set with one of its batch keys, and its labels."""

    data: Path
    batch_key: str
    label_key: str


def solve(
    problem: Problem, methods: Sequence[str], seeds: int, settings: Sequence[str], scorer: Executor, scratch: Path
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

    Raises
    ------
    TaskFailed
        PCA, with which scores are compared, or all runs failed. Other failed runs are told on stderr and left out.
    ValueError
        The file lacks batches or labels, or cannot be scored.
    """
    labels = (str(problem.data), problem.batch_key, problem.label_key)
    scorer.submit(read_labels, *labels).result()  # complain before the methods run
    wanted = [(method, seed) for method in methods for seed in range(seeds)]
    outcomes: dict[Run, Outcome] = {}
    for method, seed in dict.fromkeys([_REFERENCE, *wanted]):
        task = Task(str(problem.data), problem.batch_key, method, seed, tuple(settings) if method == "schelix" else ())
        try:
            outcome = outcomes[method, seed] = run_task(task, scratch / f"{method}-{seed}")
        except TaskFailed as error:
            if (method, seed) == _REFERENCE:
                raise
            say(f"FAILED: {error}")
            continue
        say(f"  {method}, seed {seed}: {outcome.seconds:.1f} s, {outcome.peak_mb:,.0f} MB", *outcome.notes)
    done = [run for run in wanted if run in outcomes]
    if not done:
        raise TaskFailed(f"no method has a result on {problem.data}")
    names = [(run, name) for run in done for name in outcomes[run].embeddings]
    say(f"  scoring {len(names)} embeddings")
    files = [outcomes[run].embeddings[name] for run, name in names]
    reference = outcomes[_REFERENCE].embeddings["pca"]
    counts, scores = scorer.submit(score_files, *labels, reference, files).result()
    shared = {"data": problem.data.stem, "batch_key": problem.batch_key, "label_key": problem.label_key, **counts}
    rows = [
        {**shared, "method": name, "seed": run[1], **_run_facts(outcomes[run]), "metrics": metrics}
        for (run, name), metrics in zip(names, scores, strict=True)
    ]
    return rows, len(wanted) - len(done)


def _run_facts(outcome: Outcome) -> dict[str, Any]:
    return {
        "settings": list(outcome.settings),
        "notes": outcome.notes,
        "seconds": round(outcome.seconds, 2),
        "peak_mb": round(outcome.peak_mb, 1),
    }


def say(*lines: object) -> None:
    """Tell what goes on, apart from the tables on stdout."""
    print(*lines, sep="\n    ", file=sys.stderr, flush=True)
