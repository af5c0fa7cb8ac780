"""Training state <-> ``checkpoints/step-*/``, published atomically; a torn or altered one is never used.

``state.pt`` holds the state, ``state.sha256`` its checksum: torch reads a file whose bits have changed without a word.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from schelix_scale.errors import RunError, TrainingError
from schelix_scale.publish import publish

FORMAT, WITHOUT_CHECKSUM = 3, 2
KEEP = 2
STATE, CHECKSUM = "state.pt", "state.sha256"

_NAME = re.compile(r"step-(\d+)-(\d+)")


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
    """Write ``folder/step-PP-SSSSSS/`` and drop all but the last ``keep``; later ones were passed over, and go too."""
    target = folder / checkpoint_name(state.phase, state.step)
    with publish(target) as partial:
        partial.mkdir()
        content = BytesIO()
        torch.save({"format": FORMAT, "fingerprint": fingerprint, **vars(state)}, content)
        (partial / STATE).write_bytes(content.getbuffer())
        (partial / CHECKSUM).write_text(hashlib.sha256(content.getbuffer()).hexdigest() + "\n", encoding="ascii")
    known = _checkpoints(folder)
    place = known.index(target) + 1
    for old in known[: max(place - keep, 0)] + known[place:]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(
    folder: Path, fingerprint: str, warn: Callable[[str], None] = lambda _: None
) -> TrainState | None:
    """Read the newest readable checkpoint of this training (by its fingerprint); None if there is none.

    What is passed over, because it is torn, altered or of another format, is told to ``warn``.

    Raises
    ------
    RunError
        The disk does not let a checkpoint be read: another attempt may.
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
    return next(reversed(_checkpoints(folder)), None)


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
    """Name the folder of a checkpoint."""
    return f"step-{phase:02d}-{step:06d}"


def _read(path: Path) -> dict[str, Any] | str:
    """Return what a checkpoint holds, or what is wrong with it."""
    try:
        content, told = (path / STATE).read_bytes(), None
        if (path / CHECKSUM).exists():
            told = (path / CHECKSUM).read_bytes().decode(errors="replace").strip()
    except FileNotFoundError:
        return "is incomplete"
    except OSError as error:
        raise RunError(
            f"the checkpoint {path} cannot be read ({error}). If that passes, run the same command again: training "
            "goes on from it. If it does not, delete it, and training goes on from the one before."
        ) from error
    if told is not None and told != hashlib.sha256(content).hexdigest():
        return "is torn or altered: its checksum is another one"
    try:
        found = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, UnpicklingError, *_OF_DAMAGE) as error:
        return f"cannot be read ({type(error).__name__})"
    if not isinstance(found, dict) or not {"format", "fingerprint"} <= set(found):
        return "is no checkpoint of schelix"
    version = found.pop("format")
    if version == FORMAT and told is None:
        return "is incomplete"
    if version not in (FORMAT, WITHOUT_CHECKSUM):
        return f"has format {version}, this version of schelix reads {FORMAT}"
    return dict(found) if set(found) == _HELD else "is no checkpoint of schelix"


def _checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints, in the order of progress."""
    found = {path: _NAME.fullmatch(path.name) for path in folder.glob("step-*") if path.is_dir()}
    numbers = {path: (int(match[1]), int(match[2])) for path, match in found.items() if match}
    return sorted(numbers, key=numbers.__getitem__)


_OF_DAMAGE = (OSError, LookupError, TypeError, AttributeError)  # of files without a checksum, as torch reads them
_HELD = {"fingerprint", *(field.name for field in fields(TrainState))}
