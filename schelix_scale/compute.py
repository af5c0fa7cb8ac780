"""Settings -> the threads and the device that a run computes with."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from schelix_scale.config import Config
from schelix_scale.errors import ConfigError

MMAP_BYTES, ARENAS = 4 << 20, 2
REUSED_MMAP_BYTES = 32 << 20  # above what is made again and again: mapping it each time is slow
TURN_SECONDS = 1e-4
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


class _Shared:
    """A state of the process that lasts while any context is open, in each other or in several threads."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._begin, self._end = begin, end
        self._depth, self._lock = 0, threading.RLock()  # what ends it may collect garbage that ends another context

    @contextmanager
    def held(self) -> Iterator[None]:
        """Begin it with the first context, and end it with the last."""
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._begin()
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if not self._depth:
                    self._end()


def _set_heap(mmap_bytes: int, trim_bytes: int) -> None:
    _set_mmap_bytes(mmap_bytes)
    _set_trim_bytes(trim_bytes)


def _give_back() -> None:
    _set_heap(MMAP_BYTES, TRIM_BYTES)
    release_memory()


_reuse = _Shared(lambda: _set_heap(REUSED_MMAP_BYTES, REUSED_TRIM_BYTES), _give_back)


def reused_memory() -> AbstractContextManager[None]:
    """Let memory of one step or block be used again in the next, instead of `keep_memory_low`; give it back at the end.

    Given back after each, and mapped anew, page by page, in the next, it would take a third of the time of Align, and
    a fifth of that of a mapping or a search of neighbours. These contexts may be in each other, or in several threads.
    """
    return _reuse.held()


class _Turns:
    """How long a thread holds the interpreter's lock while another one waits for it, seconds."""

    usual = 0.005

    @classmethod
    def shorten(cls) -> None:
        cls.usual = sys.getswitchinterval()
        sys.setswitchinterval(min(cls.usual, TURN_SECONDS))

    @classmethod
    def restore(cls) -> None:
        sys.setswitchinterval(cls.usual)


_turns = _Shared(_Turns.shorten, _Turns.restore)


def short_turns() -> AbstractContextManager[None]:
    """Let a thread that waits for the interpreter's lock have it within a tenth of a millisecond.

    Python lets it wait for 5 ms, in which others compute a list of neighbours or a step of training: of two threads
    that search neighbours, one stood still for a sixth of the time. These contexts may be in each other, or in several
    threads.
    """
    return _turns.held()


@contextmanager
def torch_at_work(threads: int) -> Iterator[None]:
    """Hold torch to ``threads`` threads, let it use the memory of one step again in the next, and take `short_turns`.

    Torch takes 180 MB, so it is not loaded before it is needed.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with reused_memory(), short_turns():
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
