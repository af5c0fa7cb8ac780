"""The ranks of a training: who this process is, and what ranks tell each other. Nothing else reads the environment.

Without torchrun there is one rank, for which everything here does nothing. Every method is called by all ranks, in the
same order.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from schelix_scale.errors import ConfigError, RankLost, SchelixError

ALONE_AT_WORK = timedelta(hours=12)  # of waiting for a rank that works alone, as on a new graph; its end is noticed
SAME_ERROR = timedelta(seconds=10)  # of waiting whether the main rank ends by an error as well, and so says it
IN_STEP = timedelta(minutes=30)  # the same in a step, where all do the same; NCCL does not notice that a rank has ended

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which process it is among those that train together.

    Attributes
    ----------
    rank, world
        Number of this process, and of how many.
    local_rank, local_world
        The same on this machine.
    talk
        The process group by which ranks agree, gloo also where they compute on GPUs; None: the only one.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    talk: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the rank that decides, writes and speaks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self.world == 1

    def threads(self, threads: int) -> int:
        """Return this rank's share of the threads of its machine."""
        return max(1, threads // self.local_world)

    def device(self, name: str) -> torch.device:
        """Return the device of this rank, a GPU with its number; of several GPUs each local rank takes one.

        Raises
        ------
        ConfigError
            One GPU was named for several ranks, there are fewer GPUs than ranks here, or ranks cannot use the device.
        """
        device = torch.device(name)
        if device.type not in ("cpu", "cuda") and not self.alone:
            raise ConfigError(f"device={name}: {self.world} ranks train on CPUs or on CUDA GPUs. Use device=cpu.")
        if device.type != "cuda":
            return device
        if self.local_world == 1:  # torch takes no device without its number where it is to be the current one
            return torch.device("cuda", device.index or 0)
        if device.index is not None:
            raise ConfigError(f"device={name}: {self.local_world} ranks need a GPU each. Use device=cuda.")
        if self.local_world > torch.cuda.device_count():
            raise ConfigError(
                f"{self.local_world} ranks need a GPU each, and there are {torch.cuda.device_count()} here. Start "
                "fewer (--nproc, --nproc-per-node), or use device=cpu."
            )
        return torch.device("cuda", self.local_rank)

    def share(self, n: int) -> slice:
        """Return which of n things are this rank's: equal shares but for one, in the order of ranks."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def agree(self, value: T) -> T:
        """Return what the main rank says."""
        if self.alone:
            return value
        said: list[Any] = [value]
        with self.together():
            distributed.broadcast_object_list(said, src=0, group=self.talk, device=torch.device("cpu"))
        agreed: T = said[0]
        return agreed

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over ranks of a tensor, without gradient."""
        if self.alone:
            return value
        total = value.detach().clone()
        with self.together():
            distributed.all_reduce(total)
        return total / self.world

    def gather(self, rows: Tensor, total: int) -> Tensor:
        """Put the shares (m, ...) of all ranks below each other, (total, ...); gradients come back to each share."""
        if self.alone:
            return rows
        gathered: Tensor = _Gather.apply(rows, self, total)  # type: ignore[no-untyped-call]
        return gathered

    def averaged(self, module: torch.nn.Module) -> torch.nn.Module:
        """Return a module with the same weights on all ranks, whose gradients are averaged over them."""
        with self.together(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # its heir is newer
            return DistributedDataParallel(
                module, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
            )

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.agree(None)

    def left_to_main(self) -> RankLost:
        """Wait until the main rank has said why all stop, and has ended; return what the others raise then.

        Were they the first to end, torchrun would end the main rank before it has said it.
        """
        try:
            self.wait()
        except RankLost as lost:
            return lost
        return RankLost()

    def left_alone(self) -> bool:
        """Whether the main rank has ended, as it does after the same error; waits a few seconds for that."""
        try:
            word = distributed.broadcast(torch.empty(1, dtype=torch.int64), 0, self.talk, async_op=True)
            word.wait(SAME_ERROR)
        except RuntimeError as error:
            return _is_lost(error) and "imed out" not in str(error)
        return False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Turn the error of a rank that has gone away into a `RankLost`; only the main rank has words for it."""
        try:
            yield
        except RuntimeError as error:
            if self.alone or not _is_lost(error):
                raise
            message = (
                f"one of {self.world} ranks has ended, so that the others cannot go on. "
                "Run the same command again: it goes on from the last checkpoint."
            )
            raise RankLost(message if self.main else "") from error


ALONE = Ranks()


def _is_lost(error: RuntimeError) -> bool:
    """Whether an error is that of a connection, and not one of computing."""
    if isinstance(error, distributed.DistError):
        return True
    text = str(error)
    return any(sign in text for sign in ("Connection", "connection", "gloo", "NCCL", "Broken pipe", "Socket"))


class _Gather(torch.autograd.Function):
    """All shares on all ranks; their gradients, summed over ranks, at the share that they are of."""

    @staticmethod
    def forward(context: Any, rows: Tensor, ranks: Ranks, total: int) -> Tensor:
        context.ranks, context.total = ranks, total
        largest = -(-total // ranks.world)
        padded = rows.new_zeros((largest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(ranks.world)]
        with ranks.together():
            distributed.all_gather(parts, padded)
        sizes = [total * (rank + 1) // ranks.world - total * rank // ranks.world for rank in range(ranks.world)]
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ranks, whole = context.ranks, gradient.contiguous()
        with ranks.together():
            distributed.all_reduce(whole)
        return whole[ranks.share(context.total)], None, None


@contextmanager
def joined(device: str, deterministic: bool = False) -> Iterator[Ranks]:
    """Join the ranks that torchrun has started, as long as the context lasts; alone without torchrun.

    Gradients go by NCCL where the ranks compute on GPUs, by gloo elsewhere; what ranks agree on always goes by gloo.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    ranks = Ranks(*(int(os.environ.get(name, default)) for name, default in _ENVIRONMENT))
    if ranks.alone:
        yield ranks
        return
    here, first = ranks.device(device), not distributed.is_initialized()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    with ranks.together():
        if first and here.type == "cuda":
            distributed.init_process_group("nccl", timeout=IN_STEP, device_id=here)
        elif first:
            distributed.init_process_group("gloo", timeout=IN_STEP)
        talk = distributed.new_group(backend="gloo", timeout=ALONE_AT_WORK)
    try:
        yield replace(ranks, talk=talk)
    except KeyboardInterrupt as interrupt:  # Ctrl-C reaches all ranks: the main one says it
        if ranks.main:
            raise
        raise RankLost from interrupt
    except SchelixError as error:  # all ranks may have found it: the main one says it
        if ranks.main or isinstance(error, RankLost) or not replace(ranks, talk=talk).left_alone():
            raise
        raise RankLost from error
    distributed.destroy_process_group(None if first else talk)  # not after an error: ranks that wait would hang


_ENVIRONMENT = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))


def follows() -> bool:
    """Whether torchrun has started this process as another rank than the main one."""
    return os.environ.get("RANK", "0") != "0"


def end_at_once(code: int) -> None:
    """End this process, one of several ranks, with what it has said written.

    Threads of gloo may still hold what they worked on, or wait for other ranks: left to the interpreter's end they
    abort the process now and then, also one that has done all it should.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
