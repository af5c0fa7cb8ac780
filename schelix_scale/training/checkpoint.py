"""Training state <-> ``checkpoints/step-*/state.pt``, published atomically; a torn one is never read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from schelix_scale.errors import TrainingError
from schelix_scale.publish import publish

FORMAT = 2
KEEP = 2


@dataclass
class TrainState:
    """Everything that decides how training goes on, on any number of ranks.

    The order of cells and the walks from them follow from phase and step, as does the schedule; the model draws no
    random numbers. So there is no state of a random generator, and no cell is skipped or repeated.

    Attributes
    ----------
    phase
        Number of the current phase; equal to the number of phases when training is finished.
    step
        Steps made in the current phase.
    operator_id
        The version of the cached features in use.
    best_loss, stale
        Best validation loss of the phase and evaluations since then.
    model, best_model, optimizer
        State dicts; ``best_model`` belongs to ``best_loss``.
    """

    phase: int
    step: int
    operator_id: str
    best_loss: float
    stale: int
    model: dict[str, Any]
    best_model: dict[str, Any]
    optimizer: dict[str, Any] | None


def save_checkpoint(folder: Path, state: TrainState, fingerprint: str, keep: int = KEEP) -> Path:
    """Write ``folder/step-PP-SSSSSS/state.pt`` and drop all but the last ``keep``."""
    target = folder / checkpoint_name(state.phase, state.step)
    with publish(target) as partial:
        partial.mkdir()
        torch.save({"format": FORMAT, "fingerprint": fingerprint, **vars(state)}, partial / "state.pt")
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(
    folder: Path, fingerprint: str, warn: Callable[[str], None] = lambda _: None
) -> TrainState | None:
    """Read the newest readable checkpoint of this training (by its fingerprint); None if there is none.

    What is passed over, because it is torn or of another format, is told to ``warn``; of another training, it is not.
    """
    for path in reversed(_checkpoints(folder)):
        found = _read(path)
        if isinstance(found, str):
            warn(f"the checkpoint {path} {found}; it is passed over")
        elif found.pop("fingerprint") == fingerprint:
            return TrainState(**found)
    return None


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint, whether it can be read or not."""
    return max(_checkpoints(folder), default=None)


def clear_checkpoints(folder: Path) -> None:
    """Remove the checkpoints and the log of another training, which would be taken for newer than the first ones."""
    if folder.exists():
        shutil.rmtree(folder)


def final_checkpoint(path: Path, fingerprint: str) -> TrainState:
    """Read exactly this checkpoint of a finished training; an older one would give another embedding.

    Raises
    ------
    TrainingError
        It cannot be read, or is of another training.
    """
    found = _read(path)
    if isinstance(found, str) or found.pop("fingerprint") != fingerprint:
        raise TrainingError(
            f"the checkpoint {path} is damaged or of another training. "
            f"Delete {path.parent} and run the same `schelix integrate` command, or `schelix train`, again."
        )
    return TrainState(**found)


def checkpoint_name(phase: int, step: int) -> str:
    """Name the folder of a checkpoint; names sort by progress."""
    return f"step-{phase:02d}-{step:06d}"


def _read(path: Path) -> dict[str, Any] | str:
    """Return what a checkpoint holds, or what is wrong with it."""
    try:
        found = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        return f"cannot be read ({type(error).__name__})"
    if not isinstance(found, dict) or not {"format", "fingerprint"} <= set(found):
        return "is no checkpoint of schelix"
    version = found.pop("format")
    return dict(found) if version == FORMAT else f"has format {version}, this version of schelix reads {FORMAT}"


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())
