"""The weights of a finished training -> ``start.pt`` of the run: what its next training starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from schelix_scale.errors import RunError, TrainingError
from schelix_scale.publish import checksum
from schelix_scale.records import START, recorded_stages
from schelix_scale.run_directory import RunDirectory

if TYPE_CHECKING:
    from schelix_scale.model.streams import DualStream


def choose_start(
    directory: RunDirectory, asked: bool, due: frozenset[str] | None, recorded: Callable[[str], bool]
) -> bool:
    """Say whether a training starts from ``start.pt``: because that is asked, or because the one under way or done did.

    What is left of another training is removed. ``recorded`` says whether the training that the run has is the one that
    is wanted, from a start with this checksum.
    """
    path, stages = directory.path / START, recorded_stages(directory.path)
    if asked:
        keep_weights(directory, due)
        return True
    if not path.exists():
        return False
    wanted = "train" not in stages or recorded(checksum(path))
    if not wanted:
        path.unlink()
    return wanted


def keep_weights(directory: RunDirectory, due: frozenset[str] | None) -> None:
    """Keep the weights of a run's last training as the start of the next; those of one under way stay.

    So do those of a continued training whose embedding is ``due`` and not made yet: the same command goes on.

    Raises
    ------
    RunError
        The run was not trained.
    """
    import torch

    from schelix_scale.training.checkpoint import final_checkpoint

    stages = recorded_stages(directory.path)
    if "train" not in stages:
        if (directory.path / START).exists():  # such a training was interrupted, and goes on
            return
        raise RunError(f"{directory.path} has no finished training to continue. Train it first: schelix train.")
    record = directory.record("train")
    waits = due is not None and "embed" in due and not (directory.path / "manifest.json").exists()
    if waits and START in {artifact.path for artifact in record.artifacts}:
        return
    details = record.details
    state = final_checkpoint(directory.path / "checkpoints" / details["checkpoint"], details["key"])
    with directory.publish(START) as path:
        torch.save({"after": details["key"], "model": state.model}, path)


def load_weights(path: Path, model: DualStream) -> None:
    """Give a model the weights that `keep_weights` has kept.

    Raises
    ------
    TrainingError
        They cannot be read, or are those of a model of another shape.
    """
    import torch

    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(found["model"])
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, UnpicklingError) as error:
        raise TrainingError(
            f"{path} does not fit the model of these settings ({error}). Continue with the settings of train.* that "
            "the run was trained with, or delete it to train from the beginning."
        ) from error
