"""Settings -> the threads and the device that a run computes with."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from schelix_scale.config import Config
from schelix_scale.errors import ConfigError

MMAP_BYTES, ARENAS = 2 << 20, 2


def share_cores() -> None:
    """Let idle OpenMP threads sleep instead of spin, unless the environment says otherwise.

    Small steps on all cores are 20 times slower than on one core if another process uses a core and idle
    threads spin for it. Only works before torch and scikit-learn are loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def keep_memory_low() -> None:
    """Let glibc give large blocks back as soon as they are freed, and let threads share two pools of small ones.

    By default it learns to keep ever larger blocks, in a pool for each thread: a run of 200,000 cells held 200 MB more.
    Environment variables of glibc (``MALLOC_*``) win. Nothing is done where there is another C library.
    """
    for option, number, value in (("MMAP_THRESHOLD_", -3, MMAP_BYTES), ("ARENA_MAX", -8, ARENAS)):
        if f"MALLOC_{option}" not in os.environ:
            _glibc("mallopt", number, value)


def release_memory() -> None:
    """Give memory that was freed back to the system, where glibc would keep it for later."""
    gc.collect()
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    """Call a function of glibc, if that is the C library here."""
    if sys.platform == "linux":
        call = getattr(ctypes.CDLL(None), function, None)
        if call is not None:
            call(*arguments)


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
