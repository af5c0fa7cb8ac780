from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schelix_scale.config import TrainConfig
from schelix_scale.errors import TrainingError
from schelix_scale.model.streams import DualStream
from schelix_scale.progress import QuietReporter
from schelix_scale.training.checkpoint import checkpoint_name, final_checkpoint, latest_checkpoint
from schelix_scale.training.labels import Labels
from schelix_scale.training.loop import Training, build_model, split_rows, train
from tests.training.tools import (
    CONFIG,
    TOTAL_STEPS,
    Cache,
    Counting,
    cached,
    cells_of,
    logged,
    phase_loss,
    run,
    same_weights,
    training_in,
)


def loss_of(model: DualStream, phase: str) -> float:
    """Loss on held-out rows and two-step neighbours, drawn here and not by the training's validation."""
    features = cached()
    _, rows = split_rows(features.n_cells, 0)
    rng = np.random.default_rng(99)
    rows = np.repeat(rows, 5)
    near = rows
    for _ in range(2):
        near = features.operator.indices_nk[near, rng.integers(0, features.operator.indices_nk.shape[1], len(near))]
    own, other = (features.cells(r, torch.device("cpu")) for r in (rows, near))
    with torch.no_grad():
        return float(phase_loss(model, phase, own, other))


def test_align_learns(tmp_path: Path) -> None:
    model, _, _ = run(tmp_path, align_steps=80, refine_steps=1)
    before = loss_of(build_model(cached(), CONFIG, 0), "align")
    assert loss_of(model, "align") < 0.85 * before
    losses = [e["validation_loss"] for e in logged(tmp_path) if e["phase"] == "align" and e["event"] == "evaluate"]
    assert losses[-1] < losses[0]


def test_refine_learns(tmp_path: Path) -> None:
    run(tmp_path, align_steps=30, refine_steps=100, learning_rate=0.01)
    losses = [e["validation_loss"] for e in logged(tmp_path) if e["phase"] == "refine" and e["event"] == "evaluate"]
    assert min(losses[1:]) < 0.99 * losses[0]


def test_phases_in_order_and_one_refresh_between(whole: tuple[DualStream, Cache, Counting, Path]) -> None:
    model, cache, reporter, folder = whole
    assert reporter.stages == [("train: align", cells_of(23)), ("train: refine", cells_of(17))]
    assert reporter.steps == TOTAL_STEPS
    assert [version for version, _ in cache.refreshed] == ["first"]
    assert not model.training
    state = final_checkpoint(folder / checkpoint_name(2, 0), "abc")
    assert (state.phase, state.step, state.operator_id) == (2, 0, "second")
    assert all(torch.equal(value, state.model[name]) for name, value in model.state_dict().items())


def test_align_leaves_the_anchor_stream_alone(whole: tuple[DualStream, Cache, Counting, Path]) -> None:
    """What the refresh is given: Variants have learned, Anchors and gate are as they were made."""
    _, cache, _, _ = whole
    fresh, aligned = build_model(cached(), CONFIG, 0).state_dict(), cache.refreshed[0][1]
    changed = {name.split(".")[0] for name, value in aligned.items() if not torch.equal(value, fresh[name])}
    assert changed == {"variant_encoder"}


def test_refine_trains_everything(tmp_path: Path) -> None:
    model, cache, _ = run(tmp_path, refine_steps=60, learning_rate=0.01)
    aligned = cache.refreshed[0][1]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, aligned[name])}
    assert {name.split(".")[0] for name in changed} == {
        "anchor_encoder",
        "variant_encoder",
        "variant_norm",
        "variant_map",
        "gate",
    }


def test_refine_sees_the_refreshed_features(tmp_path: Path) -> None:
    """Without a refresh the second phase trains on other walks and features, to other weights."""
    changed = {"refine_steps": 60, "learning_rate": 0.01}
    model, cache, _ = run(tmp_path / "refreshed", **changed)
    config, folder = CONFIG.model_copy(update=changed), tmp_path / "kept"
    training = Training(config, 0, torch.device("cpu"), folder, "abc", lambda features, _: features, cache.reopen)
    kept, features = train(training, cache.reopen("first"), QuietReporter())
    assert features.operator_id == "first"
    assert not same_weights(kept, model)


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


def test_refine_learns_the_deep_diffusion(tmp_path: Path) -> None:
    """The latent nears (1 - pull) B + pull P^reach B, computed with dense matrices, and more so than the backbone."""
    features = cached()
    features.anchor_nta[:] += 0.3 * np.random.default_rng(8).normal(size=features.anchor_nta.shape)
    cache = Cache(features)
    changed = {"refine_steps": 400, "align_steps": 1, "learning_rate": 0.01, "max_epochs": 1000, "evaluate_every": 20}
    config = CONFIG.model_copy(update=changed)
    training = Training(config, 0, torch.device("cpu"), tmp_path, "abc", lambda features, _: features, cache.reopen)
    model, _ = train(training, features, QuietReporter())
    cells = features.cells(np.arange(features.n_cells), torch.device("cpu"))
    with torch.no_grad():
        latent = model(cells.anchor, cells.variant)
    dense = np.zeros((features.n_cells, features.n_cells))
    np.put_along_axis(dense, features.operator.indices_nk.astype(int), features.operator.weights_nk, axis=1)
    backbone = latent.backbone.numpy().astype(float)
    best = 0.3 * backbone + 0.7 * np.linalg.matrix_power(dense, 6) @ backbone
    missed = np.square(latent.fused.numpy() - best).sum(axis=1).mean()
    assert missed < 0.5 * np.square(backbone - best).sum(axis=1).mean()


def test_walks_lead_to_labelled_cells(tmp_path: Path) -> None:
    """With every cell labelled by a split that features do not show, latents are pulled to the two labels' means."""
    features = cached()
    label = (features.anchor_nta[:, -1, 0] > np.median(features.anchor_nta[:, -1, 0])).astype(int)
    changed = {"refine_steps": 200, "align_steps": 1, "learning_rate": 0.01, "max_epochs": 1000, "label_share": 1.0}
    found = []
    for labels in (None, Labels.arrange(label, features.batch_n)):
        cache = Cache(features)
        training = replace(
            training_in(tmp_path / str(labels is None), cache, CONFIG.model_copy(update=changed)),
            labels=labels,
            refresh=lambda features, _: features,
        )
        model, _ = train(training, features, QuietReporter())
        cells = features.cells(np.arange(features.n_cells), torch.device("cpu"))
        with torch.no_grad():
            z_nd = model(cells.anchor, cells.variant).fused.numpy()
        within = sum(z_nd[label == code].var(axis=0).sum() * np.mean(label == code) for code in (0, 1))
        found.append(within / z_nd.var(axis=0).sum())
    assert found[1] < 0.8 * found[0]


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


def gradients(phase: str, config: TrainConfig = CONFIG) -> dict[str, float]:
    """Largest gradient of each part of the model after one loss."""
    features = cached()
    model = build_model(features, CONFIG, 0)
    own, other = (features.cells(rows, torch.device("cpu")) for rows in (np.arange(30), np.arange(30, 60)))
    torch.autograd.backward(phase_loss(model, phase, own, other, config))
    found: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        size = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
        found[name.split(".")[0]] = max(found.get(name.split(".")[0], 0.0), size)
    assert not any(values.requires_grad for cells in (own, other) for values in (cells.anchor, cells.variant))
    return found


def test_align_teaches_variants_and_not_anchors() -> None:
    found = gradients("align")
    assert found["variant_encoder"] > 1e-6
    assert {part for part, size in found.items() if size} == {"variant_encoder"}


def test_symmetric_alignment_teaches_both(tmp_path: Path) -> None:
    found = gradients("align", CONFIG.model_copy(update={"alignment": "symmetric"}))
    assert {part for part, size in found.items() if size > 1e-9} == {"variant_encoder", "anchor_encoder"}
    _, cache, _ = run(tmp_path, alignment="symmetric", learning_rate=0.01)
    fresh, aligned_ = build_model(cached(), CONFIG, 0).state_dict(), cache.refreshed[0][1]
    changed = {name.split(".")[0] for name, value in aligned_.items() if not torch.equal(value, fresh[name])}
    assert changed == {"variant_encoder", "anchor_encoder"}


def test_refine_reaches_every_part() -> None:
    assert min(gradients("refine").values()) > 1e-9


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
