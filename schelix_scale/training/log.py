"""What a training tells while it goes on: ``checkpoints/metrics.jsonl``, and event files for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schelix_scale.errors import ConfigError
from schelix_scale.publish import disk_errors, publish, remove

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS, EVENTS = "metrics.jsonl", "tensorboard"


class TrainingLog:
    """The log of a training; only the main rank has one that writes.

    Parameters
    ----------
    folder
        Where ``metrics.jsonl`` goes, one JSON object a line: phase, event (train, evaluate, end), step and numbers.
    phases
        Names of the phases, in order.
    writes
        Whether this rank writes.
    tensorboard
        Whether event files are written as well.
    """

    def __init__(self, folder: Path, phases: Sequence[str], writes: bool = True, tensorboard: bool = False) -> None:
        self.path, self.phases, self.writes = folder / METRICS, list(phases), writes
        self.folder, self.tensorboard = folder / EVENTS, tensorboard and writes
        self._events: SummaryWriter | None = None

    def resume(self, phase: int, step: int) -> None:
        """Forget what was logged after a checkpoint from which training goes on: it is done again.

        Event files cannot be cut: they are made anew from the lines that are kept.
        """
        if not self.writes:
            return
        kept: list[str] = []
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if self._is_before(line, phase, step)]
            with publish(self.path) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        if self.tensorboard:
            remove(self.folder)
            self._events = event_writer()(str(self.folder))
            for line in kept:
                entry = json.loads(line)
                del entry["event"]
                self._tell(entry.pop("phase"), entry.pop("step"), entry)

    def write(self, phase: str, event: str, step: int, **numbers: float) -> None:
        """Add an entry."""
        if not self.writes:
            return
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"phase": phase, "event": event, "step": step, **numbers}) + "\n")
        self._tell(phase, step, numbers)

    def close(self) -> None:
        """Write what is left of the event files."""
        if self._events is not None:
            self._events.close()

    def _tell(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        """Add an entry to the event files, if there are any."""
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(f"{phase}/{name}", value, step)

    def _is_before(self, line: str, phase: int, step: int) -> bool:
        try:
            entry: dict[str, Any] = json.loads(line)
            return (self.phases.index(entry["phase"]), entry["step"]) <= (phase, step)
        except (ValueError, KeyError, TypeError):  # a line that a kill has cut
            return False


def event_writer() -> type[SummaryWriter]:
    """Return what writes event files.

    Raises
    ------
    ConfigError
        The package tensorboard is not there.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "train.tensorboard = true needs the package tensorboard: pip install 'schelix-scale[tensorboard]'. Or "
            "leave it out: checkpoints/metrics.jsonl has the same numbers."
        ) from error
    return SummaryWriter
