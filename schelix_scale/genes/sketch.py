"""Store and batches -> the sketch: a bounded sample of cells on which everything is fitted (METHOD section 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import sparse

from schelix_scale.config import SketchConfig
from schelix_scale.genes.normalize import log_normalize
from schelix_scale.genes.variable import variable_genes
from schelix_scale.stores.base import CellStore
from schelix_scale.stores.checks import check_block
from schelix_scale.stores.values import ValueDecision, ValueKind, decide_values

SKETCH_SHARE = 0.4  # of the memory budget
BLOCK_CELLS = 5_000
BYTES_PER_VALUE = 48
POOL_FACTOR = 2
POOL_GENES = 1_000
POOL_DIMS = 20
POOL_REGIONS = 200


@dataclass(frozen=True)
class Sketch:
    """Sampled cells and their log-normalised values.

    Attributes
    ----------
    rows
        (m,) sorted row numbers in the store.
    batch_n
        (m,) batch codes.
    x_ng
        (m, g) CSR float32, log-normalised, all genes.
    values
        What kind of values the store holds, and why we think so.
    """

    rows: np.ndarray
    batch_n: np.ndarray
    x_ng: sparse.csr_matrix
    values: ValueDecision

    def save(self, path: Path, genes: np.ndarray) -> None:
        """Write the sketch to an .npz file, of the values those of ``genes`` (sorted positions) alone."""
        x_nh = self.x_ng[:, genes]
        np.savez(
            path,
            rows=self.rows,
            batch_n=self.batch_n,
            data=x_nh.data,
            indices=np.asarray(genes, x_nh.indices.dtype)[x_nh.indices],
            indptr=x_nh.indptr,
            shape=self.x_ng.shape,
            values=[self.values.kind, self.values.reason],
        )

    @classmethod
    def load(cls, path: Path) -> Sketch:
        """Read what `save` wrote; values of genes that it left out are 0."""
        with np.load(path) as file:
            parts = tuple(file[name] for name in ("data", "indices", "indptr"))
            x_ng = sparse.csr_matrix(parts, shape=tuple(file["shape"]))
            return cls(file["rows"], file["batch_n"], x_ng, ValueDecision(*file["values"].tolist()))


def sketch_size(store: CellStore, config: SketchConfig, budget: int) -> int:
    """Cells that the sketch may hold: ``max_cells``, or fewer if the memory budget (bytes) asks for it."""
    per_cell = max(store.nonzeros_per_cell, 1.0) * BYTES_PER_VALUE
    return min(store.n_cells, config.max_cells, max(1_000, int(budget / per_cell)))


def draw_sketch(
    store: CellStore,
    batch_n: np.ndarray,
    batch_names: list[str],
    config: SketchConfig,
    size: int,
    values: Literal["auto", "counts", "linear", "log"],
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Sketch:
    """Read a sample of ``size`` cells, stratified by batch; all cells if there are no more.

    Batches are represented in proportion to the square root of their size. Of a larger store, a share
    ``rare_fraction`` is drawn a second time, evenly over regions of expression space among further random
    cells, so that rare populations keep enough cells to be seen.

    Raises
    ------
    DataError
        Values that cannot be integrated: NaN, negative, empty cells, mixed kinds.
    """
    rng = np.random.default_rng([seed, 0x5CE7C4])
    every = size >= store.n_cells
    first = np.arange(store.n_cells) if every else _stratified(batch_n, int(size * (1 - config.rare_fraction)), rng)
    raw = _read(store, first, advance)
    decision = decide_values(raw, batch_n[first], batch_names, values)
    x_ng = log_normalize(raw, decision.kind)
    del raw
    if not every and size > len(first):
        rest = np.setdiff1d(np.arange(store.n_cells, dtype=np.int64), first, assume_unique=True)
        pool = np.sort(rng.choice(rest, min(POOL_FACTOR * size, len(rest)), replace=False))
        rare = _evenly(store, pool, size - len(first), x_ng, batch_n[first], decision, rng, lambda _: None)
        x_ng = sparse.vstack(
            [x_ng, log_normalize(_read(store, rare, advance, decision.kind), decision.kind)], format="csr"
        )
        first = np.concatenate([first, rare])
        order = np.argsort(first)
        first, x_ng = first[order], x_ng[order]
    return Sketch(first, batch_n[first], x_ng, decision)


def allocate(sizes: np.ndarray, total: int, power: float) -> np.ndarray:
    """Deal ``total`` draws over groups in proportion to size**power, none above its size, none without a draw."""
    if total >= sizes.sum():
        return np.asarray(sizes)
    given = np.minimum(sizes, 1)
    weights = sizes.astype(float) ** power
    open_groups = given < sizes
    while given.sum() < total and open_groups.any():
        share = (total - given.sum()) * weights * open_groups / weights[open_groups].sum()
        step = np.minimum(np.floor(share).astype(int), sizes - given)
        if not step.any():
            for group in np.argsort(-share, kind="stable")[: total - given.sum()]:
                step[group] = min(1, sizes[group] - given[group])
        given = given + step
        open_groups = given < sizes
    return np.asarray(given)


def _stratified(batch_n: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    sizes = np.bincount(batch_n)
    chosen = [
        rng.choice(np.flatnonzero(batch_n == batch), count, replace=False)
        for batch, count in enumerate(allocate(sizes, total, 0.5))
        if count
    ]
    return np.sort(np.concatenate(chosen))


def _evenly(
    store: CellStore,
    pool: np.ndarray,
    total: int,
    x_ng: sparse.csr_matrix,
    batch_n: np.ndarray,
    decision: ValueDecision,
    rng: np.random.Generator,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Choose ``total`` of the pool's rows, spread evenly over regions of the space of the cells in ``x_ng``."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD

    genes = variable_genes(x_ng, batch_n, POOL_GENES, 1)
    state = int(rng.integers(2**31))
    space = TruncatedSVD(min(POOL_DIMS, len(genes) - 1), random_state=state).fit(x_ng[:, genes])
    regions = MiniBatchKMeans(min(POOL_REGIONS, len(batch_n) // 10 + 1), n_init=1, random_state=state)
    regions.fit(space.transform(x_ng[:, genes]))
    codes = np.empty(len(pool), np.int32)
    for start in range(0, len(pool), BLOCK_CELLS):
        block = log_normalize(_read(store, pool[start : start + BLOCK_CELLS], advance, decision.kind), decision.kind)
        codes[start : start + BLOCK_CELLS] = regions.predict(space.transform(block[:, genes]))
    quota = allocate(np.bincount(codes, minlength=len(regions.cluster_centers_)), total, 0.0)
    chosen = [rng.choice(pool[codes == region], count, replace=False) for region, count in enumerate(quota) if count]
    return np.sort(np.concatenate(chosen))


def _read(
    store: CellStore, rows: np.ndarray, advance: Callable[[int], None], values: ValueKind | None = None
) -> sparse.csr_matrix:
    blocks = []
    for start in range(0, len(rows), BLOCK_CELLS):
        part = rows[start : start + BLOCK_CELLS]
        block = store.read(part)
        check_block(block, part, store, values)
        blocks.append(block)
        advance(len(part))
    return sparse.vstack(blocks, format="csr")
