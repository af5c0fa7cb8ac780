from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from schelix_scale.config import GenesConfig
from schelix_scale.errors import DataError
from schelix_scale.genes.clusters import coarse_clusters
from schelix_scale.genes.partition import Partition, choose_anchors, otsu, partition_genes
from tests.synthetic import Synthetic, make_cells

CONFIG = GenesConfig(
    iterations=4, cut="otsu", min_anchor_share=0.35, max_anchor_share=0.75, permutations=10, min_signal=0.0005
)


def partition(
    cells: Synthetic, config: GenesConfig = CONFIG, seed: int = 0, level_n: np.ndarray | None = None
) -> tuple[Partition, np.ndarray]:
    """Partition all genes but each seventh, which are not highly variable; return these positions too."""
    hvg = np.flatnonzero(np.arange(cells.log_ng.shape[1]) % 7 != 3)

    def embed(genes: np.ndarray) -> np.ndarray:
        chosen = cells.log_ng[:, genes]
        scaled = (chosen - chosen.mean(axis=0)) / np.maximum(chosen.std(axis=0), 1e-9)
        return PCA(10, svd_solver="full").fit_transform(scaled)

    names = pd.Index([f"g{i}" for i in range(cells.log_ng.shape[1])])
    found = partition_genes(cells.log_csr, names, hvg, cells.batch_n, embed, config, seed, threads=1, level_n=level_n)
    return found, hvg


@pytest.fixture(scope="module")
def shifted() -> Synthetic:
    return make_cells()


@pytest.fixture(scope="module")
def found(shifted: Synthetic) -> tuple[Partition, np.ndarray]:
    return partition(shifted)


def test_planted_genes_are_recovered(shifted: Synthetic, found: tuple[Partition, np.ndarray]) -> None:
    result, hvg = found
    planted = shifted.sensitive_g[hvg]
    assert roc_auc_score(planted, result.genes["rho"].to_numpy()[hvg]) >= 0.95
    assert (result.genes["role"].to_numpy()[hvg][planted] == "variant").mean() > 0.9
    assert not result.single_stream
    assert result.signal > 0.01


def test_table_of_genes(shifted: Synthetic, found: tuple[Partition, np.ndarray]) -> None:
    result, hvg = found
    table = result.genes
    assert list(table.columns) == ["mean", "var", "beta", "gamma", "rho", "role"]
    assert list(table.index[:2]) == ["g0", "g1"]
    np.testing.assert_allclose(table["mean"], shifted.log_ng.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(table["var"], shifted.log_ng.var(axis=0), rtol=1e-4)
    others = np.setdiff1d(np.arange(len(table)), hvg)
    assert (table["role"].iloc[others] == "unused").all()
    assert table.iloc[others][["beta", "gamma", "rho"]].isna().all(axis=None)
    chosen = table.iloc[hvg]
    np.testing.assert_allclose(chosen["rho"], chosen["beta"] / (chosen["beta"] + chosen["gamma"]))
    np.testing.assert_array_equal(chosen["role"] == "anchor", chosen["rho"] <= result.cut)
    anchors, variants = result.positions("anchor"), result.positions("variant")
    np.testing.assert_array_equal(np.sort(np.concatenate([anchors, variants])), hvg)
    assert set(table["role"].iloc[variants]) == {"variant"}


def ablated(kind: str, **changes: object) -> GenesConfig:
    return CONFIG.model_copy(update={"partition": kind, **changes})


def test_anchors_drawn_at_random(shifted: Synthetic, found: tuple[Partition, np.ndarray]) -> None:
    """As many as otherwise, the same for a seed, and of the sensitive genes as many as of the others."""
    result, hvg = found
    draws = [partition(shifted, ablated("random"), seed)[0] for seed in (0, 0, 1, 2, 3)]
    for draw, seed in zip(draws, (0, 0, 1, 2, 3), strict=True):
        wanted = len(partition(shifted, seed=seed)[0].positions("anchor"))
        assert len(draw.positions("anchor")) == wanted
        roles = [draw.positions("anchor"), draw.positions("variant")]
        np.testing.assert_array_equal(np.sort(np.concatenate(roles)), hvg)
        assert draw.cut == draw.genes["rho"].iloc[draw.positions("anchor")].max()
        assert not draw.single_stream
    np.testing.assert_array_equal(draws[0].genes["rho"], result.genes["rho"])
    np.testing.assert_array_equal(draws[0].positions("anchor"), draws[1].positions("anchor"))
    assert len({tuple(draw.positions("anchor")) for draw in draws}) == 4
    sensitive = np.mean([shifted.sensitive_g[draw.positions("anchor")].mean() for draw in draws[1:]])
    assert sensitive == pytest.approx(shifted.sensitive_g[hvg].mean(), abs=0.1)
    assert shifted.sensitive_g[result.positions("anchor")].mean() < 0.1


def test_no_partition(shifted: Synthetic, found: tuple[Partition, np.ndarray]) -> None:
    """All variable genes are Anchors, and yet it is said that batches differ."""
    result, hvg = partition(shifted, ablated("all"))
    np.testing.assert_array_equal(result.positions("anchor"), hvg)
    assert len(result.positions("variant")) == 0
    assert not result.single_stream
    assert (result.signal, result.rounds, result.cut) == (found[0].signal, 1, 1.0)


@pytest.mark.parametrize("kind", ["random", "all"])
def test_no_batch_effect_means_one_stream_in_ablations_too(kind: str) -> None:
    result, hvg = partition(make_cells(batch_strength=0.0, seed=100), ablated(kind))
    assert result.single_stream
    np.testing.assert_array_equal(result.positions("anchor"), hvg)


@pytest.mark.parametrize("seed", range(3))
def test_no_batch_effect_means_one_stream(seed: int) -> None:
    """Batches that differ in nothing: whatever rho ranks first is noise, and all genes stay Anchors."""
    result, hvg = partition(make_cells(batch_strength=0.0, seed=100 + seed))
    assert result.single_stream
    assert result.signal <= CONFIG.min_signal
    assert result.rounds == 1
    np.testing.assert_array_equal(result.positions("anchor"), hvg)
    assert len(result.positions("variant")) == 0


def test_no_batch_effect_inside_protected_levels_means_one_stream() -> None:
    """Levels crossed with batches that differ in nothing."""
    cells = make_cells(batch_strength=0.0, seed=4)
    crossed = np.random.default_rng(0).integers(0, 2, len(cells.batch_n))
    result, _ = partition(cells, level_n=crossed)
    assert result.single_stream


def test_a_weak_batch_effect_is_enough_for_two_streams() -> None:
    """A third of the genes shifted by a quarter of what is planted elsewhere, below the noise of any one cell."""
    result, hvg = partition(weak := make_cells(batch_strength=0.22, seed=6))
    assert not result.single_stream
    assert roc_auc_score(weak.sensitive_g[hvg], result.genes["rho"].to_numpy()[hvg]) > 0.9


def test_protected_response_is_not_called_batch() -> None:
    cells = make_cells(response=0.6, seed=1)
    open_, hvg = partition(cells)
    protected, _ = partition(cells, level_n=cells.condition_n)
    sensitive, responsive = cells.sensitive_g[hvg], cells.responsive_g[hvg]
    stable = ~sensitive & ~responsive
    rho_open, rho_protected = (p.genes["rho"].to_numpy()[hvg] for p in (open_, protected))
    either = responsive | stable
    assert roc_auc_score(responsive[either], rho_open[either]) > 0.95
    assert np.median(rho_protected[responsive]) < 0.01 < 0.1 < np.median(rho_open[responsive])
    assert roc_auc_score(sensitive, rho_protected) > 0.95
    roles = protected.genes["role"].to_numpy()[hvg]
    assert (roles[responsive] == "anchor").mean() > 0.9


def test_protect_that_leaves_nothing_to_compare(shifted: Synthetic) -> None:
    with pytest.raises(DataError, match="every level of the protected columns holds a single batch"):
        partition(shifted, level_n=shifted.batch_n)


@pytest.mark.parametrize("cut", ["otsu", "auto", "median"])
@pytest.mark.parametrize(("low", "high"), [(0.35, 0.75), (0.45, 0.55), (0.8, 0.9), (0.1, 0.2)])
def test_share_of_anchors_keeps_to_its_limits(shifted: Synthetic, cut: str, low: float, high: float) -> None:
    config = CONFIG.model_copy(update={"cut": cut, "min_anchor_share": low, "max_anchor_share": high, "iterations": 1})
    result, hvg = partition(shifted, config)
    share, one = len(result.positions("anchor")) / len(hvg), 1 / len(hvg)
    if cut == "median":
        assert share == pytest.approx(0.5, abs=one)
    else:
        assert low - one <= share <= high + one


def test_same_seed_same_partition(shifted: Synthetic, found: tuple[Partition, np.ndarray]) -> None:
    again, _ = partition(shifted)
    pd.testing.assert_frame_equal(again.genes, found[0].genes, check_exact=True)
    assert (again.signal, again.cut, again.rounds) == (found[0].signal, found[0].cut, found[0].rounds)


def test_stops_when_the_anchors_hold_still(shifted: Synthetic, found: tuple[Partition, np.ndarray]) -> None:
    """More rounds are allowed than are needed; the last two rounds agree to a Jaccard of .95, those before do not."""
    result, _ = found
    assert 2 <= result.rounds < CONFIG.iterations
    anchors = [
        set(partition(shifted, CONFIG.model_copy(update={"iterations": rounds}))[0].positions("anchor").tolist())
        for rounds in range(1, result.rounds + 1)
    ]
    assert anchors[-1] == set(result.positions("anchor").tolist())
    agreement = [len(a & b) / len(a | b) for a, b in pairwise(anchors)]
    assert agreement[-1] >= 0.95
    assert all(value < 0.95 for value in agreement[:-1])


def test_clusters_are_types_and_not_batches(shifted: Synthetic) -> None:
    """Share of the largest type and of the largest batch inside clusters; k-means alone separates the batches."""
    scaled = (shifted.log_ng - shifted.log_ng.mean(axis=0)) / shifted.log_ng.std(axis=0)
    pcs = PCA(10, svd_solver="full").fit_transform(scaled)
    clusters = coarse_clusters(pcs, shifted.batch_n, 0, 1)
    assert len(np.unique(clusters)) == 12  # the least number, for 1,200 cells
    plain = KMeans(12, n_init=4, random_state=0).fit_predict(pcs)

    def largest_share(codes: np.ndarray, label_n: np.ndarray) -> list[float]:
        return [np.bincount(label_n[codes == c]).max() / (codes == c).sum() for c in np.unique(codes)]

    purity, mixing = largest_share(clusters, shifted.type_n), largest_share(clusters, shifted.batch_n)
    unmixed = largest_share(plain, shifted.batch_n)
    assert np.mean(purity) > 0.95
    assert np.mean(mixing) < 0.55 < 0.6 < np.mean(unmixed)


def within_variance(values: np.ndarray, threshold: float) -> float:
    """Sum of squares inside the two groups: least where the variance between them is largest."""
    low, high = values[values <= threshold], values[values > threshold]
    return float(sum(((group - group.mean()) ** 2).sum() for group in (low, high) if len(group)))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=60))
def test_otsu_equals_brute_force(values: list[float]) -> None:
    rho = np.array(values)
    best = min(within_variance(rho, threshold) for threshold in rho)
    assert otsu(rho) in rho
    assert within_variance(rho, otsu(rho)) <= best + 1e-9


def test_otsu_finds_the_gap() -> None:
    rng = np.random.default_rng(0)
    low, high = rng.normal(0.2, 0.03, 60), rng.normal(0.8, 0.03, 40)
    assert otsu(rng.permutation(np.concatenate([low, high]))) == low.max()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.0, 0.0, 0.1, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1, width=32), min_size=20, max_size=100
    ),
    st.sampled_from(["auto", "otsu", "median"]),
    st.tuples(st.floats(0.05, 0.45), st.floats(0.5, 0.95)),
    st.integers(0, 100),
)
def test_choose_anchors(values: list[float], cut: str, limits: tuple[float, float], seed: int) -> None:
    config = GenesConfig(cut=cut, min_anchor_share=limits[0], max_anchor_share=limits[1])
    rho, gamma = np.array(values), np.random.default_rng(seed).random(len(values))
    anchors = choose_anchors(rho, gamma, config)
    others = np.setdiff1d(np.arange(len(rho)), anchors)
    assert rho[anchors].max() <= rho[others].min()
    tied = rho[others] == rho[anchors].max()
    if tied.any():
        assert gamma[anchors][rho[anchors] == rho[anchors].max()].min() >= gamma[others][tied].max()
    if cut == "median":
        assert len(anchors) == len(rho) // 2
    else:
        below = (rho <= otsu(rho)).sum()
        low, high = limits[0] * len(rho), limits[1] * len(rho)
        assert low <= len(anchors) <= high
        assert len(anchors) == below or not low <= below <= high
    order = np.random.default_rng(seed).permutation(len(rho))
    np.testing.assert_array_equal(np.sort(order[choose_anchors(rho[order], gamma[order], config)]), anchors)
