"""Tasks -> done, as Dask tasks on threads of this process or on the workers of a dask.distributed cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from schelix_scale._version import __version__
from schelix_scale.compute import short_turns
from schelix_scale.errors import ConfigError, RunError

T = TypeVar("T")

CONNECT_SECONDS = 10
PATIENCE_SECONDS = 60  # without any worker
AGAIN = "Run the same command again: finished stages are kept."
AHEAD = 4  # tasks submitted for each thread of the cluster


def run_tasks(
    task: Callable[[T], int],
    parts: Sequence[T],
    workers: int,
    scheduler: str | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Call ``task`` with every part, in any order, and ``advance`` with what each call returns.

    Parameters
    ----------
    task
        For a cluster: picklable, the same however often it is called with a part (Dask repeats the tasks of a worker
        that was lost), and small, since it travels with every part.
    workers
        Threads, without a cluster.
    scheduler
        Address of a dask.distributed scheduler, such as ``tcp://10.0.0.1:8786``; threads of this process if None.

    Raises
    ------
    ConfigError
        The cluster cannot be reached, has no workers, or they have no schelix_scale, or another version of it.
    RunError
        The cluster was lost, or workers died over the same task.
    Exception
        What a task raised, as it was.
    """
    if scheduler is None:
        from dask.base import compute
        from dask.delayed import delayed

        def call(part: T) -> None:
            advance(task(part))

        with short_turns():
            compute(*[delayed(call, pure=False)(part) for part in parts], scheduler="threads", num_workers=workers)
        return
    with connected(scheduler) as client:
        _run_on(client, scheduler, task, parts, advance)


@contextmanager
def connected(scheduler: str) -> Iterator[Any]:
    """Connect to a cluster whose workers run this version; yield its `distributed.Client`, the current one meanwhile.

    Raises
    ------
    ConfigError
        See `run_tasks`.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ConfigError(
            f"scheduler={scheduler} needs dask.distributed. Install it: pip install 'schelix-scale[cluster]'."
        ) from error
    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"scheduler={scheduler}: no dask.distributed scheduler answers there ({error}). Start one "
            "(dask scheduler, dask worker ADDRESS) or correct the address; without it, threads of this machine compute."
        ) from error
    with client, client.as_current():
        _check_workers(client, scheduler)
        yield client


def worker_version() -> str:
    """Return the version of this package; called on workers."""
    return __version__


def _check_workers(client: Any, scheduler: str) -> None:
    remedy = f"Install schelix-scale {__version__} in the environment of all workers."
    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError as error:
        raise ConfigError(
            f"scheduler={scheduler}: no workers came within {CONNECT_SECONDS} seconds. Start some: "
            f"dask worker {scheduler}."
        ) from error
    try:
        versions: dict[str, str] = client.run(worker_version)
    except Exception as error:
        raise ConfigError(f"scheduler={scheduler}: the workers cannot run schelix_scale ({error}). {remedy}") from error
    others = {worker: version for worker, version in versions.items() if version != __version__}
    if others:
        worker, version = next(iter(others.items()))
        raise ConfigError(
            f"scheduler={scheduler}: {len(others)} of {len(versions)} workers have another version of schelix_scale "
            f"({worker}: {version}, here: {__version__}). {remedy}"
        )


def _run_on(
    client: Any, scheduler: str, task: Callable[[T], int], parts: Sequence[T], advance: Callable[[int], None]
) -> None:
    """Keep every thread of the cluster busy, with a few tasks in advance, until all parts are done."""
    from distributed import CancelledError, wait

    left, waited = iter(parts), 0
    running: set[Any] = set()
    try:
        while True:
            room = max(AHEAD * max(_threads(client, scheduler), 1) - len(running), 0)
            running |= {client.submit(task, part, pure=False) for part in islice(left, room)}
            if not running:
                return
            try:
                done, running = wait(running, timeout=CONNECT_SECONDS, return_when="FIRST_COMPLETED")
            except TimeoutError:
                waited = 0 if _threads(client, scheduler) else waited + CONNECT_SECONDS
                if waited >= PATIENCE_SECONDS:
                    raise RunError(f"scheduler={scheduler}: all workers are gone. Start some. {AGAIN}") from None
                continue
            except CancelledError as error:
                raise _lost(scheduler) from error
            for future in done:
                advance(_result(future, scheduler))
    finally:
        for future in running:
            future.cancel()


def _threads(client: Any, scheduler: str) -> int:
    """Return how many threads the cluster has now; 0 when all workers are gone."""
    try:
        return sum(client.nthreads().values())
    except OSError as error:
        raise _lost(scheduler) from error


def _lost(scheduler: str) -> RunError:
    return RunError(f"scheduler={scheduler}: the connection to the cluster was lost. {AGAIN}")


def _result(future: Any, scheduler: str) -> int:
    from distributed import CancelledError, KilledWorker

    try:
        return int(future.result())
    except KilledWorker as error:
        raise RunError(
            f"scheduler={scheduler}: several workers died over the same task, most likely for lack of memory. Lower "
            f"max_memory, or start workers with fewer threads: a machine of them needs max_memory if it has as many as "
            f"the setting threads says, and more if it has more. {AGAIN}"
        ) from error
    except CancelledError as error:
        raise _lost(scheduler) from error
