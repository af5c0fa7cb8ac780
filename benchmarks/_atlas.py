"""Real cells -> any number of cells whose types and batch-sensitive genes are known, made block by block.

A cell is a multinomial draw of molecules around the profile of a real cell and its neighbours of the same type. In
each batch the known batch-sensitive genes are caught more or less often than elsewhere, by a factor of their own. A
cell depends on the seed and on its row number alone, so blocks can be made in any order and size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numba
import numpy as np
import pandas as pd
from scipy import sparse

NEIGHBORS = 30
SENSITIVE_SHARE, EFFECT, MOST_EFFECT = 0.3, 0.5, 1.2  # sd and bound of the log factor of a sensitive gene in a batch
TYPE_SPREAD, BATCH_SPREAD = 1.0, 0.7  # sd of log shares of types in batches, and of log sizes of batches
ABSENT = 0.15  # share of (batch, type) pairs that are not there at all
MOLECULES, CELL_SPREAD, DEPTH_SPREAD = 4_300, 0.4, 0.25  # molecules of a cell; sd of their log over cells and batches
MOST_MOLECULES = 20_000
FEWEST = 2  # cells of a batch
NOISE_SHARE = 0.08  # of a cell's molecules, on genes beyond those of the real cells, alike in all cells


@dataclass(frozen=True)
class Settings:
    """What an atlas is made of.

    Raises
    ------
    ValueError
        There are fewer than two cells for each batch, or nothing to make.
    """

    cells: int
    genes: int = 20_000
    batches: int = 40
    seed: int = 0
    molecules: float = MOLECULES

    def __post_init__(self) -> None:
        if min(self.batches, self.genes) < 1:
            raise ValueError(f"{self.batches} batches and {self.genes} genes: both must be 1 or more")
        if self.cells < FEWEST * self.batches:
            raise ValueError(f"{self.cells} cells are too few for {self.batches} batches, of {FEWEST} at the least")


@dataclass(frozen=True)
class Block:
    """Cells start:stop, (stop - start, g) CSR float32 counts."""

    start: int
    x_ng: sparse.csr_matrix


class Atlas:
    """The plan of an atlas; `blocks` makes the counts.

    Attributes
    ----------
    obs, var
        Names, batch and type of each cell; names of the genes, and which the batches disturb.
    profiles
        (p, g) CSR, rows sum to 1: what a molecule of a cell with this profile is, before its batch has its say.
    profile_n, batch_n, molecules_n
        (n,) profile, batch and number of molecules of each cell.
    kept_bg
        (b, g) chance, up to a factor, that a batch catches a molecule of a gene: the same for all undisturbed genes.
    """

    def __init__(self, template: Path, settings: Settings, label_key: str = "cell_type") -> None:
        self.settings = settings
        cells = ad.read_h5ad(template)
        rng = np.random.default_rng([settings.seed, 0xA71A5])
        types = cells.obs[label_key].astype("category")
        profiles, genes = _profiles(sparse.csr_matrix(cells.X), types.cat.codes.to_numpy(), settings.genes, rng)
        profiles = profiles[:, genes]
        extra = settings.genes - len(genes)
        if extra:
            profiles = _with_noise_genes(profiles, extra, rng)
        names = [*cells.var_names[genes].astype(str), *(f"noise-{i}" for i in range(extra))]
        profiles.sort_indices()
        self.profiles, self._tables = profiles, _alias_tables(profiles)
        self._draw_cells(types, rng)
        self._draw_genes(names, rng)

    def _draw_cells(self, types: pd.Series, rng: np.random.Generator) -> None:
        """Deal cells over batches and types unevenly, cells of a batch stored together as data sets are."""
        settings, codes = self.settings, types.cat.codes.to_numpy()
        n_types = len(types.cat.categories)
        sizes = batch_sizes(np.exp(rng.normal(0, BATCH_SPREAD, settings.batches)), settings.cells)
        share = np.bincount(codes, minlength=n_types) / len(codes)
        shares = share * np.exp(rng.normal(0, TYPE_SPREAD, (settings.batches, n_types)))
        absent = rng.random(shares.shape) < ABSENT
        absent[np.arange(settings.batches), shares.argmax(axis=1)] = False
        shares[absent] = 0
        self.batch_n = np.repeat(np.arange(settings.batches, dtype=np.int32), sizes)
        self.profile_n = np.empty(settings.cells, np.int32)
        members = [np.flatnonzero(codes == code) for code in range(n_types)]
        for batch in range(settings.batches):
            rows = np.flatnonzero(self.batch_n == batch)
            kinds = rng.choice(n_types, len(rows), p=shares[batch] / shares[batch].sum())
            for kind in np.unique(kinds):
                self.profile_n[rows[kinds == kind]] = rng.choice(members[kind], (kinds == kind).sum())
        depth = np.exp(rng.normal(0, DEPTH_SPREAD, settings.batches))[self.batch_n]
        depth = depth * settings.molecules * np.exp(rng.normal(0, CELL_SPREAD, settings.cells))
        self.molecules_n = np.clip(depth, 200, MOST_MOLECULES).astype(np.int32)
        width = len(str(settings.cells))
        self.obs = pd.DataFrame(
            {
                "batch": pd.Categorical.from_codes(self.batch_n, [f"batch{i:03}" for i in range(settings.batches)]),
                "cell_type": pd.Categorical.from_codes(codes[self.profile_n], types.cat.categories.astype(str)),
            },
            index=[f"cell{i:0{width}}" for i in range(settings.cells)],
        )

    def _draw_genes(self, names: list[str], rng: np.random.Generator) -> None:
        """Choose the batch-sensitive genes and how each batch catches them."""
        g, batches = len(names), self.settings.batches
        sensitive = rng.random(g) < SENSITIVE_SHARE
        effect = np.clip(rng.normal(0, EFFECT, (batches, g)), -MOST_EFFECT, MOST_EFFECT) * sensitive
        self.kept_bg = np.exp(effect - effect.max()).astype(np.float32)
        self.var = pd.DataFrame({"batch_sensitive": sensitive}, index=names)

    def blocks(self, block_cells: int = 4_096) -> Iterator[Block]:
        """Make all cells once, in order."""
        g = len(self.var)
        for start in range(0, self.settings.cells, block_cells):
            stop = min(start + block_cells, self.settings.cells)
            molecules = self.molecules_n[start:stop]
            offsets = np.concatenate([[0], np.cumsum(np.minimum(molecules, g))])
            genes, counts = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.float32)
            stored = np.empty(stop - start, np.int64)
            rows = slice(start, stop)
            _draw(
                start,
                self.settings.seed,
                self.profile_n[rows],
                self.batch_n[rows],
                molecules,
                *self._tables,
                self.kept_bg,
                offsets,
                genes,
                counts,
                stored,
            )
            keep = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets)) < np.repeat(
                stored, np.diff(offsets)
            )
            indptr = np.concatenate([[0], np.cumsum(stored)])
            yield Block(start, sparse.csr_matrix((counts[keep], genes[keep], indptr), shape=(stop - start, g)))


def batch_sizes(weights: np.ndarray, cells: int) -> np.ndarray:
    """Divide ``cells`` by weights (b,), `FEWEST` a batch at the least; return sizes (b,) that sum to ``cells``."""
    sizes = np.maximum(FEWEST, np.floor(weights / weights.sum() * cells)).astype(int)
    sizes[np.argmax(sizes)] += max(cells - sizes.sum(), 0)  # what rounding has left
    while sizes.sum() > cells:  # what the smallest got beyond their weights
        sizes[np.argmax(sizes)] -= 1
    return sizes


def _profiles(
    x_ng: sparse.csr_matrix, codes: np.ndarray, genes: int, rng: np.random.Generator
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Average every real cell with its nearest of the same type, (n, g) rows summing to 1, and choose the genes."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.neighbors import NearestNeighbors

    x_ng = x_ng.astype(np.float64)
    shares = sparse.diags(1 / np.asarray(x_ng.sum(axis=1)).ravel()) @ x_ng
    logs = shares.copy()
    logs.data = np.log1p(1e4 * logs.data)
    places = TruncatedSVD(30, random_state=int(rng.integers(2**31))).fit_transform(logs)
    row, column = [], []
    for code in np.unique(codes):
        members = np.flatnonzero(codes == code)
        k = min(NEIGHBORS, len(members))
        near = NearestNeighbors(n_neighbors=k).fit(places[members]).kneighbors(places[members], return_distance=False)
        row.append(np.repeat(members, k))
        column.append(members[near].ravel())
    rows, columns = np.concatenate(row), np.concatenate(column)
    mean = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), (len(codes), len(codes)))
    mean = sparse.diags(1 / np.asarray(mean.sum(axis=1)).ravel()) @ mean @ shares
    total = np.asarray(mean.sum(axis=0)).ravel()
    chosen = np.sort(np.argsort(-total, kind="stable")[: min(genes, (total > 0).sum())])
    return sparse.csr_matrix(mean), chosen


def _with_noise_genes(profiles: sparse.csr_matrix, extra: int, rng: np.random.Generator) -> sparse.csr_matrix:
    """Add genes that every cell has at the same, uneven rates."""
    rates = np.exp(rng.normal(0, 1.5, extra))
    rates *= NOISE_SHARE / rates.sum()
    profiles = sparse.diags((1 - NOISE_SHARE) / np.asarray(profiles.sum(axis=1)).ravel()) @ profiles
    noise = sparse.csr_matrix(np.broadcast_to(rates, (profiles.shape[0], extra)))
    return sparse.hstack([profiles, noise], format="csr")


def _alias_tables(profiles: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return indptr, genes, thresholds and aliases (positions in a row) of Walker's method, row by row."""
    indptr, genes = profiles.indptr.astype(np.int64), profiles.indices.astype(np.int32)
    thresholds, aliases = np.empty(len(genes), np.float32), np.empty(len(genes), np.int32)
    _fill_alias(indptr, profiles.data.astype(np.float64), thresholds, aliases)
    return indptr, genes, thresholds, aliases


@numba.njit(cache=True)
def _fill_alias(indptr, weights, thresholds, aliases):
    for row in range(len(indptr) - 1):
        start, stop = indptr[row], indptr[row + 1]
        n = stop - start
        scaled = weights[start:stop] * (n / weights[start:stop].sum())
        small, large = np.empty(n, np.int32), np.empty(n, np.int32)
        n_small = n_large = 0
        for i in range(n):
            aliases[start + i] = i
            if scaled[i] < 1:
                small[n_small] = i
                n_small += 1
            else:
                large[n_large] = i
                n_large += 1
        while n_small and n_large:
            n_small -= 1
            less, more = small[n_small], large[n_large - 1]
            thresholds[start + less], aliases[start + less] = scaled[less], more
            scaled[more] -= 1 - scaled[less]
            if scaled[more] < 1:
                n_large -= 1
                small[n_small] = more
                n_small += 1
        for i in range(n_small):
            thresholds[start + small[i]] = 1
        for i in range(n_large):
            thresholds[start + large[i]] = 1


@numba.njit(inline="always")
def _next(state):
    """Splitmix64: the next state and 53 random bits as a number in [0, 1)."""
    state += np.uint64(0x9E3779B97F4A7C15)
    z = state
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return state, (z >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@numba.njit(cache=True, parallel=True, nogil=True)
def _draw(
    first, seed, profile_n, batch_n, molecules_n, indptr, genes, thresholds, aliases, kept_bg, offsets, out, counts, n
):
    for i in numba.prange(len(profile_n)):
        state = np.uint64(first + i) * np.uint64(0xD1B54A32D192ED03) + np.uint64(seed + 1) * np.uint64(
            0x2545F4914F6CDD1D
        )
        start = indptr[profile_n[i]]
        width = indptr[profile_n[i] + 1] - start
        kept = kept_bg[batch_n[i]]
        seen = np.zeros(kept_bg.shape[1], np.int32)
        drawn = 0
        while drawn < molecules_n[i]:
            state, u = _next(state)
            u *= width
            place = int(u)
            if u - place >= thresholds[start + place]:
                place = aliases[start + place]
            gene = genes[start + place]
            state, u = _next(state)
            if u < kept[gene]:
                seen[gene] += 1
                drawn += 1
        at = offsets[i]
        for gene in range(len(seen)):
            if seen[gene]:
                out[at] = gene
                counts[at] = seen[gene]
                at += 1
        n[i] = at - offsets[i]
