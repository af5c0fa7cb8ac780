"""Store and batches -> the sketch: a bounded sample of cells on which everything is fitted (METHOD section 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import sparse

from schelix_scale.arrays import load_arrays
from schelix_scale.config import SketchConfig
from schelix_scale.genes.normalize import log_normalize
from schelix_scale.genes.sweep import MAX_BLOCK, RowStack, Spill, sweep
from schelix_scale.genes.variable import variable_genes
from schelix_scale.stores.base import CellStore, Measured, partly_measured
from schelix_scale.stores.checks import check_block
from schelix_scale.stores.values import ValueDecision, ValueKind, decide_values

SKETCH_SHARE = 0.4  # of the memory budget
BYTES_PER_VALUE = 48  # while genes are chosen
KEPT_PER_VALUE, BYTES_PER_CELL = 8, 4_000  # afterwards, when Harmony runs: for that the whole budget is there
MIN_SKETCH = 1_000
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
    measured
        Which genes were measured in these cells; None: all in all.
    """

    rows: np.ndarray
    batch_n: np.ndarray
    x_ng: sparse.csr_matrix
    values: ValueDecision
    measured: Measured | None = None

    def of_cells(self, places: np.ndarray) -> Sketch:
        """Return some of the cells, (k,) positions in the sketch."""
        measured = None if self.measured is None else self.measured.of_cells(places)
        return Sketch(self.rows[places], self.batch_n[places], self.x_ng[places], self.values, measured)

    def save(self, path: Path, genes: np.ndarray) -> None:
        """Write the sketch to an .npz file, of the values those of ``genes`` (sorted positions) alone."""
        x_nh, known = self.x_ng[:, genes], self.measured
        groups: dict[str, Any] = {} if known is None else vars(known)
        np.savez(
            path,
            rows=self.rows,
            batch_n=self.batch_n,
            data=x_nh.data,
            indices=np.asarray(genes, x_nh.indices.dtype)[x_nh.indices],
            indptr=x_nh.indptr,
            shape=self.x_ng.shape,
            values=[self.values.kind, self.values.reason],
            **groups,
        )

    @classmethod
    def load(cls, path: Path) -> Sketch:
        """Read what `save` wrote; values of genes that it left out are 0."""
        file = load_arrays(path)
        parts = tuple(file[name] for name in ("data", "indices", "indptr"))
        x_ng = sparse.csr_matrix(parts, shape=tuple(file["shape"]))
        known = None
        if "measured_pg" in file:
            known = Measured(file["group_n"], tuple(file["names"].tolist()), file["measured_pg"])
        return cls(file["rows"], file["batch_n"], x_ng, ValueDecision(*file["values"].tolist()), known)


def sketch_size(store: CellStore, config: SketchConfig, budget: int) -> int:
    """Cells that the sketch may hold: ``max_cells``, or fewer if the memory budget (bytes) asks for it."""
    nonzeros = max(store.nonzeros_per_cell, 1.0)
    per_cell = max(nonzeros * BYTES_PER_VALUE, SKETCH_SHARE * (nonzeros * KEPT_PER_VALUE + BYTES_PER_CELL))
    return min(store.n_cells, config.max_cells, max(MIN_SKETCH, int(budget / per_cell)))


def swept_cells(store: CellStore, config: SketchConfig, size: int) -> int:
    """Cells that `draw_sketch` reads for a sketch of ``size``: those of the first draw and the pool of the second."""
    first = _first_size(config, size)
    return size if size >= store.n_cells or first == size else min(store.n_cells, first + POOL_FACTOR * size)


def draw_sketch(
    store: CellStore,
    batch_n: np.ndarray,
    batch_names: list[str],
    config: SketchConfig,
    size: int,
    values: Literal["auto", "counts", "linear", "log"],
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
    folder: Path | None = None,
    threads: int = 2,
) -> Sketch:
    """Read a sample of ``size`` cells, stratified by batch; all cells if there are no more.

    Batches are represented in proportion to the square root of their size. Of a larger store, a share
    ``rare_fraction`` is drawn a second time, evenly over regions of expression space among further random
    cells (the pool), so that rare populations keep enough cells to be seen.

    The store is read once, in stored order: first draw and pool are swept together. Values of the first draw stay in
    memory; those of the pool wait in a file without a name in ``folder`` (that of temporary files by default), of
    8 bytes a value and ``POOL_FACTOR * size`` cells, until the second draw is made.

    Raises
    ------
    DataError
        Values that cannot be integrated: NaN, negative, empty cells, mixed kinds.
    RunError
        No disk space for the pool.
    """
    rng = np.random.default_rng([seed, 0x5CE7C4])
    every = size >= store.n_cells
    first = np.arange(store.n_cells) if every else _stratified(batch_n, _first_size(config, size), rng)
    pool = np.empty(0, np.int64)
    if not every and size > len(first):
        rest = np.ones(store.n_cells, bool)
        rest[first] = False
        pool = np.sort(rng.choice(np.flatnonzero(rest), min(POOL_FACTOR * size, int(rest.sum())), replace=False))
        del rest
    measured = partly_measured(store)
    stack, width = RowStack(len(store.gene_names)), len(store.gene_names)
    with Spill(folder) as spill:
        for rows, x_ng in sweep(store, np.union1d(first, pool), size, threads):
            _keep(rows, x_ng, first, stack, spill)
            advance(len(rows))
        decision = decide_values(stack.matrix(), batch_n[first], batch_names, values)
        _normalize(stack.matrix(), decision.kind)
        if len(pool):
            genes = variable_genes(
                stack.matrix(), batch_n[first], POOL_GENES, 1, None if measured is None else measured.of_cells(first)
            )
            chosen = _evenly(store, spill, size - len(first), stack.matrix(), genes, decision.kind, rng)
            stack.insert(np.searchsorted(first, chosen), log_normalize(spill.take(chosen, width), decision.kind))
            first = np.union1d(first, chosen)
    measured = None if measured is None else measured.of_cells(first)
    return Sketch(first, batch_n[first], stack.matrix(), decision, measured)


def _first_size(config: SketchConfig, size: int) -> int:
    return int(size * (1 - config.rare_fraction))


def _keep(rows: np.ndarray, x_ng: sparse.csr_matrix, first: np.ndarray, stack: RowStack, spill: Spill) -> None:
    """Keep a block's cells of the first draw (sorted) in memory, and spill the others."""
    start, stop = np.searchsorted(first, [rows[0], rows[-1] + 1])
    of_first = np.isin(rows, first[start:stop], assume_unique=True)
    if of_first.all():
        stack.append(x_ng)
        return
    stack.append(x_ng[of_first])
    spill.append(rows[~of_first], x_ng[~of_first])


def _normalize(x_ng: sparse.csr_matrix, kind: ValueKind) -> None:
    """Log-normalise in place, some rows at a time: the whole at once would take four times its memory."""
    for start in range(0, x_ng.shape[0], MAX_BLOCK):
        pointer = x_ng.indptr[start : start + MAX_BLOCK + 1]
        span = slice(int(pointer[0]), int(pointer[-1]))
        part = sparse.csr_matrix(
            (x_ng.data[span], x_ng.indices[span], pointer - pointer[0]), shape=(len(pointer) - 1, x_ng.shape[1])
        )
        x_ng.data[span] = log_normalize(part, kind).data


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
    spill: Spill,
    total: int,
    x_ng: sparse.csr_matrix,
    genes: np.ndarray,
    kind: ValueKind,
    rng: np.random.Generator,
) -> np.ndarray:
    """Choose ``total`` spilled rows (sorted), evenly over regions of the space of some ``genes`` of cells ``x_ng``."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD

    x_nh = x_ng[:, genes]
    state = int(rng.integers(2**31))
    space = TruncatedSVD(min(POOL_DIMS, len(genes) - 1), random_state=state).fit(x_nh)
    regions = MiniBatchKMeans(min(POOL_REGIONS, x_ng.shape[0] // 10 + 1), n_init=1, random_state=state)
    regions.fit(space.transform(x_nh))
    kept_g = np.zeros(x_ng.shape[1], bool)
    kept_g[genes] = True
    pool, codes = [], []
    for rows, block in spill.blocks(x_ng.shape[1]):
        check_block(block, rows, store, kind)
        pool.append(rows)
        codes.append(regions.predict(space.transform(log_normalize(block, kind, kept_g)[:, genes])))
    pool_n, code_n = np.concatenate(pool), np.concatenate(codes)
    quota = allocate(np.bincount(code_n, minlength=len(regions.cluster_centers_)), total, 0.0)
    chosen = [rng.choice(pool_n[code_n == code], count, replace=False) for code, count in enumerate(quota) if count]
    return np.sort(np.concatenate(chosen))
