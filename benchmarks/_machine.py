"""What a figure was measured with: commit, machine, libraries and date."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = (
    "numpy",
    "scipy",
    "scikit-learn",
    "pandas",
    "anndata",
    "scanpy",
    "torch",
    "harmonypy",
    "pynndescent",
    "jax",
    "scib-metrics",
    "scanorama",
    "scvi-tools",
    "lightning",
    "concord-sc",
)
ROOT = Path(__file__).resolve().parents[1]
_CODE = (".", ":(exclude)*.md", ":(exclude)benchmarks/results")


def circumstances() -> dict[str, Any]:
    """Return commit, whether the code differs from it, machine, library versions and date (UTC)."""
    changed = _git("status", "--porcelain", "--", *_CODE)
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changed is None else changed != "",
        "machine": machine(),
        "versions": versions_of(LIBRARIES),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def machine() -> dict[str, Any]:
    """Return CPU model, cores this process may use, RAM in GB, Python and platform."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return {
        "cpu": _cpu(),
        "cores": cores,
        "ram_gb": round(ram, 1),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions_of(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def threads() -> int:
    """Return how many threads numeric libraries of a process started now would use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    cores = int(machine()["cores"] or 1)
    return min(int(given), cores) if given.isdigit() and int(given) > 0 else cores


def peak_mb() -> float:
    """Return the most memory (MB, resident) that this process has held since its program started.

    What `os.wait4` tells of a child is never below what its parent held when it was started; Linux knows better.
    """
    status = Path("/proc/self/status")
    if status.exists():
        kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kilobytes) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def busy_seconds() -> float | None:
    """Return how long cores of this machine have been at work since it started, summed; None where that is not told."""
    try:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq = map(int, fields[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _git(*arguments: str) -> str | None:
    """Return what git says about the checkout; None where this is not one, or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
