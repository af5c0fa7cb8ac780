"""A task of `_graph_tasks` -> its answer and what it cost: seconds, memory of its tree, how busy others were."""

from __future__ import annotations

import json
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from _machine import busy_seconds
from _tasks import HERE, ROOT
from _watch import INTERVAL, python, watch

_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def run_task(name: str, task: dict[str, Any], out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a task in a process of its own, whose numeric libraries may take ``task["threads"]`` threads.

    Returns
    -------
    answer
        What the task left in ``out``, a directory that is made.
    cost
        Seconds of the whole process, CPU seconds, ``peak_bytes`` and ``peak_pss_bytes`` (RSS and PSS of its tree,
        mapped files included: see `_watch`), ``own_bytes`` (RSS without files: what the system cannot take back),
        ``others`` (the mean number of cores that other processes kept busy; None where the system does not tell),
        seconds of the parts.
    """
    out.mkdir(parents=True)
    env = {**dict.fromkeys(_LIMITS, str(task["threads"])), "PYTHONPATH": str(ROOT)}
    command = python(str(HERE / "_graph_tasks.py"), name, json.dumps(task), str(out))
    busy, cpu = busy_seconds(), _cpu_of_children()
    with own_memory() as own:
        seen = watch(command, out / "log.txt", env)
    used, now = _cpu_of_children() - cpu, busy_seconds()
    others = None if busy is None or now is None else round(max(0.0, now - busy - used) / seen.seconds, 2)
    answer = json.loads((out / "answer.json").read_text(encoding="utf-8"))
    cost = {"seconds": round(seen.seconds, 1), "cpu_seconds": round(used, 1), "peak_bytes": seen.peak}
    cost |= {"peak_pss_bytes": seen.pss_peak, "own_bytes": max(own, default=0)}
    return answer, {**cost, "others": others, "parts": answer.pop("parts")}


@contextmanager
def own_memory() -> Iterator[list[int]]:
    """Sample what descendants of this process that start from now on hold in memory that is no file's, in bytes."""
    samples: list[int] = []
    over, before = threading.Event(), set(psutil.Process().children(recursive=True))

    def sample() -> None:
        while not over.wait(INTERVAL):
            samples.append(sum(_own(one) for one in psutil.Process().children(recursive=True) if one not in before))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def _own(process: psutil.Process) -> int:
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0
    return int(memory.rss - getattr(memory, "shared", 0))


def _cpu_of_children() -> float:
    """Return the CPU seconds of all children that ended, and theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
