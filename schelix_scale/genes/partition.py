"""Log-normalised sketch -> which genes are Anchors, which Variants, or that there is no batch signal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from schelix_scale.config import GenesConfig
from schelix_scale.errors import DataError
from schelix_scale.genes.clusters import coarse_clusters
from schelix_scale.genes.normalize import gene_moments
from schelix_scale.genes.sensitivity import Sensitivity, batch_sensitivity
from schelix_scale.stores.base import Measured

ANCHOR, VARIANT, UNUSED = "anchor", "variant", "unused"
STABLE_JACCARD = 0.95
CHANCE_SDS = 5.0

Embed = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Partition:
    """The outcome of METHOD section 2.

    Attributes
    ----------
    genes
        One row a gene of the source: ``mean``, ``var``, ``beta``, ``gamma``, ``rho``, ``role``. The last four
        are NaN and ``unused`` for genes that are not highly variable. If some genes were not measured in all cells,
        also ``measured``, the share of the sketch's cells in which each was; ``mean`` and ``var`` are those of these.
    signal
        Share of variance inside clusters that batches explain beyond chance; see `batch_signal`.
    comparable
        Share of the sketch's cells in clusters that hold two batches or more.
    single_stream
        True if there is no batch signal, or nothing to measure it on: all highly variable genes are Anchors,
        nothing is corrected.
    rounds
        Rounds of clustering that were made.
    cut
        The largest rho of an Anchor; 1 where all genes are.
    """

    genes: pd.DataFrame
    signal: float
    comparable: float
    single_stream: bool
    rounds: int
    cut: float

    def positions(self, role: str) -> np.ndarray:
        """Return the sorted positions of the genes in a role."""
        return np.flatnonzero((self.genes["role"] == role).to_numpy())


def partition_genes(
    x_ng: sparse.csr_matrix,
    gene_names: pd.Index,
    hvg: np.ndarray,
    batch_n: np.ndarray,
    embed: Embed,
    config: GenesConfig,
    seed: int,
    threads: int = 0,
    level_n: np.ndarray | None = None,
    advance: Callable[[int], None] = lambda _: None,
    measured: Measured | None = None,
) -> Partition:
    """Split the highly variable genes into Anchors (low batch sensitivity) and Variants.

    Cells are clustered on the current Anchors (first on all of them), the genes' batch sensitivity is
    measured inside the clusters, the Anchors are those below the cut; repeated until they hold still.

    For ablations, ``config.partition`` is ``random`` (as many Anchors, drawn with the seed) or ``all`` (all are
    Anchors, and there are no Variants); the batch signal is measured all the same.

    Parameters
    ----------
    x_ng
        (n, g) log-normalised sketch.
    hvg
        Positions of the highly variable genes.
    embed
        Maps gene positions to the sketch's (n, d) components of those genes.
    level_n
        (n,) codes of protected levels; see `batch_sensitivity`.
    measured
        Which of the g genes were measured in the sketch's cells; None: all in all. A gene that no two batches measured
        in the same cluster has a rho of 1 and is a Variant, however many Anchors there are to be: a gene is shown to
        be insensitive or it is not an Anchor.

    Raises
    ------
    DataError
        The protected columns leave no two batches to compare.
    """
    values = x_ng[:, hvg]
    known = None if measured is None else measured.of_genes(hvg)
    anchors = np.arange(len(hvg))
    rounds, signal = 0, 0.0
    for rounds in range(1, config.iterations + 1):
        cluster_n = coarse_clusters(embed(hvg[anchors]), batch_n, seed, threads)
        found = batch_sensitivity(values, cluster_n, batch_n, level_n, known)
        _check_comparable(cluster_n, batch_n, level_n)
        if rounds == 1:
            signal = batch_signal(values, cluster_n, batch_n, level_n, found, config.permutations, seed, known)
            if signal <= config.min_signal or found.comparable == 0:
                return _assemble(x_ng, gene_names, hvg, found, np.arange(len(hvg)), signal, True, rounds, 1.0, measured)
        if config.partition == "all":
            return _assemble(x_ng, gene_names, hvg, found, np.arange(len(hvg)), signal, False, rounds, 1.0, measured)
        advance(1)
        eligible = np.arange(len(hvg)) if found.comparable_g is None else np.flatnonzero(found.comparable_g)
        if len(eligible) < 2:  # nothing can be compared in the new clusters: the Anchors of the last round stay
            break
        previous = anchors
        anchors = eligible[choose_anchors(found.rho[eligible], found.gamma[eligible], config)]
        if len(np.intersect1d(previous, anchors)) >= STABLE_JACCARD * len(np.union1d(previous, anchors)):
            break
    if config.partition == "random":
        anchors = np.sort(np.random.default_rng([seed, 0xA9C402]).choice(len(hvg), len(anchors), replace=False))
    cut = float(found.rho[anchors].max())
    return _assemble(x_ng, gene_names, hvg, found, anchors, signal, False, rounds, cut, measured)


def choose_anchors(rho: np.ndarray, gamma: np.ndarray, config: GenesConfig) -> np.ndarray:
    """Return the sorted positions of the Anchors: the genes with the lowest rho, how many is decided without labels.

    ``median`` takes half of the genes. ``otsu`` (and ``auto``) takes those below the cut that separates low from high
    rho best (Otsu 1979), but at least ``min_anchor_share`` and at most ``max_anchor_share`` of the genes. Of genes with
    the same rho, those with more biology (gamma) come first.
    """
    n_genes, order = len(rho), np.lexsort((-gamma, rho))
    if config.cut == "median":
        return np.sort(order[: n_genes // 2])
    low, high = math.ceil(config.min_anchor_share * n_genes), math.floor(config.max_anchor_share * n_genes)
    return np.sort(order[: min(max(int((rho <= otsu(rho)).sum()), low), high)])


def otsu(values: np.ndarray) -> float:
    """Return the threshold that maximises the variance between the two groups it makes (Otsu 1979)."""
    ordered = np.sort(values)
    n = len(ordered)
    below = np.arange(1, n)
    sums = np.cumsum(ordered)[:-1]
    mean_low, mean_high = sums / below, (ordered.sum() - sums) / (n - below)
    between = below * (n - below) * (mean_low - mean_high) ** 2
    return float(ordered[int(np.argmax(between))])


def batch_signal(
    values: sparse.csr_matrix,
    cluster_n: np.ndarray,
    batch_n: np.ndarray,
    level_n: np.ndarray | None,
    found: Sensitivity,
    permutations: int,
    seed: int,
    measured: Measured | None = None,
) -> float:
    """Share of within-cluster variance due to batches, beyond what permuted batches explain.

    Batches are permuted inside clusters (and protected levels), so that neither composition nor biology
    differs between the data and its null. Chance is the null's mean + 5 standard deviations: on real data
    without batches the share was within 3.5, with batches 17 and more above the mean. What was measured (``measured``
    of these genes) stays with the cells; genes that are not comparable count in neither.
    """
    strata = cluster_n if level_n is None else cluster_n * (int(level_n.max()) + 1) + level_n
    null = []
    for permutation in range(permutations):
        rng = np.random.default_rng([seed, 0x5EED, permutation])
        shuffled = batch_n.copy()
        order = np.lexsort((rng.random(len(strata)), strata))
        shuffled[order] = batch_n[np.argsort(strata, kind="stable")]
        null.append(_batch_share(batch_sensitivity(values, cluster_n, shuffled, level_n, measured), found))
    return _batch_share(found, found) - float(np.mean(null) + CHANCE_SDS * np.std(null))


def _batch_share(found: Sensitivity, actual: Sensitivity) -> float:
    """Share of the standardised genes' within-cluster variance that batches explain, where ``actual`` can tell it."""
    total = found.beta + found.within
    varying = total > 0 if actual.comparable_g is None else (total > 0) & actual.comparable_g
    return float(np.mean(found.beta[varying] / total[varying])) if varying.any() else 0.0


def _check_comparable(cluster_n: np.ndarray, batch_n: np.ndarray, level_n: np.ndarray | None) -> None:
    if level_n is None:
        return
    pairs = np.unique(np.column_stack([level_n, batch_n]), axis=0)
    if np.bincount(pairs[:, 0]).max() < 2:
        raise DataError(
            "protect: every level of the protected columns holds a single batch, so no two batches can be compared. "
            "Protect a column whose levels span several batches, or leave protect empty."
        )


def _assemble(
    x_ng: sparse.csr_matrix,
    gene_names: pd.Index,
    hvg: np.ndarray,
    found: Sensitivity,
    anchors: np.ndarray,
    signal: float,
    single_stream: bool,
    rounds: int,
    cut: float,
    measured: Measured | None,
) -> Partition:
    mean, variance = gene_moments(x_ng, measured)
    genes = pd.DataFrame({"mean": mean, "var": variance}, index=pd.Index(gene_names, name="gene"))
    for name, values in (("beta", found.beta), ("gamma", found.gamma), ("rho", found.rho)):
        genes[name] = np.nan
        genes.iloc[hvg, genes.columns.get_loc(name)] = values
    if measured is not None:
        genes["measured"] = measured.cells_g() / x_ng.shape[0]
    role = np.full(len(genes), UNUSED, dtype=object)
    role[hvg] = VARIANT
    role[hvg[anchors]] = ANCHOR
    genes["role"] = pd.Categorical(role, categories=[ANCHOR, VARIANT, UNUSED])
    return Partition(genes, signal, found.comparable, single_stream, rounds, cut)
