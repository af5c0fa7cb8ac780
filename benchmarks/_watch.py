"""A command -> how long it took and how much memory its whole process tree held, sampled while it ran."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL = 0.1


class CommandFailed(RuntimeError):
    """A command ended with an error; the message has the end of its log."""


@dataclass(frozen=True)
class Watched:
    """Wall seconds; peak of the tree's resident memory in bytes (files mapped by it included); samples of both.

    ``times`` are seconds since 1970.
    """

    seconds: float
    peak: int
    times: list[float]
    sizes: list[int]

    def peak_between(self, start: float, stop: float) -> int:
        """Return the largest sample in a window of time, 0 if there is none."""
        inside = [size for t, size in zip(self.times, self.sizes, strict=True) if start <= t <= stop]
        return max(inside, default=0)


def watch(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Watched:
    """Run ``command`` to its end, with its output in ``log``.

    Raises
    ------
    CommandFailed
        Its exit status is not 0.
    """
    times, sizes = [], []
    started = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        try:
            tree = psutil.Process(process.pid)
            while process.poll() is None:
                times.append(time.time())
                sizes.append(_resident(tree))
                time.sleep(INTERVAL)
        except BaseException:
            process.kill()
            raise
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise CommandFailed(f"{' '.join(command)} ended with status {process.returncode}:\n{tail}")
    return Watched(seconds, max(sizes, default=0), times, sizes)


def _resident(tree: psutil.Process) -> int:
    total = 0
    try:
        members = [tree, *tree.children(recursive=True)]
    except psutil.Error:
        return 0
    for member in members:
        try:
            total += member.memory_info().rss
        except psutil.Error:
            continue
    return total


def python(*arguments: str) -> list[str]:
    """Return the command that runs this Python with ``arguments``."""
    return [sys.executable, *arguments]
