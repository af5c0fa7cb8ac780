"""Batches of a reference -> cells as if they were new ones: corrected anew, neighbours in other batches, scored.

Each held-out batch goes through the same steps as a query: its displacement is fitted anew, and its cells find their
neighbours among the cells of all other batches. Cells of the sketch are taken, whose expression is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from schelix_scale.errors import DataError
from schelix_scale.graph.nearest import nearest_in_blocks
from schelix_scale.graph.vectors import row_blocks, unit_rows
from schelix_scale.mapping.correction import fit_batch, shifted
from schelix_scale.mapping.evidence import Evidence, mean_around, whitened, whitening
from schelix_scale.mapping.held_out_pools import Cells, HeldOutPools, pools_of
from schelix_scale.mapping.novelty import NEIGHBORS
from schelix_scale.mapping.pool_sizes import pool_sizes
from schelix_scale.mapping.reference import Frozen
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.scheduling import run_tasks

EXACT_BELOW = 60_000
WIDER = 6
FIT_CELLS = 2_000
LEAST_OF_BATCH = 400  # held-out cells, if it has them: kin among fewer are not alike


@dataclass(frozen=True)
class HeldOut:
    """Held-out cells.

    Attributes
    ----------
    rows, batch
        (s,) which cells of the reference they are, and of which batch.
    indices, distances
        (s, k) neighbours in other batches.
    raw, score, way
        (s, a) components before they are corrected; (s,) and (s, a) what tells how novel each is, see `Evidence`.
    whitening
        See `evidence.whitening`.
    pools
        The same cells, among which they have their kin: for each size of pools that is wanted, falling.
    """

    rows: np.ndarray
    batch: np.ndarray
    indices: np.ndarray
    distances: np.ndarray
    raw: np.ndarray
    score: np.ndarray
    way: np.ndarray
    whitening: np.ndarray
    pools: tuple[HeldOutPools, ...]

    def evidence(self, odd_s: np.ndarray) -> Evidence:
        """Return what tells how novel the cells are; ``odd_s`` is how odd their votes are, see `odd_votes.oddest`."""
        return Evidence.of_cells(self.score, odd_s, self.way)


def hold_out(
    frozen: Frozen,
    settings: MapConfig,
    threads: int = 1,
    advance: Callable[[int], None] = lambda _: None,
    wanted: Sequence[int] | None = None,
) -> HeldOut:
    """Map cells of batches of the reference onto the others.

    Parameters
    ----------
    wanted
        Which of `sizes_of_pools` there are pools of; None: all.

    Raises
    ------
    DataError
        The reference has one batch, or one beside which there are hardly any cells.
    """
    rng, sketch, chosen = np.random.default_rng([frozen.config.seed, 0xCA1]), frozen.sketch(), []
    for batch, count in zip(*held_out_batches(frozen, settings), strict=True):
        cells = np.flatnonzero(frozen.batch_n == batch)
        fit = np.sort(rng.choice(cells, min(FIT_CELLS, len(cells)), replace=False))
        among = _expressed(fit, cells, sketch.rows, count)
        chosen.append((fit, np.sort(rng.choice(among, count, replace=False))))
    moved: list[np.ndarray] = [np.zeros(0)] * len(chosen)

    def task(place: int) -> int:
        moved[place] = _corrected(frozen, *chosen[place])
        return len(chosen[place][1])

    run_tasks(task, range(len(chosen)), threads, None, advance)
    if not chosen:
        raise DataError(
            f"the reference {frozen.directory.path} has no batch that can be held out: "
            f"{frozen.config.graph.k} cells must be left. Mapping is calibrated on held-out batches."
        )
    rows, corrected = np.concatenate([rows for _, rows in chosen]), np.concatenate(moved)
    sketch = sketch.of_cells(np.flatnonzero(np.isin(sketch.rows, rows)))  # the others take memory
    indices, distances = _neighbors_elsewhere(frozen, corrected, frozen.batch_n[rows], threads)
    raw, batch = np.asarray(frozen.raw_na[rows]), frozen.batch_n[rows]
    around = mean_around(frozen.anchor_na, indices)
    ways = corrected - around
    whitening_dd = whitening(ways, batch)
    width = np.empty((len(rows), NEIGHBORS))
    for code in np.unique(batch).tolist():  # as if their batch had never been there
        mine = batch == code
        width[mine] = frozen.widths(indices[mine, :NEIGHBORS], code)
    score, way = frozen.novelty(raw, corrected, around, distances, width), whitened(ways, whitening_dd)
    held = Cells(rows, batch, raw, corrected, score, frozen.told(indices))
    of_pools = sizes_of_pools(frozen, settings)
    pools = pools_of(frozen, sketch, held, of_pools, of_pools if wanted is None else wanted, threads)
    return HeldOut(rows, batch, indices, distances, raw, score, way, whitening_dd, pools)


def held_out_cells(batches: int, settings: MapConfig) -> int:
    """Return how many cells of each of so many batches are held out, if it has them."""
    return max(LEAST_OF_BATCH, settings.calibration_cells // min(batches, settings.calibration_batches))


def held_out_batches(frozen: Frozen, settings: MapConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return batches that are held out, and how many cells of each: of the sketch, if it has 400 of them or all.

    Those of which it has are first, if there are more than are asked for. Of a batch beside which less than k cells
    would be left there are none.
    """
    sizes = np.bincount(frozen.batch_n)
    batches = np.flatnonzero(sizes)
    sizes, sketched = sizes[batches], frozen.sketched_b[batches]
    most = held_out_cells(len(batches), settings)
    known = sketched >= np.minimum(min(LEAST_OF_BATCH, most), sizes)
    count = np.where(known, np.minimum(sketched, most), np.minimum(min(most, FIT_CELLS), sizes))
    drawn = np.arange(len(batches))
    if len(batches) > settings.calibration_batches:
        order = np.random.default_rng([frozen.config.seed, 0xCA0]).permutation(len(batches))
        drawn = np.sort(order[np.argsort(~known[order], kind="stable")][: settings.calibration_batches])
    drawn = drawn[sizes[drawn] < frozen.n_cells - frozen.config.graph.k]
    return batches[drawn], count[drawn]


def sizes_of_pools(frozen: Frozen, settings: MapConfig) -> tuple[int, ...]:
    """Return among how many cells of a batch its cells can have their kin, see `pool_sizes.pool_sizes`."""
    return pool_sizes(held_out_batches(frozen, settings)[1].tolist())


def _expressed(fit: np.ndarray, cells: np.ndarray, sketched: np.ndarray, share: int) -> np.ndarray:
    """Return the cells of a batch of which some are held out: of the sketch, if that has as many as are asked for.

    Kin among fewer than a new batch has are not as alike.
    """
    known = cells[np.isin(cells, sketched)]
    if len(known) < min(share, len(cells)):
        return fit
    both = fit[np.isin(fit, known)]
    return both if len(both) >= min(share, len(known)) else known


def _corrected(frozen: Frozen, fit: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Correct cells of a batch as those of a new one, whose displacement is fitted on the cells ``fit``."""
    if not frozen.corrects:
        return np.asarray(frozen.anchor_na[rows])
    fit_empty, empty = (np.zeros((len(part), 0), np.float32) for part in (fit, rows))
    clusters = frozen.clusters.without_variants()
    shift = fit_batch(clusters, np.asarray(frozen.raw_na[fit]), fit_empty)
    raw = np.asarray(frozen.raw_na[rows])
    return shifted(shift, raw, empty, frozen.streams.strength)[0]


def _neighbors_elsewhere(
    frozen: Frozen, corrected_md: np.ndarray, batch_m: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours of cells among those of other batches than their own: (m, k) rows and distances.

    Among many cells, those of the index are taken where there are k of other batches among the nearest 6 k.
    """
    m, k = len(corrected_md), frozen.config.graph.k
    indices, distances = np.zeros((m, k), np.int64), np.zeros((m, k), np.float32)
    done_m = np.zeros(m, bool)
    if frozen.n_cells > EXACT_BELOW:
        found, away = frozen.index.query(corrected_md, min(WIDER * k, frozen.n_cells), threads)
        own = frozen.batch_n[found] == batch_m[:, None]
        done_m = (~own).sum(axis=1) >= k
        order = np.argsort(own, axis=1, kind="stable")[:, :k]
        indices, distances = (np.take_along_axis(part, order, axis=1) for part in (found, away))
    for batch in np.unique(batch_m[~done_m]):
        rows = np.flatnonzero(~done_m & (batch_m == batch))
        others = np.flatnonzero(frozen.batch_n != batch)
        blocks = ((start, unit_rows(frozen.anchor_na[others[start:stop]])) for start, stop in row_blocks(len(others)))
        near, distances[rows] = nearest_in_blocks(unit_rows(corrected_md[rows]), blocks, k)
        indices[rows] = others[near]
    return indices, distances
