"""The order of a training: phases, budgets, seeds, when it stops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schelix_scale.errors import TrainingError
from schelix_scale.model.streams import DualStream
from schelix_scale.training.checkpoint import checkpoint_name, final_checkpoint, latest_checkpoint
from schelix_scale.training.loop import build_model, split_rows, train
from tests.training.tools import (
    CONFIG,
    TOTAL_STEPS,
    Cache,
    Counting,
    cached,
    cells_of,
    run,
    same_weights,
    training_in,
)


def test_phases_in_order_and_one_refresh_between(whole: tuple[DualStream, Cache, Counting, Path]) -> None:
    model, cache, reporter, folder = whole
    assert reporter.stages == [("train: align", cells_of(23)), ("train: refine", cells_of(17))]
    assert reporter.steps == TOTAL_STEPS
    assert [version for version, _ in cache.refreshed] == ["first"]
    assert not model.training
    state = final_checkpoint(folder / checkpoint_name(2, 0), "abc")
    assert (state.phase, state.step, state.operator_id) == (2, 0, "second")
    assert all(torch.equal(value, state.model[name]) for name, value in model.state_dict().items())


def test_same_seed_same_weights(whole: tuple[DualStream, Cache, Counting, Path], tmp_path: Path) -> None:
    torch.manual_seed(12345)
    np.random.seed(54321)  # noqa: NPY002  (the global state must not matter)
    assert same_weights(run(tmp_path)[0], whole[0])


def test_other_seed_other_weights(whole: tuple[DualStream, Cache, Counting, Path], tmp_path: Path) -> None:
    assert not same_weights(run(tmp_path, seed=1)[0], whole[0])


def test_making_a_model_leaves_the_global_seed_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    one, two = build_model(cached(), CONFIG, 0), build_model(cached(), CONFIG, 0)
    assert torch.equal(torch.rand(3), expected)
    assert same_weights(one, two)
    assert not same_weights(one, build_model(cached(), CONFIG, 1))


@pytest.mark.parametrize("stream", ["anchor_nta", "variant_ntv"])
def test_features_that_are_not_numbers(tmp_path: Path, stream: str) -> None:
    features = cached()
    getattr(features, stream)[:] = np.nan
    cache = Cache(features)
    with pytest.raises(TrainingError, match=r"the loss of phase align is nan at step 0.*train\.learning_rate"):
        train(training_in(tmp_path, cache), features, Counting())
    assert latest_checkpoint(tmp_path, "abc") is None


def test_stops_when_validation_does_not_improve(tmp_path: Path) -> None:
    """At a rate of nearly nothing, ``patience`` evaluations after the first are without progress."""
    _, _, reporter = run(
        tmp_path, learning_rate=1e-12, align_steps=500, refine_steps=500, evaluate_every=4, patience=3, max_epochs=1000
    )
    assert [total for _, total in reporter.stages] == [cells_of(500), cells_of(500)]
    assert 2 * 3 * 4 <= reporter.steps <= 2 * (3 + 1) * 4


@pytest.mark.parametrize("batch_size", [48, 1024])
def test_max_epochs_bounds_the_steps(tmp_path: Path, batch_size: int) -> None:
    """228 of 240 rows train, 48 a step, which is the most for so few: five steps an epoch."""
    _, _, reporter = run(tmp_path, align_steps=500, refine_steps=7, max_epochs=3, batch_size=batch_size)
    assert reporter.stages == [("train: align", cells_of(15)), ("train: refine", cells_of(7))]
    assert reporter.steps == 22


def test_single_stream_is_refined_only(tmp_path: Path) -> None:
    features = cached(single_stream=True)
    cache, reporter = Cache(features), Counting()
    config = CONFIG.model_copy(update={"learning_rate": 0.03})
    model, last = train(training_in(tmp_path, cache, config), features, reporter)
    assert reporter.stages == [("train: refine", cells_of(17))]
    assert cache.refreshed == []
    assert last.operator_id == "first"
    cells = last.cells(np.arange(20), torch.device("cpu"))
    latent = model(cells.anchor, cells.variant)
    assert torch.equal(latent.fused, latent.anchor)
    assert not same_weights(model, build_model(features, CONFIG, 0))


@settings(max_examples=60, deadline=None)
@given(st.integers(10, 3_000), st.integers(0, 2**31))
def test_split_is_disjoint_and_covers(n: int, seed: int) -> None:
    rows_train, rows_valid = split_rows(n, seed)
    assert sorted([*rows_train.tolist(), *rows_valid.tolist()]) == list(range(n))
    assert len(rows_valid) == max(2, int(0.05 * n))
    assert (np.diff(rows_train) > 0).all()
    assert (np.diff(rows_valid) > 0).all()
    again = split_rows(n, seed)
    assert all(map(np.array_equal, again, (rows_train, rows_valid)))


def test_split_of_many_cells() -> None:
    rows_train, rows_valid = split_rows(100_000, 0)
    assert (len(rows_train), len(rows_valid)) == (98_000, 2_000)
    assert not np.array_equal(rows_valid, split_rows(100_000, 1)[1])
