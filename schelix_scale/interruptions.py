"""Ctrl-C -> KeyboardInterrupt, again at the next sign of progress if other code has swallowed the first.

Python raises it wherever the main thread happens to be: in a finaliser, a callback of a compiled library or an import
within a bare ``except`` it is lost, and a run of hours would go on as if nobody had asked it to stop.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()  # a signal is one of the process, and so is this


@contextmanager
def listening() -> Iterator[None]:
    """Remember interruptions while the context lasts; where Python does not raise any, nothing is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # as after nohup, or a handler of the user's
        yield
        return
    signal.signal(signal.SIGINT, _ask)
    try:
        yield
    finally:
        _asked.clear()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def heed() -> None:
    """Raise the interruption that was asked for and came to nothing.

    Raises
    ------
    KeyboardInterrupt
        In the main thread, once for all that were asked for.
    """
    if _asked.is_set() and threading.current_thread() is threading.main_thread():
        _asked.clear()
        raise KeyboardInterrupt


def _ask(number: int, frame: FrameType | None) -> None:
    _asked.set()
    signal.default_int_handler(number, frame)
