"""Starts the ranks of a training on this machine, as torchrun does, and again after one of them was killed."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from schelix_scale.errors import ConfigError, TrainingError
from schelix_scale.progress import Reporter

RESTARTS = 3


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
        )
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            killed = {rank: -failure.exitcode for rank, failure in error.failures.items() if failure.exitcode < 0}
            killed = {rank: number for rank, number in killed.items() if number != signal.SIGTERM}
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
