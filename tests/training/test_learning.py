"""What the phases teach the model, and which parts of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LinearRegression

from schelix_scale.config import TrainConfig
from schelix_scale.model.streams import DualStream
from schelix_scale.progress import QuietReporter
from schelix_scale.training.labels import Labels
from schelix_scale.training.loop import Training, build_model, split_rows, train
from tests.training.tools import (
    CONFIG,
    Cache,
    Counting,
    cached,
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


def test_refine_learns_the_deep_diffusion(tmp_path: Path) -> None:
    """The latent is nearer to (1 - pull) B + pull P^reach B, computed densely, than any affine map of B comes to it.

    That map is fitted to the answer itself; training has seen the ends of single walks.
    """
    features = cached()
    features.anchor_nta[:] += 0.6 * np.random.default_rng(8).normal(size=features.anchor_nta.shape)
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
    affine = LinearRegression().fit(backbone, best).predict(backbone)
    missed, by_affine = (np.square(found - best).sum(axis=1).mean() for found in (latent.fused.numpy(), affine))
    assert missed < by_affine


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
