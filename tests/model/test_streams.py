from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schelix_scale.config import TrainConfig
from schelix_scale.model.streams import DualStream, Latent, clip_norm

CONFIG = TrainConfig(width=16, anchor_residual=0.1, gate=0.2)
HOPS, ANCHOR, VARIANT = 3, 6, 5


def model_of(config: TrainConfig = CONFIG, variant_dims: int = VARIANT, seed: int = 0) -> DualStream:
    torch.manual_seed(seed)
    return DualStream(HOPS, ANCHOR, variant_dims, 2.0, 3.0, config)


def inputs(m: int = 40, scale: float = 1.0, seed: int = 0, variant_dims: int = VARIANT) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    return (
        scale * torch.randn(m, HOPS, ANCHOR, generator=rng),
        scale * torch.randn(m, HOPS, variant_dims, generator=rng),
    )


def norm(values: torch.Tensor) -> np.ndarray:
    return np.linalg.norm(values.detach().numpy().astype(np.float64), axis=1)


def check_bounds(latent: Latent, residual: float, gate: float) -> None:
    slack = 1 + 1e-4
    assert (norm(latent.anchor - latent.backbone) <= (residual + 1e-12) * norm(latent.backbone) * slack).all()
    assert (norm(latent.fused - latent.anchor) <= (gate + 1e-12) * norm(latent.anchor) * slack).all()
    for part in latent:
        assert torch.isfinite(part).all()


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([1e-3, 1.0, 1e3, 1e6]),
    st.sampled_from([1e-6, 1.0, 1e4]),
    st.floats(0, 1),
    st.floats(0, 0.4),
)
def test_residuals_are_bounded_whatever_the_weights(
    seed: int, weight_scale: float, input_scale: float, residual: float, gate: float
) -> None:
    model = model_of(CONFIG.model_copy(update={"anchor_residual": residual, "gate": gate}), seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * weight_scale)
    anchor, variant = inputs(30, input_scale, seed)
    anchor[0], variant[1], anchor[2] = 0, 0, 1e-12
    # a difference of float32 numbers is only as fine as the numbers: compare as the model adds them, in float64
    check_bounds(model.double()(anchor.double(), variant.double()), residual, gate)


def test_large_weights_reach_the_bounds() -> None:
    """The bounds are not kept by doing nothing: a saturated gate moves a cell by nearly rho |z_A|."""
    model = model_of()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e4)
        model.gate.weight.zero_()
        model.gate.bias.fill_(50.0)
        model.variant_map.bias.fill_(1e6)
    latent = model(*inputs())
    check_bounds(latent, 0.1, 0.2)
    np.testing.assert_allclose(norm(latent.anchor - latent.backbone), 0.1 * norm(latent.backbone), rtol=1e-3)
    np.testing.assert_allclose(norm(latent.fused - latent.anchor), 0.2 * norm(latent.anchor), rtol=1e-3)


def test_bounds_of_zero_switch_the_residuals_off() -> None:
    latent = model_of(CONFIG.model_copy(update={"anchor_residual": 0.0, "gate": 0.0}))(*inputs())
    assert torch.equal(latent.anchor, latent.backbone)
    assert torch.equal(latent.fused, latent.backbone)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e5]), st.sampled_from([0.0, 1e-3, 1.0, 1e5]))
def test_clip_norm(seed: int, scale: float, limit: float) -> None:
    """Norms stay below the limit, directions stay, short rows are not touched."""
    rng = np.random.default_rng(seed)
    update = (rng.normal(size=(20, 7)) * scale * rng.lognormal(0, 2, (20, 1))).astype(np.float32)
    limits = (limit * rng.lognormal(0, 2, (20, 1))).astype(np.float32)
    found = clip_norm(torch.from_numpy(update), torch.from_numpy(limits)).numpy()
    lengths = np.linalg.norm(update.astype(np.float64), axis=1)
    factors = np.minimum(1, np.divide(limits[:, 0], lengths, out=np.ones(20), where=lengths > 0))
    np.testing.assert_allclose(found, update * factors[:, None], rtol=1e-4, atol=1e-18)
    assert (np.linalg.norm(found.astype(np.float64), axis=1) <= limits[:, 0] * (1 + 1e-5) + 1e-18).all()


def test_backbone_is_the_last_hop_over_its_scale() -> None:
    anchor, variant = inputs()
    np.testing.assert_allclose(model_of()(anchor, variant).backbone.numpy(), anchor[:, -1].numpy() / 2.0, rtol=1e-6)


def test_scaled_features_with_their_scale_give_the_same_latents() -> None:
    anchor, variant = inputs()
    torch.manual_seed(0)
    rescaled = DualStream(HOPS, ANCHOR, VARIANT, 2.0 * 8, 3.0 * 4, CONFIG)
    for one, two in zip(model_of()(anchor, variant), rescaled(anchor * 8, variant * 4), strict=True):
        torch.testing.assert_close(one, two)


def test_cells_do_not_influence_one_another() -> None:
    model = model_of()
    anchor, variant = inputs()
    together = model(anchor, variant)
    alone = model(anchor[3:5], variant[3:5])
    for one, two in zip(alone, together, strict=True):
        torch.testing.assert_close(one, two[3:5], atol=1e-6, rtol=1e-5)


def test_gate_equals_the_formula() -> None:
    """z_A + rho sigmoid(G [z_A, z_V]) * clip(W LN(z_V), |z_A|), in NumPy."""
    model = model_of()
    with torch.no_grad():
        model.variant_map.weight.mul_(10)
    latent = model(*inputs())
    z_a, z_v = latent.anchor.detach().numpy().astype(float), latent.variant.detach().numpy().astype(float)
    weight = {name: value.detach().numpy().astype(float) for name, value in model.state_dict().items()}
    gate = 1 / (1 + np.exp(-(np.hstack([z_a, z_v]) @ weight["gate.weight"].T + weight["gate.bias"])))
    centred = (z_v - z_v.mean(axis=1, keepdims=True)) / np.sqrt(z_v.var(axis=1, keepdims=True) + 1e-5)
    normed = centred * weight["variant_norm.weight"] + weight["variant_norm.bias"]
    detail = normed @ weight["variant_map.weight"].T + weight["variant_map.bias"]
    longest = np.linalg.norm(z_a, axis=1) / np.linalg.norm(detail, axis=1)
    assert (longest < 1).any()
    assert (longest > 1).any()
    detail *= np.minimum(longest, 1)[:, None]
    np.testing.assert_allclose(latent.fused.detach().numpy(), z_a + 0.2 * gate * detail, atol=1e-5)


def test_single_stream() -> None:
    """Without Variants the embedding is the Anchor stream, and there is nothing of the other to train."""
    model = model_of(variant_dims=0)
    anchor, variant = inputs(variant_dims=0)
    latent = model(anchor, variant)
    assert model.single_stream
    assert torch.equal(latent.fused, latent.anchor)
    assert not latent.variant.any()
    check_bounds(latent, 0.1, 0.2)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"anchor_encoder"}


def test_no_gradient_reaches_the_cached_features(tmp_path: Path) -> None:
    """Features come from read-only memory maps, are copied, and stay leaves without gradients."""
    from schelix_scale.training.data import CachedFeatures
    from tests.graph.test_operator import random_operator

    n = 30
    anchor, variant = (values.numpy() for values in inputs(n))
    np.save(tmp_path / "anchor.npy", anchor)
    np.save(tmp_path / "variant.npy", variant)
    maps = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("anchor", "variant")]
    features = CachedFeatures("id", random_operator(n, 4, 0), *maps, np.arange(n) % 3)
    rows = np.array([5, 1, 5, 29])
    cells = features.cells(rows, torch.device("cpu"))
    assert torch.equal(cells.anchor, torch.from_numpy(anchor[rows]))
    assert torch.equal(cells.variant, torch.from_numpy(variant[rows]))
    assert cells.batch.tolist() == [2, 1, 2, 2]
    model = model_of()
    latent = model(cells.anchor, cells.variant)
    torch.autograd.backward(latent.fused.square().sum())
    for given_ in (cells.anchor, cells.variant):
        assert not given_.requires_grad
        assert given_.grad is None
        assert given_.is_leaf
    assert not latent.backbone.requires_grad
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not model.anchor_scale.requires_grad
    np.testing.assert_array_equal(np.load(tmp_path / "anchor.npy"), anchor)
    scale = np.sqrt((anchor[:, -1].astype(float) ** 2).sum(axis=1).mean())
    assert features.scales()[0] == pytest.approx(scale, rel=1e-5)
