"""Cells of new batches whose expression was kept -> pools among which cells have their kin, and what is alike in them.

Where a pool has many cells that are as alike in their expression as those of a known type hardly ever are, the other
cells of the batch are read a second time, and compared with them. Elsewhere a cell that is in no pool has what the
cells of the pool that are most like it have (`kin.Pool.alike`): no more than these, where held-out cells have their
own. Of a type that is less than 3 % of its batch those cells may be found alone that are in the pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from schelix_scale.features.onepass import PASS_SHARE, block_size
from schelix_scale.graph.vectors import row_blocks, unit_rows
from schelix_scale.mapping.alike import Alike, Among
from schelix_scale.mapping.calibration import Calibration
from schelix_scale.mapping.drawn import DRAWN, Drawn
from schelix_scale.mapping.evidence import Evidence, mean_around, whitened
from schelix_scale.mapping.expression import pool_in_common
from schelix_scale.mapping.held_out import sizes_of_pools
from schelix_scale.mapping.kin import Pool, likely_known, spread_of
from schelix_scale.mapping.leftover import LeftOver
from schelix_scale.mapping.matched import read_values
from schelix_scale.mapping.novelty import NEIGHBORS
from schelix_scale.mapping.odd_votes import oddest_votes, often
from schelix_scale.mapping.pool_sizes import EXPRESSED, POOLS_SHARE, nearest_size, workers
from schelix_scale.mapping.query import CORRECTED, DISTANCES, INDICES, MEASURED, RAW, Query
from schelix_scale.mapping.reference import Frozen
from schelix_scale.scheduling import run_tasks
from schelix_scale.transfer import Labels

LOOK_CELLS = 1_024  # that are read again at once, if they are not of a store that is scanned
TOGETHER = 32  # batches whose pools are held with all genes, at most


def find_pools(query: Query, labels: Sequence[Labels], calibration: Calibration) -> tuple[list[Pool], np.ndarray]:
    """Find the cells of each batch among which its cells have their kin: those whose expression was kept.

    Returns
    -------
    The pools by number of the batch; and what the expression of each cell of the query has in common with that of the
    most alike of its pool, (n,), see `alike.Alike`: not a number of cells that are in none, and were not read again.
    """
    raw, corrected = query.load(RAW.format("anchor")), query.load(CORRECTED.format("anchor"))
    indices, distances = query.load(INDICES), query.load(DISTANCES)
    frozen, drawn, measured = query.frozen, Drawn.open(query.directory.path / DRAWN), query.measured
    pools: list[Pool | None] = [None] * len(query.batches.names)
    size_b = np.bincount(query.batches.codes, minlength=len(pools))
    alike_n = np.full(query.store.n_cells, np.nan)
    strange: dict[int, Among] = {}

    def find(code: int) -> int:
        rows, x_ph = drawn.of_batch(code, calibration.sizes[0])  # as drawn: no order of the query decides a digit
        told = calibration.of_pool(len(rows))
        parts = raw[rows], corrected[rows], indices[rows], distances[rows]
        own = evidence(frozen, labels, calibration, *parts, frozen.widths(parts[2][:, :NEIGHBORS]))
        spread = spread_of(frozen.clusters.weights(parts[1]))
        known = drawn.known_gh[np.zeros(len(rows), np.int64) if measured is None else measured.group_n[rows]]
        common, alike_n[rows], among = np.zeros((len(rows), 0)), 0.0, None
        if told.size >= EXPRESSED:
            own_ph, measured_ph = frozen.scaling.of_used(x_ph), None if known.all() else known
            unit, held = unit_rows(parts[1]), frozen.told(parts[2])
            left = LeftOver.of_pool(frozen.profiles, own_ph, measured_ph, unit, likely_known(own), held)
            common = pool_in_common(left, parts[0])
            alike, alike_n[rows] = Alike.of_pool(left, told.strange, told.usually_alike.knee)
            among = None if alike is None else Among(left.told, alike)
        if among is not None and len(rows) < size_b[code] and told.usually_alike.looks_again(alike_n[rows]):
            strange[code] = among
        by_row = np.argsort(rows)
        often_p = often(labels, frozen.profiles, *parts[2:])
        adds = [told.shared.of_pool(common, often_p), told.usually_alike.adds(alike_n[rows], often_p)]
        cells = rows[by_row], parts[0][by_row], own[by_row]
        left_cp, alike_cp = (part[:, by_row] for part in adds)
        pools[code] = Pool.of_cells(*cells, max(told.most), told.usual, spread, left_cp, alike_cp)
        return len(rows)

    each = Among.bytes_of(calibration.sizes[0], len(frozen.scaling.genes))
    together = int(np.clip(POOLS_SHARE * query.budget / each, 1, TOGETHER))
    at_once = workers(query.budget, calibration.sizes[0], len(frozen.scaling.genes), query.threads)
    for start, stop in row_blocks(len(pools), together):
        run_tasks(find, range(start, stop), at_once)
        if strange:
            look_again(query, strange, alike_n)
        strange.clear()
    return [pool for pool in pools if pool is not None], alike_n


def wanted_sizes(query: Query) -> tuple[int, ...]:
    """Return which of `held_out.sizes_of_pools` the pools of the query's batches are nearest to, falling."""
    sizes = sizes_of_pools(query.frozen, query.settings)
    drawn = np.diff(Drawn.open(query.directory.path / DRAWN).starts)
    return tuple(sorted({nearest_size(sizes, min(cells, sizes[0])) for cells in drawn.tolist()}, reverse=True))


def look_again(query: Query, strange: Mapping[int, Among], alike_n: np.ndarray) -> None:
    """Read those cells of some batches again that are in no pool, and compare them with the pool of their batch.

    Parameters
    ----------
    strange
        Pools by number of the batch.
    alike_n
        (n,) what they have in common is written here, where it is not a number.
    """
    frozen, codes = query.frozen, query.batches.codes
    corrected, indices = query.load(CORRECTED.format("anchor")), query.load(INDICES)
    rows = np.flatnonzero(np.isnan(alike_n) & np.isin(codes, list(strange)) & np.asarray(query.load(MEASURED)))
    if not len(rows):
        return
    kind, groups = query.directory.record("project").details["values"], query.matched
    size = block_size(query.store, int(PASS_SHARE * query.budget), query.threads, LOOK_CELLS)
    if query.store.row_access == "fast":
        size = min(size, -(-len(rows) // query.threads))
    with query.reporter.stage("look again", len(rows)) as progress:

        def task(span: tuple[int, int]) -> int:
            block = rows[slice(*span)]
            for chosen, x_mg, known_g in read_values(query, groups, block, kind):
                own, known_h = frozen.scaling(x_mg), known_g[frozen.scaling.genes]
                for code in np.unique(codes[block[chosen]]).tolist():
                    mine = np.flatnonzero(codes[block[chosen]] == code)
                    there = block[chosen[mine]]
                    known = None if known_h.all() else np.tile(known_h, (len(mine), 1))
                    parts = own[mine], known, unit_rows(corrected[there]), frozen.told(indices[there])
                    alike_n[there] = strange[code](*parts)
            return len(block)

        run_tasks(task, list(row_blocks(len(rows), size)), query.threads, None, progress.advance)


def evidence(
    frozen: Frozen,
    labels: Sequence[Labels],
    calibration: Calibration,
    raw_ma: np.ndarray,
    corrected_ma: np.ndarray,
    indices_mk: np.ndarray,
    distances_mk: np.ndarray,
    width_mk: np.ndarray,
) -> Evidence:
    """Return what tells how novel cells are: of their neighbours the first 7 count, and the labels of more."""
    odd = oddest_votes(labels, calibration.labels, indices_mk, distances_mk)
    around = mean_around(frozen.anchor_na, indices_mk)
    score = frozen.novelty(np.asarray(raw_ma), corrected_ma, around, distances_mk, width_mk)
    return Evidence.of_cells(score, odd, whitened(corrected_ma - around, calibration.whitening_dd))
