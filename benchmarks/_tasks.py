"""One method on one data set: the task comes in, the process that does it is measured, embedding files go out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _machine import ROOT, busy_seconds, circumstances, threads

HERE = ROOT / "benchmarks"
_TAIL = 25


class TaskFailed(RuntimeError):
    """A process ended with an error; the message has the end of its log."""


@dataclass(frozen=True)
class Task:
    """A method to run: on which file, with which batches, seed and settings (``key=value``, for schelix alone).

    The labels are for methods that are told some of them (see `_prepare.partial_labels`).
    """

    data: str
    batch_key: str
    method: str
    seed: int = 0
    settings: tuple[str, ...] = ()
    label_key: str = "cell_type"


@dataclass(frozen=True)
class Outcome:
    """What a method made and what it cost: embedding files by row name, notes, wall seconds, peak memory in MB.

    ``conditions`` says what it ran on and with: commit, machine, library versions, date, ``threads`` of numeric
    libraries, ``nice``, and ``others``, the cores (as a mean) that other processes kept busy meanwhile, None where the
    system does not tell. ``kept``: read from the cache.
    """

    settings: tuple[str, ...]
    embeddings: dict[str, str]
    notes: list[str]
    seconds: float
    peak_mb: float
    conditions: dict[str, Any]
    kept: bool = False


def run_task(task: Task, scratch: Path) -> Outcome:
    """Run a method in a process of its own; its seconds and memory are those of the whole process.

    Raises
    ------
    TaskFailed
        The method raised, or its process was killed.
    """
    scratch.mkdir(parents=True)
    busy = busy_seconds()
    answer, seconds, peak_mb, own = _call_worker(task, scratch)
    now = busy_seconds()
    others = None if busy is None or now is None else round(max(0.0, now - busy - own) / seconds, 2)
    conditions = {**circumstances(), "threads": threads(), "nice": os.nice(0), "others": others}
    return Outcome(task.settings, answer["embeddings"], answer["notes"], seconds, peak_mb, conditions)


def _call_worker(task: Task, scratch: Path) -> tuple[dict[str, Any], float, float, float]:
    """Start ``_worker.py``, wait, and return its answer, wall seconds, peak resident memory in MB and CPU seconds.

    The peak is that of the process or of the largest one it waited for. This process must stay small itself: the
    kernel counts its size at the time of the start as the child's (so nothing heavy is imported here).
    """
    (scratch / "task.json").write_text(json.dumps(asdict(task)), encoding="utf-8")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # measure this checkout
    log_path = scratch / "log.txt"
    started = time.perf_counter()
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "_worker.py"), str(scratch)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise TaskFailed(_complaint(task, process.returncode, log_path.read_text(errors="replace").splitlines()))
    unit = 1 if sys.platform == "darwin" else 1024  # macOS says bytes, Linux KiB
    answer = json.loads((scratch / "answer.json").read_text(encoding="utf-8"))
    return answer, seconds, usage.ru_maxrss * unit / 1e6, usage.ru_utime + usage.ru_stime


def _complaint(task: Task, code: int, log: Sequence[str]) -> str:
    what = f"{task.method}, seed {task.seed}, on {task.data}"
    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    hint = " (signal 9 is often the system short of memory)" if code == -9 else ""
    return "\n".join([f"{what} {how}{hint}. The end of its log:", *(f"    {line}" for line in log[-_TAIL:])])
