"""Starts the ranks of a training on this machine, as torchrun does, and again after one of them was killed."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from schelix_scale.errors import ConfigError, TrainingError
from schelix_scale.progress import Reporter

RESTARTS = 3
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # by torch, while ranks work


def launch(nproc: int, arguments: Sequence[str], reporter: Reporter) -> None:
    """Run ``python -m schelix_scale ARGUMENTS`` in ``nproc`` processes that find each other, until all have ended.

    If one is killed (and not: has failed), all are started again, at most three times; they go on from the last
    checkpoint. For several machines, call torchrun on each.

    Raises
    ------
    TrainingError
        A rank has failed, after it has said why; or ranks were killed again and again.
    ConfigError
        Fewer than one process.
    KeyboardInterrupt
        Ctrl-C; all ranks have ended.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if nproc < 1:
        raise ConfigError(f"nproc = {nproc}: at least one process is needed.")
    command = ["-m", "schelix_scale", *arguments]
    for attempt in range(RESTARTS + 1):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=f"schelix-{attempt}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            **_heard(),
        )
        try:
            with _signals_as_ever():
                elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            killed = {rank: -failure.exitcode for rank, failure in error.failures.items() if failure.exitcode < 0}
            killed = {rank: number for rank, number in killed.items() if number != signal.SIGTERM}
            if all(failure.exitcode == -signal.SIGTERM for failure in error.failures.values()):
                raise TrainingError(
                    f"ranks of {nproc} were ended by SIGTERM. Run the same command again: it goes on from the last "
                    "checkpoint."
                ) from error
            if not killed:
                raise TrainingError(f"a rank of {nproc} has failed; what it said stands above.") from error
            said = ", ".join(
                f"rank {rank} was ended by {signal.Signals(number).name}" for rank, number in killed.items()
            )
            if attempt == RESTARTS:
                raise TrainingError(
                    f"{said}, and so {RESTARTS} times before. If memory ran out, start fewer ranks. What was trained "
                    "until the last checkpoint is kept."
                ) from error
            reporter.warn(f"{said}; all ranks are started again and go on from the last checkpoint")
        else:
            return


def _heard() -> dict[str, Any]:
    """Let torch leave hangups alone if this process ignores them, as after nohup; older versions of it cannot."""
    from torch.distributed.launcher.api import LaunchConfig

    known = {field.name for field in fields(LaunchConfig)}
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    heard = [number.name for number in HANDLED if number not in ignored]
    return {"signals_to_handle": ",".join(heard)} if "signals_to_handle" in known else {}


@contextmanager
def _signals_as_ever() -> Iterator[None]:
    """Let signals end this process as they would without ranks, which torch has ended then; put back its handlers.

    For torch sets handlers of its own, also for what comes after it, and raises an exception of its own in them.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    here = threading.current_thread() is threading.main_thread()  # no other thread can set any, nor does torch
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (HANDLED if here else ())}
    try:
        yield
    except SignalException as asked:
        _put_back(before)
        if asked.sigval == signal.SIGINT:
            raise KeyboardInterrupt from asked
        signal.raise_signal(asked.sigval)
        raise TrainingError(f"the ranks were ended, as {asked.sigval.name} asked.") from asked  # if a handler returns
    finally:
        _put_back(before)


def _put_back(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)
