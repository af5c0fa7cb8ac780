"""A training that was interrupted anywhere goes on to the same result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from schelix_scale.model.streams import DualStream
from schelix_scale.progress import QuietReporter
from schelix_scale.training.checkpoint import latest_checkpoint
from schelix_scale.training.data import CachedFeatures
from schelix_scale.training.loop import train
from tests.training.tools import (
    CONFIG,
    TOTAL_STEPS,
    Cache,
    Counting,
    Interrupted,
    cached,
    cells_of,
    logged,
    run,
    same_weights,
    training_in,
)


@pytest.mark.parametrize(
    "stops", [(1,), (3,), (5,), (6,), (12,), (22,), (23,), (24,), (31,), (39,), (40,), (2, 9, 9, 12), (7, 8, 7, 6, 8)]
)
def test_interrupted_anywhere_and_resumed(
    whole: tuple[DualStream, Cache, Counting, Path], tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """Stopped after so many steps of each attempt, before anything after that step is done."""
    cache = Cache(cached())
    for stop in stops:

        def interrupt(step: int, stop: int = stop) -> None:
            if step == stop:
                raise Interrupted("killed")

        with pytest.raises(Interrupted, match="killed"):
            train(training_in(tmp_path, cache), cache.reopen("first"), Counting(interrupt))
    reporter = Counting()
    model, features = train(training_in(tmp_path, cache), cache.reopen("first"), reporter)
    assert same_weights(model, whole[0])
    assert features.operator_id == "second"
    if stops[0] > CONFIG.evaluate_every:
        assert reporter.steps < TOTAL_STEPS


def test_interrupted_right_after_the_refresh(whole: tuple[DualStream, Cache, Counting, Path], tmp_path: Path) -> None:
    """The new version exists, but no checkpoint says so yet."""

    def interrupt() -> None:
        raise Interrupted("killed")

    cache = Cache(cached(), interrupt)
    with pytest.raises(Interrupted, match="killed"):
        train(training_in(tmp_path, cache), cache.reopen("first"), Counting())
    assert set(cache.versions) == {"first", "second"}
    cache.after_refresh = lambda: None
    reporter = Counting()
    model, _ = train(training_in(tmp_path, cache), cache.reopen("first"), reporter)
    assert same_weights(model, whole[0])
    assert reporter.steps == CONFIG.refine_steps
    found, expected = ([(e["phase"], e["event"], e["step"]) for e in logged(at)] for at in (tmp_path, whole[3]))
    assert found == expected, "a phase that was done is neither validated nor logged again"


def test_resumed_after_losing_the_newest_checkpoint(
    whole: tuple[DualStream, Cache, Counting, Path], tmp_path: Path
) -> None:
    def interrupt(step: int) -> None:
        if step == 18:
            raise Interrupted("killed")

    cache = Cache(cached())
    with pytest.raises(Interrupted, match="killed"):
        train(training_in(tmp_path, cache), cache.reopen("first"), Counting(interrupt))
    newest = sorted(tmp_path.glob("step-*"))[-1] / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-500])
    state = latest_checkpoint(tmp_path, "abc")
    assert state is not None
    assert state.step == 10
    assert same_weights(train(training_in(tmp_path, cache), cache.reopen("first"), Counting())[0], whole[0])


def test_a_finished_training_is_not_repeated(whole: tuple[DualStream, Cache, Counting, Path]) -> None:
    model, cache, _, folder = whole
    reporter = Counting()
    again, features = train(training_in(folder, cache), cache.reopen("first"), reporter)
    assert reporter.stages == []
    assert features.operator_id == "second"
    assert same_weights(again, model)


def test_another_training_does_not_resume_this_one(tmp_path: Path) -> None:
    cache = Cache(cached())
    train(training_in(tmp_path, cache, fingerprint="xyz"), cache.reopen("first"), Counting())
    reporter, quiet = Counting(), QuietReporter()
    train(training_in(tmp_path, cache, fingerprint="abc"), cache.reopen("first"), reporter)
    assert reporter.steps == TOTAL_STEPS
    train(training_in(tmp_path, cache, fingerprint="def"), cache.reopen("first"), quiet)
    assert "no checkpoint of this training" in quiet.messages[0]
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-01-000017", "step-02-000000"}
    assert len([e for e in logged(tmp_path) if e["event"] == "end"]) == 2


CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from schelix_scale.training.loop import train
from tests.training.tools import Cache, Counting, cached, training_in

torch.set_num_threads(int(sys.argv[3]))
stop = int(sys.argv[2])
cache = Cache(cached())
kill = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == stop else None
train(training_in(Path(sys.argv[1]), cache), cache.reopen("first"), Counting(kill))
"""


def test_killed_and_resumed(whole: tuple[DualStream, Cache, Counting, Path], tmp_path: Path) -> None:
    """A real process is killed in the first phase; this one goes on from what it left on disk."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), "13", str(torch.get_num_threads())],
        cwd=Path(__file__).parents[2],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = latest_checkpoint(tmp_path, "abc")
    assert state is not None
    assert (state.phase, state.step) == (0, 10)
    cache, reporter = Cache(cached()), Counting()
    model, _ = train(training_in(tmp_path, cache), cache.reopen("first"), reporter)
    assert reporter.steps == TOTAL_STEPS - 10
    left = cells_of(23) - cells_of(10)  # of what is left speed and remaining time are told, as if nothing else was
    assert reporter.stages == [("train: align from step 10", left), ("train: refine", cells_of(17))]
    assert same_weights(model, whole[0])


def test_resumed_after_an_early_stop_gives_the_same(tmp_path: Path) -> None:
    changed = {"learning_rate": 1e-12, "align_steps": 500, "evaluate_every": 4, "patience": 3, "max_epochs": 1000}
    expected, _, counted = run(tmp_path / "whole", **changed)
    for stop in (12, 17):
        cache = Cache(cached())
        training = training_in(tmp_path / str(stop), cache, CONFIG.model_copy(update=changed))

        def interrupt(step: int, stop: int = stop) -> None:
            if step == stop:
                raise Interrupted("killed")

        with pytest.raises(Interrupted, match="killed"):
            train(training, cache.reopen("first"), Counting(interrupt))
        reporter = Counting()
        model, _ = train(training, cache.reopen("first"), reporter)
        assert same_weights(model, expected)
        assert reporter.steps < counted.steps
        stopped = [
            max(
                int(str(e["step"]))
                for e in logged(tmp_path / name)
                if (e["phase"], e["event"]) == ("align", "evaluate")
            )
            for name in ("whole", str(stop))
        ]
        assert stopped == [12, 12]


@pytest.fixture
def noisy() -> CachedFeatures:
    """Variants that are noise: they are learned by heart, and validation soon gets worse."""
    features = cached()
    features.variant_ntv[:] = np.random.default_rng(5).normal(size=features.variant_ntv.shape)
    return features


def aligned_until(folder: Path, features: CachedFeatures, steps: int, stop: int | None) -> Cache:
    """Train Align with validation every other step; ``stop`` interrupts after so many steps."""
    changed = {"learning_rate": 0.03, "evaluate_every": 2, "align_steps": steps, "refine_steps": 1}
    cache = Cache(features)

    def interrupt(step: int) -> None:
        if step == stop:
            raise Interrupted("killed")

    train(training_in(folder, cache, CONFIG.model_copy(update=changed)), features, Counting(interrupt))
    return cache


def aligned(folder: Path, features: CachedFeatures, steps: int, stop: int | None = None) -> dict[str, torch.Tensor]:
    """Weights after Align; ``stop`` interrupts the first attempt."""
    if stop is not None:
        with pytest.raises(Interrupted, match="killed"):
            aligned_until(folder, features, steps, stop)
    return aligned_until(folder, features, steps, None).refreshed[-1][1]


def test_the_best_weights_are_kept(tmp_path: Path, noisy: CachedFeatures) -> None:
    """Steps after the best evaluation leave no trace: what is kept are the weights of that step."""
    long = aligned(tmp_path / "long", noisy, 40)
    entries = [e for e in logged(tmp_path / "long") if e["phase"] == "align" and e["event"] == "evaluate"]
    best = min(entries, key=lambda entry: float(str(entry["validation_loss"])))
    assert 4 <= int(str(best["step"])) <= 36
    assert float(str(entries[-1]["validation_loss"])) > 1.02 * float(str(best["validation_loss"]))
    with pytest.raises(Interrupted, match="killed"):
        aligned_until(tmp_path / "short", noisy, 40, int(str(best["step"])) + 1)
    state = latest_checkpoint(tmp_path / "short", "abc")
    assert state is not None
    assert state.step == best["step"]
    assert all(torch.equal(value, state.model[name]) for name, value in long.items())


@pytest.mark.parametrize("stop", [15, 16, 29])
def test_interrupted_while_validation_gets_worse(tmp_path: Path, noisy: CachedFeatures, stop: int) -> None:
    """It goes on from the last weights and not from the best ones: validation losses after that are the same."""
    expected = aligned(tmp_path / "whole", noisy, 30)
    found = aligned(tmp_path / "cut", noisy, 30, stop)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    last = [
        [e for e in logged(tmp_path / name) if (e["phase"], e["event"], e["step"]) == ("align", "evaluate", 30)][-1]
        for name in ("whole", "cut")
    ]
    assert last[0] == last[1]
