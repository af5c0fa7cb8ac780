"""One thread for each task: what holds the numeric libraries to it while tasks are at work, from whichever thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

_holder = threading.RLock()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Hold the numeric libraries to one thread.

    Their limit is one of the whole process, and is changed by one thread at a time: the one that set it puts back what
    was before. Threads that come meanwhile leave it alone; when the other one has gone before them, their products of
    matrices may use more threads, which makes them slower at the worst, and their results are the same up to rounding.
    """
    if not _holder.acquire(blocking=False):
        yield
        return
    try:
        with threadpool_limits(1):
            yield
    finally:
        _holder.release()
