"""Held-out cells of batches -> pools of about one size each, and what the expression of their cells has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from schelix_scale.config import memory_budget
from schelix_scale.genes.sketch import Sketch
from schelix_scale.graph.vectors import unit_rows
from schelix_scale.mapping.alike import Alike, UsuallyAlike
from schelix_scale.mapping.evidence import Evidence
from schelix_scale.mapping.expression import Shared, pool_in_common, usual_common
from schelix_scale.mapping.kin import ALONE, SIZES, Pool, Usual, spread_of
from schelix_scale.mapping.leftover import LeftOver
from schelix_scale.mapping.pool_sizes import EXPRESSED, parts, workers
from schelix_scale.mapping.profiles import NEIGHBORS, Around
from schelix_scale.mapping.reference import Frozen
from schelix_scale.mapping.strange import Strange
from schelix_scale.scheduling import run_tasks

LEAST_BATCHES = 3  # of which expression is known, if there are so many


@dataclass(frozen=True)
class HeldOutPools:
    """Held-out cells (s,) of each batch, dealt over pools of about one size.

    Attributes
    ----------
    size
        How many cells a pool has, about: those of a batch that has less are one. Of a size of less than 40 expression
        does not count; less than 20 stands for cells that are looked at alone.
    kin_of, batch_of
        Of each pool: its cells, ascending, and of which batch they are.
    spread_of
        In how many clusters each lies.
    common_of, shared
        Of each pool: what its expression has in common, see `expression.pool_in_common`; and what is usual.
    alike, usually_alike
        (s,) what the expression of cells has in common with that of those most alike, see `alike.Alike`, 0 where that
        is not known; and what is usual.
    strange
        Those that have most in common with the most alike of their pools.
    expressed
        (s,) whether the expression of the pool is known, so that it may calibrate: not of batches that a run was
        extended by, or of pools of less than 40. Where it is of too few batches expression tells nothing, and all may.
    """

    size: int
    kin_of: Sequence[np.ndarray]
    batch_of: Sequence[int]
    spread_of: Sequence[float]
    common_of: Sequence[np.ndarray]
    shared: Shared
    alike: np.ndarray
    usually_alike: UsuallyAlike
    strange: Strange
    expressed: np.ndarray

    def with_kin(self, raw_sd: np.ndarray, own: Evidence, often_s: np.ndarray) -> tuple[np.ndarray, Usual]:
        """How novel cells and their kin are, (2, 6, s) without and with what labels say; and what is usual of batches.

        Parameters
        ----------
        raw_sd, own
            Uncorrected Anchor components of the cells, and what tells how novel each is.
        often_s
            How far cells of their labels can be all around them, see `odd_votes.often`.
        """
        most = len(SIZES) - 1 if self.size >= ALONE else 0
        left_of = [
            self.shared.of_pool(common, often_s[kin]) for kin, common in zip(self.kin_of, self.common_of, strict=True)
        ]
        alone = [
            Pool.of_cells(kin, raw_sd[kin], own[kin], most, left_cp=left)
            for kin, left in zip(self.kin_of, left_of, strict=True)
        ]
        usual = self._usual(alone)
        scores = np.full((2, len(SIZES), len(raw_sd)), np.nan)
        for kin, left, spread in zip(self.kin_of, left_of, self.spread_of, strict=True):
            among = Pool.of_cells(kin, raw_sd[kin], own[kin], most, usual, spread, left)
            scores[:, : among.size + 1, kin] = among.scores(kin, raw_sd[kin], own[kin])
        return scores + self.usually_alike.adds(self.alike, often_s)[:, None], usual

    def _usual(self, pools: Sequence[Pool]) -> Usual:
        """Return medians over batches of the means over their pools, of those that have kin of a size."""
        score_cz, batch_of = np.zeros((2, len(SIZES))), np.array(self.batch_of)
        told = np.array([self.expressed[kin].all() for kin in self.kin_of])
        for size in range(len(SIZES)):
            there = np.flatnonzero(told & np.array([pool.size >= size for pool in pools]))
            usual = np.array([pools[place].usual_cz[:, size] for place in there.tolist()])
            of_batch = [usual[batch_of[there] == batch].mean(axis=0) for batch in np.unique(batch_of[there])]
            score_cz[:, size] = np.median(of_batch, axis=0) if of_batch else 0.0
        spread = [np.mean(np.array(self.spread_of)[batch_of == batch]) for batch in np.unique(batch_of)]
        return Usual(float(np.median(spread)), score_cz)


@dataclass(frozen=True)
class Cells:
    """Held-out cells (s,), batch after batch.

    Attributes
    ----------
    rows, batch
        Which cells of the reference they are, and of which batch.
    raw, corrected
        (s, a) their Anchor components.
    score, told
        How novel each is alone, and which share of the cells around it the profiles have, see `LeftOver.of_pool`.
    """

    rows: np.ndarray
    batch: np.ndarray
    raw: np.ndarray
    corrected: np.ndarray
    score: np.ndarray
    told: np.ndarray


@dataclass(frozen=True)
class _Expression:
    """Cells of one batch, their expression and that of those around them; which genes were measured, None: all."""

    cells: np.ndarray
    own: sparse.csr_matrix
    measured: np.ndarray | None
    around: Around

    def __getitem__(self, there: np.ndarray) -> _Expression:
        measured = None if self.measured is None else self.measured[there]
        return _Expression(self.cells[there], self.own[there], measured, self.around[there])


def pools_of(
    frozen: Frozen,
    sketch: Sketch,
    held: Cells,
    sizes: Sequence[int],
    wanted: Sequence[int],
    threads: int,
) -> tuple[HeldOutPools, ...]:
    """Deal held-out cells of each batch over pools of each size that is wanted, smaller ones within the largest.

    Where expression is known of less than three batches (or than there are), it tells nothing, of new cells either.

    Parameters
    ----------
    sketch
        Cells whose expression is known.
    sizes
        Falling, see `pool_sizes.pool_sizes`.
    wanted
        Some of them.
    """
    batches = np.unique(held.batch)
    found: list[list[list[_Found]]] = [[[] for _ in sizes] for _ in batches]
    known_b = np.zeros(len(batches), bool)

    def task(place: int) -> int:
        batch, mine = int(batches[place]), np.flatnonzero(held.batch == batches[place])
        there = np.random.default_rng([frozen.config.seed, 0xCA1, batch]).permutation(mine)
        others = (frozen.profiles.batch_p != batch).sum() > NEIGHBORS
        known_b[place] = max(wanted) >= EXPRESSED and others and np.isin(held.rows[mine], sketch.rows).all()
        for top in parts(0, len(there), sizes[0]):
            known = _expression(frozen, sketch, held, there[slice(*top)], batch) if known_b[place] else None
            for at, size in enumerate(sizes):
                if size < ALONE:
                    found[place][at].append(_Found(np.sort(there[slice(*top)])))
                    continue
                for start, stop in parts(0, top[1] - top[0], size) if size in wanted else ():
                    cells = there[top[0] + start : top[0] + stop]
                    order = np.argsort(cells)
                    counts = min(size, len(cells)) >= EXPRESSED
                    of_pool = known[start + order] if known is not None and counts else None
                    found[place][at].append(_common(frozen, held, cells[order], of_pool, batch))
        return len(mine)

    largest = int(min(1.5 * sizes[0], np.unique(held.batch, return_counts=True)[1].max()))
    at_once = workers(memory_budget(frozen.config), largest, len(frozen.scaling.genes), threads)
    run_tasks(task, range(len(batches)), at_once)
    strange = {at: _less_elsewhere([of_batch[at] for of_batch in found], batches, at_once) for at in range(len(sizes))}

    def spread(kin: np.ndarray) -> float:
        return spread_of(frozen.clusters.weights(held.corrected[kin]))

    return tuple(
        _together(size, batches, [of_batch[at] for of_batch in found], known_b, len(held.rows), spread, strange[at])
        for at, size in enumerate(sizes)
        if size in wanted
    )


@dataclass(frozen=True)
class _Found:
    """A pool: its cells, what is in common, how alike each is; until all are found, what is left over of the cells."""

    kin: np.ndarray
    common: np.ndarray | None = None
    alike: np.ndarray | None = None
    left: _Left | None = None


@dataclass(frozen=True)
class _Left:
    """Float16 of what is left over of the cells of a pool, how far it counts, and which are probably not novel."""

    left_ph: np.ndarray
    counts_p: np.ndarray
    likely_p: np.ndarray
    most: int


def _less_elsewhere(found: Sequence[list[_Found]], batches: np.ndarray, threads: int) -> Strange:
    """Take off what cells of pools, by batch, have in common with strange cells of other batches; return all these."""
    strange = Strange.of_batches(
        [
            (int(batch), pool.left.left_ph, pool.alike)
            for batch, of_batch in zip(batches, found, strict=True)
            for pool in of_batch
            if pool.left is not None and pool.alike is not None
        ]
    )

    def task(place: int) -> int:
        others, of_batch = strange.without(int(batches[place])), found[place]
        for at, pool in enumerate(of_batch):
            if pool.left is not None and pool.alike is not None:
                left = pool.left
                values = left.left_ph.astype(np.float32)
                more = others.more(values, left.most, others.usual(values, left.likely_p, left.most))
                of_batch[at] = _Found(pool.kin, pool.common, pool.alike - left.counts_p * more)
        return len(of_batch)

    run_tasks(task, range(len(batches)), threads)
    return strange


def _expression(frozen: Frozen, sketch: Sketch, held: Cells, cells: np.ndarray, batch: int) -> _Expression:
    there = np.searchsorted(sketch.rows, held.rows[cells])
    measured = None
    if sketch.measured is not None:
        measured = sketch.measured.measured_pg[sketch.measured.group_n[there]][:, frozen.scaling.genes]
    around = frozen.profiles.around(unit_rows(held.corrected[cells]), batch)
    return _Expression(cells, frozen.scaling(sketch.x_ng[there]), measured, around)


def _common(frozen: Frozen, held: Cells, kin: np.ndarray, known: _Expression | None, batch: int) -> _Found:
    if known is None:
        return _Found(kin)
    likely, unit = held.score[kin] <= np.median(held.score[kin]), unit_rows(held.corrected[kin])
    left = LeftOver.of_pool(
        frozen.profiles, known.own, known.measured, unit, likely, held.told[kin], batch, known.around
    )
    found, alike = Alike.of_pool(left)
    kept = None if found is None else _Left(found.left_ph.astype(np.float16), left.counts_p, likely, found.most)
    return _Found(kin, pool_in_common(left, held.raw[kin]), alike, kept)


def _together(
    size: int,
    batches: np.ndarray,
    found: Sequence[Sequence[_Found]],
    known_b: np.ndarray,
    cells: int,
    spread: Callable[[np.ndarray], float],
    strange: Strange,
) -> HeldOutPools:
    """Put together pools of all batches."""
    pools = [pool for of_batch in found for pool in of_batch]
    batch_of = [int(batch) for batch, of_batch in zip(batches, found, strict=True) for _ in of_batch]
    large = np.array([max(len(pool.kin) for pool in of_batch) >= EXPRESSED for of_batch in found])
    tells = size >= EXPRESSED and large.any() and (known_b & large).sum() >= min(LEAST_BATCHES, large.sum())
    alike, expressed = np.zeros(cells), np.ones(cells, bool)
    for pool in pools if tells else ():
        expressed[pool.kin] = pool.common is not None
        alike[pool.kin] = 0.0 if pool.alike is None else pool.alike
    common_of = [np.zeros((len(pool.kin), 0)) if pool.common is None or not tells else pool.common for pool in pools]
    by_batch = [[common for common, of in zip(common_of, batch_of, strict=True) if of == batch] for batch in batches]
    alike_of = [alike[np.concatenate([pool.kin for pool in of_batch])] for of_batch in found]
    return HeldOutPools(
        size,
        [pool.kin for pool in pools],
        batch_of,
        [spread(pool.kin) for pool in pools],
        common_of,
        Shared(usual_common(by_batch)),
        alike,
        UsuallyAlike.fit([part for part in alike_of if part.any()]),
        strange,
        expressed,
    )
