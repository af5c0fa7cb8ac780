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
PSS_SHARE = 0.01  # of the time: the kernel walks all pages of a process for it, milliseconds a GB


class CommandFailed(RuntimeError):
    """A command ended with an error; the message has the end of its log."""


@dataclass(frozen=True)
class Watched:
    """What a command took.

    Attributes
    ----------
    seconds
        Wall time.
    peak
        Largest sum of the resident memory (RSS) of the processes of its tree, bytes. Files mapped by them are
        included, and a page that several of them hold counts once for each.
    times, sizes
        Seconds since 1970 and the sum of RSS then.
    pss_peak
        Largest sum of proportional memory (PSS), bytes: a page counts once, divided among all processes that hold it.
        None where the system does not tell it. Sampled less often than RSS, so that it takes 1 % of the time at most.
    """

    seconds: float
    peak: int
    times: list[float]
    sizes: list[int]
    pss_peak: int | None = None

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
    times, sizes, shares = [], [], Shares()
    started = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        try:
            tree = psutil.Process(process.pid)
            while process.poll() is None:
                members = _members(tree)
                times.append(time.time())
                sizes.append(sum(map(_resident, members)))
                shares.sample(members, sizes[-1])
                time.sleep(INTERVAL)
        except BaseException:
            process.kill()
            raise
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise CommandFailed(f"{' '.join(command)} ended with status {process.returncode}:\n{tail}")
    return Watched(seconds, max(sizes, default=0), times, sizes, shares.peak)


class Shares:
    """The peak of the summed PSS; ``peak`` is None until a sum could be read."""

    def __init__(self) -> None:
        self.peak: int | None = None
        self._due = 0.0

    def sample(self, members: Sequence[psutil.Process], resident: int) -> None:
        """Read the PSS of the processes, unless a sum of RSS of ``resident`` bytes rules out a new peak."""
        started = time.perf_counter()
        if resident <= (self.peak or 0) or started < self._due:
            return
        found = [_proportional(member.pid) for member in members]
        if found and all(found):  # not if a process ended meanwhile, or may not be looked at
            self.peak = max(self.peak or 0, sum(size or 0 for size in found))
        stopped = time.perf_counter()
        self._due = stopped + (stopped - started) / PSS_SHARE


def _members(tree: psutil.Process) -> list[psutil.Process]:
    try:
        return [tree, *tree.children(recursive=True)]
    except psutil.Error:
        return []


def _resident(member: psutil.Process) -> int:
    try:
        return int(member.memory_info().rss)
    except psutil.Error:
        return 0


def _proportional(pid: int) -> int | None:
    """Return the PSS of a process in bytes, None if it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), None)


def python(*arguments: str) -> list[str]:
    """Return the command that runs this Python with ``arguments``."""
    return [sys.executable, *arguments]
