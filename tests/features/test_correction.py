"""The closed-form correction against a dense weighted ridge and against harmonypy itself."""

from __future__ import annotations

import numpy as np
import pytest

from schelix_scale.features.correction import MixtureCorrection, fit_correction, mixture_shift, ridge_shifts
from schelix_scale.genes.clusters import run_harmony
from tests.synthetic import gaussian_cells

N_BATCHES = 3
Fitted = tuple[np.ndarray, np.ndarray, np.ndarray, MixtureCorrection]


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    z_nd, type_n, batch_n = gaussian_cells(n=900, shift=2.0)
    return z_nd, type_n, batch_n, fit_correction(z_nd, batch_n, N_BATCHES, seed=0, threads=1)


def random_layout(seed: int, n: int = 120, k: int = 4, b: int = 5, d: int = 3) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    batch_n = rng.integers(0, b, n)
    weights_nk = rng.dirichlet(np.full(k, 0.3), n)
    z_nd = rng.normal(size=(n, d)) + rng.normal(size=(b, d))[batch_n] + 3
    return z_nd, batch_n, weights_nk


def dense_ridge(z_nd: np.ndarray, batch_n: np.ndarray, weight_n: np.ndarray, b: int) -> np.ndarray:
    """Least squares with an intercept that is not penalised; the penalty is rows of sqrt(ridge) below the data.

    As in Harmony 2, a batch's ridge is 0.2 of the weight that it had if the cluster were mixed as all cells are.
    """
    n = len(batch_n)
    one_hot_nb = np.array([[batch == column for column in range(b)] for batch in batch_n], float)
    ridge_b = np.array([0.2 * weight_n.sum() * (batch_n == column).sum() / n for column in range(b)])
    root = np.sqrt(weight_n)[:, None]
    design = np.vstack(
        [root * np.column_stack([np.ones(n), one_hot_nb]), np.column_stack([np.zeros(b), np.diag(np.sqrt(ridge_b))])]
    )
    target = np.vstack([root * z_nd, np.zeros((b, z_nd.shape[1]))])
    return np.linalg.lstsq(design, target, rcond=None)[0][1:]


@pytest.mark.parametrize("seed", range(4))
def test_ridge_shifts_equal_a_dense_solve(seed: int) -> None:
    z_nd, batch_n, weights_nk = random_layout(seed)
    found = ridge_shifts(z_nd, batch_n, weights_nk, 5)
    assert found.shape == (4, 5, 3)
    for cluster in range(weights_nk.shape[1]):
        expected = dense_ridge(z_nd, batch_n, weights_nk[:, cluster], 5)
        np.testing.assert_allclose(found[cluster], expected, rtol=1e-7, atol=1e-9)


def test_a_batch_without_cells_is_not_shifted() -> None:
    z_nd, batch_n, weights_nk = random_layout(5)
    found = ridge_shifts(z_nd, batch_n, weights_nk, 6)
    assert not found[:, -1].any()
    np.testing.assert_allclose(found[:, :-1], ridge_shifts(z_nd, batch_n, weights_nk, 5))


def test_a_cluster_without_cells_shifts_nothing() -> None:
    z_nd, batch_n, weights_nk = random_layout(6)
    weights_nk[:, 0] = 0
    found = ridge_shifts(z_nd, batch_n, weights_nk, 5)
    assert not found[0].any()
    assert found[1].all()


def test_mixture_shift_equals_loops() -> None:
    _, batch_n, weights_nk = random_layout(7)
    shift_kbd = np.random.default_rng(0).normal(size=(4, 5, 3))
    expected = [sum(w * shift_kbd[k, b] for k, w in enumerate(row)) for row, b in zip(weights_nk, batch_n, strict=True)]
    np.testing.assert_allclose(mixture_shift(weights_nk, batch_n, shift_kbd), expected)


def test_with_harmonys_own_weights_it_is_harmonys_correction(fitted: Fitted) -> None:
    z_nd, _, batch_n, correction = fitted
    harmony = run_harmony(z_nd, batch_n, 0, 1)
    expected = np.asarray(harmony.Z_corr)
    found = z_nd - mixture_shift(np.asarray(harmony.R), batch_n, correction.shift_kbd)
    moved = np.linalg.norm(expected - z_nd)
    assert moved > 0.1 * np.linalg.norm(z_nd)
    assert np.linalg.norm(found - expected) < 2e-3 * moved


def test_closed_form_is_close_to_harmony(fitted: Fitted) -> None:
    z_nd, _, batch_n, correction = fitted
    harmony = run_harmony(z_nd, batch_n, 0, 1)
    expected = np.asarray(harmony.Z_corr)
    found = correction.apply(z_nd, batch_n)
    assert found.dtype == np.float32
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    weights = correction.responsibilities(expected, batch_n)
    assert np.abs(weights - np.asarray(harmony.R)).sum(axis=1).mean() / 2 < 0.05


def test_responsibilities_are_shares(fitted: Fitted) -> None:
    z_nd, _, batch_n, correction = fitted
    rng = np.random.default_rng(1)
    anywhere = np.vstack([z_nd, 100 * rng.normal(size=z_nd.shape), np.zeros((1, z_nd.shape[1]))])
    weights = correction.responsibilities(anywhere, np.concatenate([batch_n, batch_n, [0]]))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    assert (weights >= 0).all()


def test_responsibilities_equal_the_formula(fitted: Fitted) -> None:
    """Harmony's soft k-means: exp(-|z - Y|^2 / sigma) of unit vectors, times (E / O)^theta of the cell's batch."""
    z_nd, _, batch_n, correction = fitted
    for cell in range(0, 900, 90):
        unit = z_nd[cell] / np.linalg.norm(z_nd[cell])
        away = np.array([((unit - centre) ** 2).sum() for centre in correction.centroids_kd.astype(float)])
        score = np.exp(-away / 0.1 + correction.penalty_kb[:, batch_n[cell]])
        found = correction.responsibilities(z_nd[cell : cell + 1], batch_n[cell : cell + 1])
        np.testing.assert_allclose(found[0], score / score.sum(), rtol=1e-4, atol=1e-7)


def distance_of_batches(z_nd: np.ndarray, type_n: np.ndarray, batch_n: np.ndarray) -> float:
    """Mean distance of a batch's centre from its type's."""
    away = [
        np.linalg.norm(z_nd[(type_n == t) & (batch_n == b)].mean(axis=0) - z_nd[type_n == t].mean(axis=0))
        for t in np.unique(type_n)
        for b in np.unique(batch_n)
    ]
    return float(np.mean(away))


def test_planted_shift_is_removed_and_types_are_kept(fitted: Fitted) -> None:
    z_nd, type_n, batch_n, correction = fitted
    corrected = correction.apply(z_nd, batch_n)
    assert distance_of_batches(corrected, type_n, batch_n) < 0.2 * distance_of_batches(z_nd, type_n, batch_n)
    centres = [np.array([z[type_n == t].mean(axis=0) for t in range(4)]) for z in (z_nd, corrected)]
    between = [np.linalg.norm(c[:, None] - c[None], axis=2)[np.triu_indices(4, 1)] for c in centres]
    np.testing.assert_allclose(between[1], between[0], rtol=0.1)


def test_new_cells_are_corrected_as_those_of_the_sketch(fitted: Fitted) -> None:
    """Fitted on half of the cells, the other half loses its batch shift too."""
    z_nd, type_n, batch_n, _ = fitted
    half = np.arange(len(z_nd)) % 2 == 0
    correction = fit_correction(z_nd[half], batch_n[half], N_BATCHES, seed=0, threads=1)
    new, types, batches = z_nd[~half], type_n[~half], batch_n[~half]
    corrected = correction.apply(new, batches)
    assert distance_of_batches(corrected, types, batches) < 0.3 * distance_of_batches(new, types, batches)


def test_a_cell_is_corrected_alone_as_in_company(fitted: Fitted) -> None:
    z_nd, _, batch_n, correction = fitted
    together = correction.apply(z_nd, batch_n)
    alone = np.vstack([correction.apply(z_nd[i : i + 1], batch_n[i : i + 1]) for i in range(60)])
    np.testing.assert_allclose(alone, together[:60], atol=1e-5)
    corrected, weights_nk = correction.apply_with_weights(z_nd, batch_n)
    np.testing.assert_array_equal(corrected, together)
    np.testing.assert_allclose(together, z_nd - mixture_shift(weights_nk, batch_n, correction.shift_kbd), atol=1e-5)
    order = np.random.default_rng(2).permutation(len(z_nd))
    np.testing.assert_allclose(correction.apply(z_nd[order], batch_n[order]), together[order], atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_strength_is_the_share_of_the_displacement(fitted: Fitted, strength: float) -> None:
    """The soft weights are those of the whole displacement, so that cells move on a straight line."""
    z_nd, _, batch_n, correction = fitted
    found, weights_nk = correction.apply_with_weights(z_nd, batch_n, strength)
    whole, expected_nk = correction.apply_with_weights(z_nd, batch_n)
    np.testing.assert_array_equal(weights_nk, expected_nk)
    assert np.linalg.norm(whole - z_nd, axis=1).min() > 0.5
    np.testing.assert_allclose(found, (1 - strength) * z_nd + strength * whole, atol=1e-5)


def test_large_shifts_need_the_rounds_that_follow_the_first() -> None:
    """R of the uncorrected cell alone would be off by .019 here."""
    z_nd, _, batch_n = gaussian_cells(n=900, shift=4.0, seed=1)
    expected = np.asarray(run_harmony(z_nd, batch_n, 0, 1).Z_corr)
    found = fit_correction(z_nd, batch_n, N_BATCHES, seed=0, threads=1).apply(z_nd, batch_n)
    assert np.linalg.norm(found - expected) < 0.005 * np.linalg.norm(expected)


def test_same_seed_same_correction(fitted: Fitted) -> None:
    z_nd, _, batch_n, correction = fitted
    again = fit_correction(z_nd, batch_n, N_BATCHES, seed=0, threads=1)
    for name in ("centroids_kd", "penalty_kb", "shift_kbd"):
        np.testing.assert_array_equal(getattr(again, name), getattr(correction, name))
