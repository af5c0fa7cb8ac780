"""Training state <-> ``checkpoints/step-*/state.pt``, published atomically; a torn one is never read."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from schelix_scale.errors import TrainingError
from schelix_scale.publish import publish

FORMAT = 1
KEEP = 2


@dataclass
class TrainState:
    """Everything that decides how training goes on.

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


def save_checkpoint(folder: Path, state: TrainState, fingerprint: str) -> Path:
    """Write ``folder/step-PP-SSSSSS/state.pt`` and drop all but the last two."""
    target = folder / checkpoint_name(state.phase, state.step)
    with publish(target) as partial:
        partial.mkdir()
        torch.save({"format": FORMAT, "fingerprint": fingerprint, **vars(state)}, partial / "state.pt")
    for old in _checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path, fingerprint: str) -> TrainState | None:
    """Read the newest readable checkpoint of this training (by its fingerprint); None if there is none."""
    for path in reversed(_checkpoints(folder)):
        state = _read(path, fingerprint)
        if state is not None:
            return state
    return None


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
    state = _read(path, fingerprint)
    if state is None:
        raise TrainingError(
            f"the checkpoint {path} is damaged or of another training. "
            f"Delete {path.parent} and run the same `schelix integrate` command again."
        )
    return state


def checkpoint_name(phase: int, step: int) -> str:
    """Name the folder of a checkpoint; names sort by progress."""
    return f"step-{phase:02d}-{step:06d}"


def _read(path: Path, fingerprint: str) -> TrainState | None:
    try:
        found = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError):
        return None
    if not isinstance(found, dict) or (found.pop("format", 0), found.pop("fingerprint", "")) != (FORMAT, fingerprint):
        return None
    return TrainState(**found)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())
