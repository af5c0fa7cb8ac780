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
from schelix_scale.mapping.alike import UsuallyAlike
from schelix_scale.mapping.correction import fit_batch, shifted
from schelix_scale.mapping.evidence import Evidence, mean_around, whitened, whitening
from schelix_scale.mapping.expression import Shared
from schelix_scale.mapping.in_common import held_out_in_common
from schelix_scale.mapping.kin import POOL, SIZES, Pool, Usual, spread_of
from schelix_scale.mapping.novelty import NEIGHBORS
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
    cells_of, kin_of, spread_b
        Of each batch: its cells, those among which they have their kin, and in how many clusters these lie.
    whitening
        See `evidence.whitening`.
    pool
        How many cells of a batch may be kin.
    shared
        What is usual of the expression of kin.
    common_of
        Of each batch: what the expression of `kin_of` has in common, see `expression.pool_in_common`.
    alike, usually_alike
        (s,) what the expression of cells has in common with that of those most alike, see `alike.Alike`, 0 where that
        is not known; and what is usual.
    expressed
        (s,) whether the batch's expression is known, and may calibrate: not of batches that a run was extended by.
        Where that is so of too few batches expression tells nothing, and all may.
    """

    rows: np.ndarray
    batch: np.ndarray
    indices: np.ndarray
    distances: np.ndarray
    raw: np.ndarray
    score: np.ndarray
    way: np.ndarray
    cells_of: Sequence[np.ndarray]
    kin_of: Sequence[np.ndarray]
    spread_b: Sequence[float]
    whitening: np.ndarray
    pool: int
    shared: Shared
    common_of: Sequence[np.ndarray]
    alike: np.ndarray
    usually_alike: UsuallyAlike
    expressed: np.ndarray

    def with_kin(self, odd_s: np.ndarray, often_s: np.ndarray) -> tuple[np.ndarray, Usual]:
        """How novel cells and their kin are, (2, 5, s) without and with what labels say; and what is usual of batches.

        Parameters
        ----------
        odd_s
            How odd the cells' votes are, see `odd_votes.oddest`.
        often_s
            How far cells of their labels can be all around them, see `odd_votes.often`.
        """
        rows, raw, own = self.rows, self.raw, Evidence.of_cells(self.score, odd_s, self.way)
        parts = zip(self.kin_of, self.common_of, strict=True)
        left_of = [self.shared.of_pool(common, often_s[kin]) for kin, common in parts]
        pools = [
            Pool.of_cells(rows[kin], raw[kin], own[kin], left_cp=left)
            for kin, left in zip(self.kin_of, left_of, strict=True)
            if self.expressed[kin].all()
        ]
        usual = _usual(pools, self.spread_b)
        scores = np.full((2, len(SIZES), len(rows)), np.nan)
        for mine, kin, left, spread in zip(self.cells_of, self.kin_of, left_of, self.spread_b, strict=True):
            among = Pool.of_cells(rows[kin], raw[kin], own[kin], usual=usual, spread=spread, left_cp=left)
            scores[:, : among.size + 1, mine] = among.scores(rows[mine], raw[mine], own[mine])
        return scores + self.usually_alike.adds(self.alike, often_s)[:, None], usual


def hold_out(
    frozen: Frozen, settings: MapConfig, threads: int = 1, advance: Callable[[int], None] = lambda _: None
) -> HeldOut:
    """Map cells of batches of the reference onto the others.

    Raises
    ------
    DataError
        The reference has one batch, or one beside which there are hardly any cells.
    """
    rng = np.random.default_rng([frozen.config.seed, 0xCA1])
    batches, sizes = np.unique(frozen.batch_n, return_counts=True)
    sketch, share = frozen.sketch(), held_out_cells(len(batches), settings)
    sketched = np.bincount(sketch.batch_n, minlength=int(batches[-1]) + 1)[batches] >= np.minimum(share, sizes)
    if len(batches) > settings.calibration_batches:
        order = rng.permutation(len(batches))
        order = order[np.argsort(~sketched[order], kind="stable")]  # those of which expression is known first
        drawn = np.sort(order[: settings.calibration_batches])
        batches, sizes = batches[drawn], sizes[drawn]
    chosen: list[tuple[np.ndarray, np.ndarray]] = []
    for batch, size in zip(batches.tolist(), sizes, strict=True):
        cells = np.flatnonzero(frozen.batch_n == batch)
        fit = np.sort(rng.choice(cells, min(FIT_CELLS, size), replace=False))
        among = _expressed(fit, cells, sketch.rows, share)
        rows = np.sort(rng.choice(among, min(share, len(among)), replace=False))
        if size < frozen.n_cells - frozen.config.graph.k:
            chosen.append((fit, rows))
    moved: list[np.ndarray] = [np.zeros(0)] * len(chosen)

    def task(place: int) -> int:
        moved[place] = _corrected(frozen, *chosen[place])
        return share

    run_tasks(task, range(len(chosen)), threads, None, advance)
    if not chosen:
        raise DataError(
            f"the reference {frozen.directory.path} has {len(batches)} batches, none of which can be held out: "
            f"{frozen.config.graph.k} cells must be left. Mapping is calibrated on held-out batches."
        )
    rows, corrected = np.concatenate([rows for _, rows in chosen]), np.concatenate(moved)
    sketch = sketch.of_cells(np.flatnonzero(np.isin(sketch.rows, rows)))  # the others take memory
    indices, distances = _neighbors_elsewhere(frozen, corrected, frozen.batch_n[rows], threads)
    pool = pool_size(frozen, settings)
    raw, batch = np.asarray(frozen.raw_na[rows]), frozen.batch_n[rows]
    around = mean_around(frozen.anchor_na, indices)
    ways = corrected - around
    whitening_dd = whitening(ways, batch)
    cells_of = [np.flatnonzero(batch == code) for code in np.unique(batch)]
    width = np.empty((len(rows), NEIGHBORS))
    for mine in cells_of:  # as if their batch had never been there
        width[mine] = frozen.widths(indices[mine, :NEIGHBORS], int(batch[mine[0]]))
    score, way = frozen.novelty(raw, corrected, around, distances, width), whitened(ways, whitening_dd)
    kin_of = [np.sort(rng.choice(mine, min(pool, len(mine)), replace=False)) for mine in cells_of]
    spread_b = [spread_of(frozen.clusters.weights(corrected[kin])) for kin in kin_of]
    told = frozen.told(indices)
    in_common = held_out_in_common(frozen, sketch, rows, raw, corrected, score, told, cells_of, kin_of, threads)
    expressed = np.repeat(in_common.known_b, [len(mine) for mine in cells_of])  # batches are one after the other
    return HeldOut(
        rows,
        batch,
        indices,
        distances,
        raw,
        score,
        way,
        cells_of,
        kin_of,
        spread_b,
        whitening_dd,
        pool,
        in_common.shared,
        in_common.common_of,
        in_common.alike_s,
        in_common.usually_alike,
        expressed,
    )


def held_out_cells(batches: int, settings: MapConfig) -> int:
    """Return how many cells of each of so many batches are held out, if it has them."""
    return max(LEAST_OF_BATCH, settings.calibration_cells // min(batches, settings.calibration_batches))


def pool_size(frozen: Frozen, settings: MapConfig) -> int:
    """Return among how many cells of a batch its cells have their kin, at most."""
    return min(POOL, held_out_cells(len(np.unique(frozen.batch_n)), settings))


def _expressed(fit: np.ndarray, cells: np.ndarray, sketched: np.ndarray, share: int) -> np.ndarray:
    """Return the cells of a batch of which some are held out: of the sketch, if that has as many as are asked for.

    Kin among fewer than a new batch has are not as alike.
    """
    known = cells[np.isin(cells, sketched)]
    if len(known) < min(share, len(cells)):
        return fit
    both = fit[np.isin(fit, known)]
    return both if len(both) >= min(share, len(known)) else known


def _usual(pools: Sequence[Pool], spread_b: Sequence[float]) -> Usual:
    """Return medians over batches, of those that have kin of a size."""
    score_cz = np.zeros((2, len(SIZES)))
    for size in range(len(SIZES)):
        there = [pool.usual_cz[:, size] for pool in pools if pool.size >= size]
        score_cz[:, size] = np.median(there, axis=0) if there else 0.0
    return Usual(float(np.median(spread_b)), score_cz)


def _corrected(frozen: Frozen, fit: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Correct cells of a batch as those of a new one, whose displacement is fitted on the cells ``fit``."""
    if not frozen.corrects:
        return np.asarray(frozen.anchor_na[rows])
    empty = np.zeros((len(fit), 0), np.float32)
    clusters = frozen.clusters.without_variants()
    shift = fit_batch(clusters, np.asarray(frozen.raw_na[fit]), empty)
    raw = np.asarray(frozen.raw_na[rows])
    return shifted(shift, raw, empty[: len(rows)], frozen.streams.strength)[0]


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
