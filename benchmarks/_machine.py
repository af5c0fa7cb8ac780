"""What a figure was measured with: commit, machine, libraries and date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from _tasks import ROOT

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
)
_CODE = (".", ":(exclude)*.md", ":(exclude)benchmarks/results")


def circumstances() -> dict[str, Any]:
    """Return commit, whether the code differs from it, machine, library versions and date (UTC)."""
    changed = _git("status", "--porcelain", "--", *_CODE)
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changed is None else changed != "",
        "machine": machine(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name)) is not None},
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


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Return what git says about the checkout; None where this is not one, or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
