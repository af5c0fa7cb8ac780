"""What a training tells: metrics.jsonl, event files, speed, and why it stops."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from schelix_scale.errors import ConfigError, RunError, TrainingError
from schelix_scale.model.streams import DualStream
from schelix_scale.progress import QuietReporter
from schelix_scale.training.checkpoint import latest_checkpoint
from schelix_scale.training.data import CachedFeatures
from schelix_scale.training.log import TrainingLog
from schelix_scale.training.loop import train
from tests.training.tools import CONFIG, Cache, Counting, Interrupted, cached, logged, run, training_in


def test_what_is_logged(tmp_path: Path) -> None:
    cache, reporter = Cache(cached()), QuietReporter()
    train(training_in(tmp_path, cache), cache.reopen("first"), reporter)
    entries = logged(tmp_path)
    steps = {event: [e["step"] for e in entries if (e["phase"], e["event"]) == ("align", event)] for event in EVENTS}
    assert steps == {"train": [5, 10, 15, 20, 23], "evaluate": [0, 5, 10, 15, 20, 23], "end": [23]}
    assert all(float(str(e["cells_per_second"])) > 0 for e in entries if e["event"] == "train")
    rates = [float(str(e["learning_rate"])) for e in entries if (e["phase"], e["event"]) == ("align", "train")]
    assert rates[0] > rates[-1] > 0
    (align, refine) = [message for message in reporter.messages if message.endswith("cells/s")]
    assert align.startswith("align: step 23, ")
    assert refine.startswith("refine: step 17, ")


EVENTS = ("train", "evaluate", "end")


def test_what_is_done_again_is_logged_once(tmp_path: Path) -> None:
    run(tmp_path / "whole")

    def interrupt(step: int) -> None:
        if step == 19:
            raise Interrupted("killed")

    cache = Cache(cached())
    training = training_in(tmp_path / "cut", cache)
    with pytest.raises(Interrupted, match="killed"):
        train(training, cache.reopen("first"), Counting(interrupt))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "align", "event": "tra')  # as a kill leaves it
    train(training, cache.reopen("first"), Counting())
    kept = [logged(tmp_path / "whole"), logged(tmp_path / "cut")]
    for entry in (entry for entries in kept for entry in entries):
        entry.pop("seconds", entry.pop("cells_per_second", None))
    assert kept[0] == kept[1]


def test_event_files(tmp_path: Path) -> None:
    run(tmp_path, tensorboard=True)
    found = scalars(tmp_path, "refine/validation_loss")
    entries = [entry for entry in logged(tmp_path) if (entry["phase"], entry["event"]) == ("refine", "evaluate")]
    expected = [(entry["step"], entry["validation_loss"]) for entry in entries]
    np.testing.assert_allclose(found, np.array(expected, float), rtol=1e-6)


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_event_files_of_a_training_that_was_interrupted_have_every_step_once(tmp_path: Path) -> None:
    run(tmp_path / "whole", tensorboard=True)
    cache = Cache(cached())
    training = training_in(tmp_path / "cut", cache, CONFIG.model_copy(update={"tensorboard": True}))

    def interrupt(step: int) -> None:
        if step == 28:  # in Refine, whose steps are counted from 0 like those of Align
            raise Interrupted("killed")

    with pytest.raises(Interrupted, match="killed"):
        train(training, cache.reopen("first"), Counting(interrupt))
    train(training, cache.reopen("first"), Counting())
    for name in ("align/validation_loss", "refine/validation_loss", "refine/loss"):
        assert scalars(tmp_path / "cut", name) == scalars(tmp_path / "whole", name)


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"no space left on .* while writing .*metrics\.jsonl"):
        TrainingLog(tmp_path, ["align"]).write("align", "train", 3, loss=1.0)


def test_event_files_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"needs the package tensorboard: pip install 'schelix-scale\[tensorboard\]'"):
        run(tmp_path, tensorboard=True)


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "none", ["align"], writes=False)
    log.write("align", "train", 3, loss=1.0)
    log.resume(0, 0)
    log.close()
    assert not (tmp_path / "none").exists()


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    """Spoiled by a step whose loss was a number: a checkpoint of them would be the last, and never go on."""
    cache, models = Cache(cached()), []

    def refresh(features: CachedFeatures, model: DualStream) -> CachedFeatures:
        models.append(model)
        return features

    def spoil(step: int) -> None:
        if step == CONFIG.align_steps + 7:
            models[0].gate.weight.data[0, 0] = np.inf

    config = CONFIG.model_copy(update={"checkpoint_every": 1, "evaluate_every": 1_000})
    training = replace(training_in(tmp_path, cache, config), refresh=refresh)
    message = r"gate\.weight of the model is not finite after step 6\. The last good checkpoint is .*step-01-000006\."
    with pytest.raises(TrainingError, match=message):
        train(training, cache.reopen("first"), Counting(spoil))
    state = latest_checkpoint(tmp_path, "abc")
    assert state is not None
    assert (state.phase, state.step) == (1, 6)


def test_a_loss_that_is_no_number_names_its_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    """Features spoiled while training goes on: noticed a few steps later; the step, the first of a group, is named."""
    features = cached()

    def spoil(step: int) -> None:
        if step == 12:
            features.variant_ntv[:] = np.nan

    cache = Cache(features)
    config = CONFIG.model_copy(update={"evaluate_every": 8, "align_steps": 100})
    message = r"phase align is nan at step (16|32|48)\. The last good checkpoint is .*step-00-0000\1\. Lower"
    with pytest.raises(TrainingError, match=message):
        train(training_in(tmp_path, cache, config), features, Counting(spoil))
    assert all(torch.isfinite(torch.tensor(float(str(e.get("loss", 0))))) for e in logged(tmp_path))
