"""The variance decomposition against plain loops over clusters, levels and batches (METHOD section 2, step 3)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from schelix_scale.genes.sensitivity import batch_sensitivity
from tests.unmeasured import measured_by, two_of_three, without


def by_loops(
    x_ng: np.ndarray, cluster_n: np.ndarray, batch_n: np.ndarray, level_n: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Beta, gamma and w of every gene; one gene, one cluster, one group at a time."""
    beta, gamma, noise = [], [], []
    for gene in range(x_ng.shape[1]):
        x = x_ng[:, gene]
        groups = {}
        for c in set(cluster_n.tolist()):
            for level in set(level_n.tolist()):
                for b in set(batch_n.tolist()):
                    members = x[(cluster_n == c) & (level_n == level) & (batch_n == b)]
                    if len(members) >= 10:
                        groups[c, level, b] = members
        everything = np.concatenate(list(groups.values()))
        strata = {(c, level) for c, level, _ in groups}
        clusters = {c for c, _, _ in groups}
        w = sum(((m - m.mean()) ** 2).sum() for m in groups.values()) / (len(everything) - len(groups))
        between = 0.0
        for stratum in strata:
            inside = [m for key, m in groups.items() if key[:2] == stratum]
            centre = np.concatenate(inside).mean()
            between += sum(len(m) * (m.mean() - centre) ** 2 for m in inside)
        across = 0.0
        for cluster in clusters:
            inside = np.concatenate([m for key, m in groups.items() if key[0] == cluster])
            across += len(inside) * (inside.mean() - everything.mean()) ** 2
        df = len(groups) - len(strata)
        beta.append(max(0.0, (between - df * w) / len(everything)))
        gamma.append(max(0.0, (across - len(clusters) * w) / len(everything)))
        noise.append(w)
    return np.array(beta), np.array(gamma), np.array(noise)


def layout(seed: int, n: int = 700, g: int = 12) -> tuple[np.ndarray, ...]:
    """Unbalanced groups, some of them of fewer than 10 cells, clusters and batches with gaps in their codes."""
    rng = np.random.default_rng(seed)
    cluster_n = rng.choice([0, 2, 3, 9], n, p=[0.5, 0.3, 0.15, 0.05])
    batch_n = rng.choice([0, 1, 4], n, p=[0.6, 0.3, 0.1])
    level_n = rng.choice([0, 1], n)
    x_ng = rng.normal(size=(4, g))[rng.permutation(10)[cluster_n] % 4] * np.linspace(0, 1, g)
    x_ng = x_ng + rng.normal(size=(5, g))[batch_n] * np.linspace(0.5, 0, g) + 0.8 * rng.normal(size=(n, g))
    return np.maximum(x_ng, 0), cluster_n, batch_n, level_n


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("protect", [False, True])
def test_equals_loops(seed: int, protect: bool) -> None:
    x_ng, cluster_n, batch_n, level_n = layout(seed)
    sizes = np.unique(np.column_stack([cluster_n, batch_n, level_n]), axis=0, return_counts=True)[1]
    assert sizes.min() < 10 < sizes.max()
    expected = by_loops(x_ng, cluster_n, batch_n, level_n if protect else np.zeros_like(level_n))
    found = batch_sensitivity(sparse.csr_matrix(x_ng), cluster_n, batch_n, level_n if protect else None)
    for one, other in zip((found.beta, found.gamma, found.within), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)
    beta, gamma, _ = expected
    assert 0 < (beta > 0).mean() <= 1
    np.testing.assert_allclose(found.rho, beta / np.maximum(beta + gamma, 1e-12), rtol=1e-6, atol=1e-10)


def test_groups_of_nine_cells_count_for_nothing() -> None:
    """The tenth cell of a group brings all ten in."""
    x_ng, cluster_n, batch_n, _ = layout(4)
    lonely = np.flatnonzero(batch_n == 4)
    cluster_n[lonely] = 0
    without = np.setdiff1d(np.arange(len(x_ng)), lonely)
    x_ng[lonely] += 5
    alone = batch_sensitivity(sparse.csr_matrix(x_ng[without]), cluster_n[without], batch_n[without])
    nine = np.sort(np.concatenate([without, lonely[:9]]))
    ten = np.sort(np.concatenate([without, lonely[:10]]))
    found = batch_sensitivity(sparse.csr_matrix(x_ng[nine]), cluster_n[nine], batch_n[nine])
    np.testing.assert_allclose(found.beta, alone.beta, rtol=1e-12)
    np.testing.assert_allclose(found.gamma, alone.gamma, rtol=1e-12)
    found = batch_sensitivity(sparse.csr_matrix(x_ng[ten]), cluster_n[ten], batch_n[ten])
    assert (found.beta > alone.beta + 0.1).all()


def test_no_group_is_large_enough() -> None:
    rng = np.random.default_rng(0)
    found = batch_sensitivity(sparse.csr_matrix(rng.random((50, 4))), np.arange(50), np.arange(50) % 2)
    assert not found.beta.any()
    assert not found.rho.any()


def test_noise_alone_is_no_batch_effect() -> None:
    """Before it is debiased, beta of pure noise would be df w / N = 19 / 500 here; afterwards it is 0 on average."""
    rng = np.random.default_rng(1)
    x_ng = rng.normal(size=(500, 3000))
    found = batch_sensitivity(sparse.csr_matrix(x_ng), np.zeros(500, int), np.repeat(np.arange(20), 25))
    naive = 19 / 500
    spread = np.sqrt(2 * 19) / 500  # the standard deviation of chi2(19) / 500
    # E max(0, X) of a centred X of this spread is about 0.4 spread
    assert found.beta.mean() < 0.5 * spread < naive / 5
    assert 0.3 < (found.beta == 0).mean() < 0.7
    assert found.within.mean() == pytest.approx(1.0, abs=0.01)


def test_planted_variances_are_found() -> None:
    rng = np.random.default_rng(2)
    cluster_n, batch_n = np.repeat(np.arange(50), 200), np.tile(np.repeat(np.arange(10), 20), 50)
    by_cluster, by_group = rng.normal(0, 1.0, (50, 200)), rng.normal(0, 0.7, (50, 10, 200))
    x_ng = by_cluster[cluster_n] + by_group[cluster_n, batch_n] + 2.0 * rng.normal(size=(10_000, 200))
    found = batch_sensitivity(sparse.csr_matrix(x_ng), cluster_n, batch_n)
    # batches' means vary around their cluster's mean, which uses up one of ten degrees of freedom
    assert found.beta.mean() == pytest.approx(0.7**2 * 0.9, rel=0.03)
    assert found.gamma.mean() == pytest.approx((1 + 0.7**2 / 10) * 49 / 50, rel=0.05)
    assert found.within.mean() == pytest.approx(4.0, rel=0.02)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(20, 150), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_rho_is_a_share(seed: int, n: int, n_clusters: int, n_batches: int, protect: bool) -> None:
    rng = np.random.default_rng(seed)
    x_ng = sparse.csr_matrix(rng.poisson(0.5, (n, 6)) * rng.random((n, 6)))
    level_n = rng.integers(0, 2, n) if protect else None
    found = batch_sensitivity(x_ng, rng.integers(0, n_clusters, n), rng.integers(0, n_batches, n), level_n)
    assert np.isfinite(found.rho).all()
    assert ((found.rho >= 0) & (found.rho <= 1)).all()
    assert (found.beta >= 0).all()


@pytest.mark.parametrize("protect", [False, True])
def test_a_gene_is_judged_on_the_cells_that_measured_it(protect: bool) -> None:
    """Gene by gene, the result is that of a matrix of only these cells."""
    x_ng, cluster_n, batch_n, level_n = layout(1)
    group_n = np.searchsorted([0, 1, 4], batch_n)
    group_n[::7] = 1  # batches lie in several groups
    measured = two_of_three(group_n, x_ng.shape[1])
    measured.measured_pg[:2, 0] = False
    found = batch_sensitivity(without(x_ng, measured), cluster_n, batch_n, level_n if protect else None, measured)
    for gene in range(1, x_ng.shape[1]):
        rows = np.flatnonzero(measured.measured_pg[group_n, gene])
        levels = level_n[rows] if protect else np.zeros(len(rows), int)
        single = x_ng[rows][:, [gene]].astype(np.float32)
        beta, gamma, within = by_loops(single, cluster_n[rows], batch_n[rows], levels)
        assert found.beta[gene] == pytest.approx(beta[0], rel=1e-5, abs=1e-9)
        assert found.gamma[gene] == pytest.approx(gamma[0], rel=1e-5, abs=1e-9)
        assert found.within[gene] == pytest.approx(within[0], rel=1e-5)
    assert (~measured.measured_pg).any(axis=0).sum() >= 3
    as_zeros = batch_sensitivity(without(x_ng, measured), cluster_n, batch_n, level_n if protect else None)
    lost = np.flatnonzero(~measured.measured_pg.all(axis=0))
    assert (as_zeros.beta[lost] > found.beta[lost] + 0.01).any()


def test_everything_measured_changes_nothing() -> None:
    x_ng, cluster_n, batch_n, level_n = layout(2)
    values, everywhere = sparse.csr_matrix(x_ng), measured_by(batch_n, np.ones((5, x_ng.shape[1])))
    found = batch_sensitivity(values, cluster_n, batch_n, level_n, everywhere)
    expected = batch_sensitivity(values, cluster_n, batch_n, level_n)
    for name in ("beta", "gamma", "within", "rho"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.comparable == expected.comparable > 0


def test_what_cannot_be_compared_is_not_insensitive() -> None:
    """Gene 0 is measured in one batch; gene 1 in two that meet in no cluster; gene 2 everywhere."""
    rng = np.random.default_rng(0)
    cluster_n, batch_n = np.repeat([0, 0, 1, 1], 50), np.repeat([0, 1, 1, 2], 50)
    measured = measured_by(batch_n, np.array([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]))
    x_ng = rng.random((200, 4))
    found = batch_sensitivity(without(x_ng, measured), cluster_n, batch_n, None, measured)
    np.testing.assert_array_equal(found.comparable_g, [False, False, True, True])
    np.testing.assert_array_equal(found.rho[:2], 1)
    assert (found.rho[2:] < 1).all()
    assert found.comparable > 0
    few = batch_sensitivity(
        without(x_ng[:, :3], measured.of_genes(np.arange(3))), cluster_n, batch_n, None, measured.of_genes(np.arange(3))
    )
    assert few.comparable == 0, "one gene is not enough"
