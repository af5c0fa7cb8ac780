"""Settings -> the threads and the device that a run computes with."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from schelix_scale.config import Config
from schelix_scale.errors import ConfigError

MMAP_BYTES, ARENAS = 4 << 20, 2
REUSED_MMAP_BYTES = 32 << 20  # above what is made again and again: mapping it each time is slow
TRIM_BYTES, REUSED_TRIM_BYTES = 128 << 10, 1 << 30  # free at the end of the heap, from which on it is given back


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
    _set_mmap_bytes(MMAP_BYTES)
    if "MALLOC_ARENA_MAX" not in os.environ:
        _glibc("mallopt", -8, ARENAS)


def release_memory() -> None:
    """Give memory that was freed back to the system, where glibc would keep it for later."""
    gc.collect()
    _glibc("malloc_trim", 0)


def _set_mmap_bytes(size: int) -> None:
    """Let blocks of this size and larger be mapped from the system one by one."""
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        _glibc("mallopt", -3, size)


def _set_trim_bytes(size: int) -> None:
    """Give free memory at the end of the heap back to the system from this size on; 128 kB is glibc's default."""
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        _glibc("mallopt", -1, size)


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
    from threadpoolctl import threadpool_limits

    before = numba.get_num_threads()
    numba.set_num_threads(min(threads, before))  # before the others: numba resets OpenMP when it starts
    try:
        with threadpool_limits(threads):
            yield
    finally:
        numba.set_num_threads(before)


class _Reuse:
    """How many contexts ask for memory to be used again."""

    def __init__(self) -> None:
        self.depth, self.lock = 0, threading.Lock()


_reuse = _Reuse()


@contextmanager
def reused_memory() -> Iterator[None]:
    """Let memory of one step or block be used again in the next, instead of `keep_memory_low`; give it back at the end.

    Given back after each, and mapped anew, page by page, in the next, it would take a third of the time of Align, and
    a fifth of that of a mapping or a search of neighbours. These contexts may be in each other, or in several threads.
    """
    with _reuse.lock:
        _reuse.depth += 1
        if _reuse.depth == 1:
            _set_mmap_bytes(REUSED_MMAP_BYTES)
            _set_trim_bytes(REUSED_TRIM_BYTES)
    try:
        yield
    finally:
        with _reuse.lock:
            _reuse.depth -= 1
            last = not _reuse.depth
            if last:
                _set_mmap_bytes(MMAP_BYTES)
                _set_trim_bytes(TRIM_BYTES)
        if last:
            release_memory()


@contextmanager
def torch_at_work(threads: int) -> Iterator[None]:
    """Hold torch to ``threads`` threads, and let it use the memory of one step again in the next.

    Torch takes 180 MB, so it is not loaded before it is needed.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with reused_memory():
            yield
    finally:
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
