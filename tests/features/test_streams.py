"""Both streams together: what is fitted on a sketch encodes any cell by itself and survives being saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA

from schelix_scale.config import FeaturesConfig
from schelix_scale.features.projection import fit_projection
from schelix_scale.features.streams import Streams, fit_streams
from schelix_scale.genes.partition import Partition
from tests.synthetic import Synthetic, make_cells
from tests.unmeasured import two_of_three, without

CONFIG = FeaturesConfig(anchor_dims=7, variant_dims=5, scale_power=1.0)


@pytest.fixture(scope="module")
def cells() -> Synthetic:
    return make_cells(n_types=4, n_batches=3, per_group=30, n_genes=90, seed=8)


def split(cells: Synthetic, single_stream: bool, variants: bool = True) -> Partition:
    """The planted roles; each tenth gene is not highly variable."""
    role = np.where(cells.sensitive_g & (variants and not single_stream), "variant", "anchor").astype(object)
    role[::10] = "unused"
    return Partition(pd.DataFrame({"role": role}), 0.1, 1.0, single_stream, 1, 0.5)


@pytest.fixture(scope="module")
def streams(cells: Synthetic) -> Streams:
    return fit_streams(cells.log_csr, cells.batch_n, 3, split(cells, False), CONFIG, seed=0, threads=1)


def fit(cells: Synthetic, partition: Partition, strength: float = 1.0, correct: bool = True) -> Streams:
    config = CONFIG.model_copy(update={"correct": correct})
    return fit_streams(cells.log_csr, cells.batch_n, 3, partition, config, 0, 1, strength)


def assert_components(found_nd: np.ndarray, cells: Synthetic, chosen_g: np.ndarray, weight_g: np.ndarray) -> None:
    """Compare with the dense PCA of the chosen genes, but each tenth, times their weights."""
    genes = np.flatnonzero(chosen_g & (np.arange(90) % 10 != 0))
    values = cells.log_ng[:, genes]
    values = np.minimum(values, values.mean(axis=0) + 10 * values.std(axis=0))
    scaled = (values - values.mean(axis=0)) / values.std(axis=0) * weight_g[genes]
    expected = PCA(found_nd.shape[1], svd_solver="full").fit_transform(scaled)
    signs = np.sign((found_nd * expected).sum(axis=0))
    np.testing.assert_allclose(found_nd * signs, expected, atol=1e-3)


def test_anchor_components_are_those_of_the_anchors(cells: Synthetic, streams: Streams) -> None:
    found = streams.encode(cells.log_csr, cells.batch_n)
    assert_components(found.anchor, cells, ~cells.sensitive_g, np.ones(90))
    assert streams.dims == (7, 5)
    assert (found.anchor.shape[1], found.anchor_corrected.shape[1], found.variant.shape[1]) == (7, 7, 5)


def test_variants_lose_their_batch_shift_too(cells: Synthetic, streams: Streams) -> None:
    """Mean distance of a batch's centre from its type's; the ridge leaves 1 - 1 / 1.2 of a shift, a sixth."""

    def displacement(z_nd: np.ndarray) -> float:
        away = [
            z_nd[(cells.type_n == kind) & (cells.batch_n == batch)].mean(axis=0)
            - z_nd[cells.type_n == kind].mean(axis=0)
            for kind in range(4)
            for batch in range(3)
        ]
        return float(np.linalg.norm(away, axis=1).mean())

    assert streams.variant is not None
    before = streams.variant.apply(cells.log_csr)
    after = streams.encode(cells.log_csr, cells.batch_n).variant
    assert displacement(before) > 3
    assert displacement(after) < 0.25 * displacement(before)


def test_blocks_are_encoded_alike(cells: Synthetic, streams: Streams) -> None:
    together = streams.encode(cells.log_csr, cells.batch_n)
    for rows in (np.arange(50), np.array([300, 7, 7]), np.array([11])):
        block = streams.encode(cells.log_csr[rows], cells.batch_n[rows])
        for name in ("anchor", "anchor_corrected", "variant"):
            np.testing.assert_allclose(getattr(block, name), getattr(together, name)[rows], atol=2e-4, err_msg=name)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_below_full_strength_variants_are_among_the_anchors(cells: Synthetic, strength: float) -> None:
    found = fit(cells, split(cells, False), strength).encode(cells.log_csr, cells.batch_n)
    chosen = ~cells.sensitive_g | (strength < 1)
    assert_components(found.anchor, cells, chosen, np.where(cells.sensitive_g, 1 - strength, 1.0))


@pytest.mark.parametrize("strength", [0.0, 0.4])
def test_strength_scales_the_displacement_of_both_streams(cells: Synthetic, strength: float) -> None:
    """The whole displacement is that of the same projections and clusters, told by the fitted correction."""
    streams = fit(cells, split(cells, False), strength)
    found = streams.encode(cells.log_csr, cells.batch_n)
    before = streams.variant.apply(cells.log_csr) if streams.variant is not None else np.zeros((0, 0))
    if strength == 0:
        np.testing.assert_array_equal(found.anchor_corrected, found.anchor)
        np.testing.assert_array_equal(found.variant, before)
        return
    assert streams.correction is not None
    assert streams.variant_shift_kbd is not None
    whole, weights_nk = streams.correction.apply_with_weights(found.anchor, cells.batch_n)
    moved = found.anchor - found.anchor_corrected
    assert np.linalg.norm(moved) > 100 * 1e-4
    np.testing.assert_allclose(moved, strength * (found.anchor - whole), atol=1e-4)
    shift_nv = np.einsum("nk,nkv->nv", weights_nk, streams.variant_shift_kbd.transpose(1, 0, 2)[cells.batch_n])
    np.testing.assert_allclose(before - found.variant, strength * shift_nv, atol=1e-4)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_single_stream_is_the_same_at_any_strength(cells: Synthetic, strength: float) -> None:
    found = fit(cells, split(cells, True), strength).encode(cells.log_csr, cells.batch_n)
    assert_components(found.anchor, cells, np.ones(90, bool), np.ones(90))
    np.testing.assert_array_equal(found.anchor_corrected, found.anchor)


def test_without_a_correction_both_streams_are_plain_components(cells: Synthetic) -> None:
    found = fit(cells, split(cells, False), correct=False).encode(cells.log_csr, cells.batch_n)
    assert_components(found.anchor_corrected, cells, ~cells.sensitive_g, np.ones(90))
    assert_components(found.variant, cells, cells.sensitive_g, np.ones(90))


def test_without_variants_the_anchors_are_corrected(cells: Synthetic) -> None:
    streams = fit(cells, split(cells, False, variants=False))
    found = streams.encode(cells.log_csr, cells.batch_n)
    assert streams.dims == (7, 0)
    assert found.variant.shape == (len(cells.batch_n), 0)
    assert_components(found.anchor, cells, np.ones(90, bool), np.ones(90))
    spread = [
        np.mean([z[cells.batch_n == b].mean(axis=0) ** 2 for b in range(3)])
        for z in (found.anchor, found.anchor_corrected)
    ]
    assert spread[1] < 0.1 * spread[0]


@pytest.mark.parametrize("strength", [1.0, 0.6, 0.0])
@pytest.mark.parametrize(
    ("single_stream", "variants", "correct"),
    [(False, True, True), (False, True, False), (False, False, True), (True, True, True)],
)
def test_saved_and_loaded(
    cells: Synthetic, single_stream: bool, variants: bool, correct: bool, strength: float, tmp_path: Path
) -> None:
    fitted = fit(cells, split(cells, single_stream, variants), strength, correct)
    fitted.save(tmp_path / "streams.npz")
    loaded = Streams.load(tmp_path / "streams.npz")
    one, two = (streams.encode(cells.log_csr, cells.batch_n) for streams in (fitted, loaded))
    for name in ("anchor", "anchor_corrected", "variant"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
        assert getattr(one, name).dtype == np.float32
    if single_stream:
        assert fitted.dims == (7, 0)
        assert one.variant.shape == (len(cells.batch_n), 0)
        np.testing.assert_array_equal(one.anchor_corrected, one.anchor)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_saved_and_loaded_with_what_was_measured(cells: Synthetic, strength: float, tmp_path: Path) -> None:
    """Both streams get the groups, also from a file, and any part of the cells by itself."""
    measured = two_of_three(cells.batch_n, 90)
    x_ng, group_n = without(cells.log_ng, measured), measured.group_n
    fitted = fit_streams(x_ng, cells.batch_n, 3, split(cells, False), CONFIG, 0, 1, strength, measured)
    fitted.save(tmp_path / "streams.npz")
    loaded = Streams.load(tmp_path / "streams.npz")
    whole = fitted.encode(x_ng, cells.batch_n, group_n)
    rows = np.arange(1, len(group_n), 3)
    part = loaded.encode(x_ng[rows], cells.batch_n[rows], group_n[rows])
    for name in ("anchor", "anchor_corrected", "variant"):
        np.testing.assert_allclose(getattr(part, name), getattr(whole, name)[rows], rtol=1e-4, atol=1e-4)
    roles = split(cells, False).genes["role"]
    anchor, variant = (
        fit_projection(x_ng, np.flatnonzero(roles == role), dims, measured=measured)[1]
        for role, dims in (("anchor", 7), ("variant", 5))
    )
    plain = fit_streams(
        x_ng, cells.batch_n, 3, split(cells, False), CONFIG.model_copy(update={"correct": False}), 0, 1, 1.0, measured
    )
    np.testing.assert_allclose(plain.encode(x_ng, cells.batch_n, group_n).variant, variant, atol=1e-3)
    if strength == 1:
        np.testing.assert_allclose(whole.anchor, anchor, atol=1e-3)
    else:
        assert np.abs(whole.anchor - anchor).max() > 0.1, "Variants count too"
