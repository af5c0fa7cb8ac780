"""The strength of a run, from plain PCA to the full method, and the ablations of its first stages."""

from __future__ import annotations

import itertools
from pathlib import Path

import anndata
import numpy as np
import pytest

import schelix_scale
from schelix_scale.config import Config, GraphConfig, TrainConfig
from schelix_scale.errors import ConfigError
from schelix_scale.pipeline import integrate
from schelix_scale.progress import QuietReporter
from schelix_scale.stages.graph import graph_settings
from schelix_scale.stages.model import train_settings

from .small_runs import SMALL, make_adata, within_and_between
from .synthetic import dense_log_normalize

SETTINGS = {**SMALL, "genes.n_hvg": 120, "embed.streams": True}
LEVELS = [0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def adata() -> anndata.AnnData:
    return make_adata()


def run(source: object, out: Path, **settings: object) -> schelix_scale.Run:
    return integrate(source, batch_key="batch", out=out, reporter=QuietReporter(), **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def runs(adata: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> dict[float, schelix_scale.Run]:
    folder = tmp_path_factory.mktemp("strength")
    return {level: run(adata, folder / str(level), strength=level) for level in LEVELS}


def dense_pca(adata: anndata.AnnData, chosen_g: np.ndarray, dims: int) -> np.ndarray:
    """Principal components of the genes / sd**.75, by numpy's SVD of the dense matrix."""
    x_nh = dense_log_normalize(adata.X.toarray().astype(np.float64))[:, chosen_g]
    x_nh = np.minimum(x_nh, x_nh.mean(axis=0) + 10 * x_nh.std(axis=0))
    scaled = (x_nh - x_nh.mean(axis=0)) / x_nh.std(axis=0) ** 0.75
    u, s, _ = np.linalg.svd(scaled, full_matrices=False)
    return (u * s)[:, :dims]


def assert_same_up_to_sign(found_nd: np.ndarray, expected_nd: np.ndarray) -> None:
    signs = np.sign((found_nd * expected_nd).sum(axis=0))
    np.testing.assert_allclose(found_nd * signs, expected_nd, atol=1e-3 * np.abs(expected_nd).max())


def test_at_0_it_is_the_pca_of_all_variable_genes(adata: anndata.AnnData, runs: dict[float, schelix_scale.Run]) -> None:
    variable = (runs[0.0].genes["role"] != "unused").to_numpy()
    assert variable.sum() == 120
    expected = dense_pca(adata, variable, 10)
    expected /= np.sqrt((expected**2).sum(axis=1).mean())  # unit RMS norm
    assert_same_up_to_sign(runs[0.0].embedding, expected)
    obsm = runs[0.0].to_anndata().obsm
    np.testing.assert_array_equal(obsm["X_schelix"], obsm["X_schelix_backbone"])


def test_at_1_it_is_a_run_without_the_setting(
    adata: anndata.AnnData, runs: dict[float, schelix_scale.Run], tmp_path: Path
) -> None:
    plain = run(adata, tmp_path / "run").to_anndata().obsm
    full = runs[1.0].to_anndata().obsm
    assert set(plain) == set(full) == {"X_schelix", *(f"X_schelix_{s}" for s in ("backbone", "anchor", "variant"))}
    for key, found in full.items():
        np.testing.assert_array_equal(found, plain[key])
    assert not np.array_equal(full["X_schelix"], full["X_schelix_backbone"])


def test_batches_separate_less_with_every_step(adata: anndata.AnnData, runs: dict[float, schelix_scale.Run]) -> None:
    types, batches = (adata.obs[key].cat.codes.to_numpy() for key in ("cell_type", "batch"))
    apart = [within_and_between(runs[level].embedding, batches) for level in LEVELS]
    assert apart[0] > 0.15, "the data must have a batch effect for this test to mean anything"
    assert apart[1] < 0.7 * apart[0]
    assert apart[2] < 0.3 * apart[1]
    together = [within_and_between(runs[level].embedding, types) for level in LEVELS]
    assert together[0] < together[1] < together[2]


def test_genes_are_the_same_at_any_strength(runs: dict[float, schelix_scale.Run]) -> None:
    """Fingerprints say what would be done again; the first stage would not."""
    for one, other in itertools.combinations(LEVELS, 2):
        records = runs[one].manifest["stages"], runs[other].manifest["stages"]
        same = [name for name in records[0] if records[0][name]["fingerprint"] == records[1][name]["fingerprint"]]
        assert same == ["genes"]
        assert runs[one].genes.equals(runs[other].genes)


@pytest.mark.parametrize(("strength", "theta", "restart"), [(0.0, 0.0, 1.0), (0.25, 0.2, 0.825), (1.0, 0.8, 0.3)])
def test_settings_of_the_graph(strength: float, theta: float, restart: float) -> None:
    found = graph_settings(Config(strength=strength, graph=GraphConfig(k=9, theta=0.8, restart=0.3)))
    assert (found.theta, found.restart) == (pytest.approx(theta, abs=1e-15), pytest.approx(restart, abs=1e-15))
    assert found.model_copy(update={"theta": 1.0, "restart": 0.3}) == GraphConfig(k=9)


@pytest.mark.parametrize("restart", [0.0, 0.1, 0.3, 0.7, 0.97, 1.0])
def test_ends_are_exact(restart: float) -> None:
    graph = GraphConfig(restart=restart, theta=0.7)
    assert graph_settings(Config(graph=graph)) == graph
    assert graph_settings(Config(strength=0.0, graph=graph)).restart == 1
    assert train_settings(Config()) == TrainConfig()


def test_settings_of_training() -> None:
    train = TrainConfig(anchor_residual=0.4, gate=0.2, pull=0.6, batch_size=77)
    half = train_settings(Config(strength=0.5, train=train))
    assert half == TrainConfig(anchor_residual=0.2, gate=0.1, pull=0.3, batch_size=77)
    assert not train_settings(Config(strength=0.0, train=train)).enabled
    assert not train_settings(Config(strength=0.5, train=TrainConfig(enabled=False))).enabled


@pytest.mark.slow
def test_a_single_stream_is_smoothed_by_its_strength(tmp_path: Path) -> None:
    """Nothing is corrected; the embedding lies between the PCA of all variable genes and the full run's."""
    adata = make_adata(batch_strength=0.0)
    found = {level: run(adata, tmp_path / str(level), strength=level) for level in LEVELS}
    assert all(result.manifest["summary"]["single_stream"] for result in found.values())
    diffused = {}
    for level, result in found.items():
        name = result.manifest["stages"]["graph"]["details"]["operator_id"]
        diffused[level] = np.load(result.path / "diffused" / name / "anchor.npy")
        np.testing.assert_array_equal(diffused[level][:, 0], np.load(result.path / "features" / "anchor.npy"))
        np.testing.assert_array_equal(diffused[level][:, 0], diffused[0.0][:, 0])
    start = diffused[0.0][:, 0]
    assert_same_up_to_sign(start, dense_pca(adata, (found[0.0].genes["role"] != "unused").to_numpy(), 10))
    np.testing.assert_array_equal(diffused[0.0], np.repeat(start[:, None], 3, axis=1))
    away = [np.linalg.norm(diffused[level][:, 1] - start) for level in LEVELS]
    assert away[2] > 0
    np.testing.assert_allclose(away[1], 0.5 * away[2], rtol=1e-4)


def test_strength_0_says_what_it_is(adata: anndata.AnnData, tmp_path: Path) -> None:
    reporter = QuietReporter()
    integrate(adata, batch_key="batch", out=tmp_path / "run", strength=0, reporter=reporter, **SETTINGS)
    assert any(message.startswith("strength 0: the embedding is the PCA") for message in reporter.messages)
    assert not any("graph kept" in message or "refresh" in message for message in reporter.messages)


@pytest.mark.slow  # among the longest of the suite
def test_without_a_partition_anchors_are_corrected_and_batches_reweighted(
    adata: anndata.AnnData, tmp_path: Path
) -> None:
    """There is batch signal, so that nothing is left out but the Variants."""
    settings = {"genes.partition": "all", "train.enabled": False}
    none = run(adata, tmp_path / "none", **settings)
    plain = run(adata, tmp_path / "plain", **settings, **{"graph.theta": 0})
    summary = none.manifest["summary"]
    assert (summary["single_stream"], summary["anchors"], summary["variants"]) == (False, 120, 0)
    assert not (none.path / "features" / "variant.npy").exists()
    batches = adata.obs["batch"].cat.codes.to_numpy()
    before, after = (np.load(none.path / "features" / f"{name}.npy") for name in ("anchor", "anchor_corrected"))
    assert_same_up_to_sign(before, dense_pca(adata, (none.genes["role"] == "anchor").to_numpy(), 10))
    assert within_and_between(after, batches) < 0.2 * within_and_between(before, batches)
    (weighted,), (unweighted,) = (list(result.path.glob("graph/*/weights.npy")) for result in (none, plain))
    near_nk = batches[np.load(weighted.with_name("indices.npy"))]
    share_nk = np.array([[(row == batch).mean() for batch in row] for row in near_nk])
    expected_nk = np.load(unweighted) / share_nk
    expected_nk /= expected_nk.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.load(weighted), expected_nk, rtol=1e-4)
    assert np.abs(np.load(weighted) - np.load(unweighted)).max() > 0.01


def test_without_a_partition_the_whole_run_finishes(adata: anndata.AnnData, tmp_path: Path) -> None:
    reporter, settings = QuietReporter(), {**SETTINGS, "genes.partition": "all", "strength": 0.5}
    result = integrate(adata, batch_key="batch", out=tmp_path / "run", reporter=reporter, **settings)
    assert any("120 Anchors and 0 Variants (genes are not divided)" in message for message in reporter.messages)
    assert set(result.to_anndata().obsm) == {"X_schelix", "X_schelix_backbone", "X_schelix_anchor"}
    assert result.verify() == []


def test_random_anchors(adata: anndata.AnnData, runs: dict[float, schelix_scale.Run], tmp_path: Path) -> None:
    result = run(adata, tmp_path / "run", **{"genes.partition": "random"})
    assert result.manifest["summary"]["anchors"] == runs[1.0].manifest["summary"]["anchors"]
    assert not (result.genes["role"] == runs[1.0].genes["role"]).all()
    assert result.to_anndata().obsm["X_schelix_variant"].any()


def test_without_a_correction(adata: anndata.AnnData, tmp_path: Path) -> None:
    """Features are plain components; diffusion still makes neighbours alike."""
    result = run(adata, tmp_path / "run", **{"features.correct": False, "train.enabled": False})
    features = {path.stem: np.load(path) for path in (result.path / "features").glob("*.npy")}
    roles = result.genes["role"]
    for role, name in (("anchor", "anchor"), ("anchor", "anchor_corrected"), ("variant", "variant")):
        assert_same_up_to_sign(features[name], dense_pca(adata, (roles == role).to_numpy(), 10))
    assert result.manifest["summary"]["single_stream"] is False
    ((last),) = result.path.glob("diffused/*/anchor.npy")
    types = adata.obs["cell_type"].cat.codes.to_numpy()
    hops = np.load(last)
    assert within_and_between(hops[:, -1], types) > within_and_between(hops[:, 0], types)


@pytest.mark.slow
def test_concatenated_fuse_puts_the_variants_beside(adata: anndata.AnnData, tmp_path: Path) -> None:
    """The gate's embedding, and Variant latents of length .4 beside it, in their directions."""
    gate = run(adata, tmp_path / "gate").to_anndata().obsm
    beside = run(adata, tmp_path / "beside", **{"embed.fuse": "concatenate"}).embedding
    assert beside.shape == (adata.n_obs, 20)
    np.testing.assert_array_equal(beside[:, :10], gate["X_schelix"])
    variant = gate["X_schelix_variant"].astype(float)
    expected = 0.4 * variant / np.linalg.norm(variant, axis=1, keepdims=True)
    np.testing.assert_allclose(beside[:, 10:], expected, atol=1e-5)
    with pytest.raises(ConfigError, match="it needs strength = 1"):
        run(adata, tmp_path / "refused", strength=0.5, **{"embed.fuse": "concatenate"})


def test_untrained_streams_are_not_written(adata: anndata.AnnData, tmp_path: Path) -> None:
    obsm = run(adata, tmp_path / "run", **{"train.enabled": False}).to_anndata().obsm
    assert set(obsm) == {"X_schelix", "X_schelix_backbone"}
    np.testing.assert_array_equal(obsm["X_schelix"], obsm["X_schelix_backbone"])
