"""What made a run: versions, platform and threads, for its manifest."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from schelix_scale._version import __version__

LIBRARIES = (
    "numpy",
    "scipy",
    "pandas",
    "torch",
    "scikit-learn",
    "scanpy",
    "harmonypy",
    "pynndescent",
    "anndata",
    "zarr",
)


def provenance(threads: int | None) -> dict[str, Any]:
    """Return the versions and the machine; ``threads`` None means all cores that this process may use."""
    return {
        "schelix_version": __version__,
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "threads": threads or available_cores(),
    }


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
