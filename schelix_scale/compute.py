"""Settings -> the threads and the device that a run computes with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from schelix_scale.config import Config
from schelix_scale.errors import ConfigError


def share_cores() -> None:
    """Let idle OpenMP threads sleep instead of spin, unless the environment says otherwise.

    Small steps on all cores are 20 times slower than on one core if another process uses a core and idle
    threads spin for it. Only works before torch and scikit-learn are loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def thread_count(config: Config) -> int:
    """Threads of the run: the setting, or the CPUs that this process may use."""
    if config.threads is not None:
        return config.threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """Hold the numeric libraries to ``threads`` threads, and put back what was set before."""
    import numba
    import torch
    from threadpoolctl import threadpool_limits

    before, numba_before = torch.get_num_threads(), numba.get_num_threads()
    numba.set_num_threads(min(threads, numba_before))  # before the others: numba resets OpenMP when it starts
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        numba.set_num_threads(numba_before)
        torch.set_num_threads(before)


def resolve_device(name: str) -> str:
    """Return the torch device that ``device=auto`` stands for, or the asked one if it is there.

    Raises
    ------
    ConfigError
        The asked device is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"device={name}: torch sees {torch.cuda.device_count()} CUDA devices. Use device=cpu or auto."
            )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device=mps: torch cannot use Metal here. Use device=cpu or auto.")
    return name
