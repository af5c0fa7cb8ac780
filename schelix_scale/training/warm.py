"""The weights of a finished training -> ``start.pt`` of the run: what its next training starts from."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from schelix_scale.errors import RunError, TrainingError
from schelix_scale.records import recorded_stages
from schelix_scale.run_directory import RunDirectory

if TYPE_CHECKING:
    from schelix_scale.model.streams import DualStream

START = "start.pt"


def keep_weights(directory: RunDirectory) -> None:
    """Keep the weights of a run's last training as the start of the next; those of one under way stay.

    Raises
    ------
    RunError
        The run was not trained.
    """
    import torch

    from schelix_scale.training.checkpoint import final_checkpoint

    if "train" not in recorded_stages(directory.path):
        if (directory.path / START).exists():  # such a training was interrupted, and goes on
            return
        raise RunError(f"{directory.path} has no finished training to continue. Train it first: schelix train.")
    details = directory.record("train").details
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
