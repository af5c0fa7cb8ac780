"""The plan and the features -> what a rank computes in each step, made ready by a thread while the model works."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch

from schelix_scale.training.data import CachedFeatures
from schelix_scale.training.dist import Ranks
from schelix_scale.training.expression import Expressed, Expression
from schelix_scale.training.labels import Labels
from schelix_scale.training.plan import BlockPlan, Plan, deal
from schelix_scale.training.step import REFINE, StepCells
from schelix_scale.training.walks import walk

WALK_STEPS, WALK_TAG = 2, 0x3A1C
AHEAD = 2  # groups of steps, the one in use not counted
TOGETHER_ROWS, TOGETHER_STEPS = 4096, 16  # that are read as a group, at most
LABEL_DRAWS = 3
ALL, LAST = slice(None), slice(-1, None)


@dataclass(frozen=True)
class Batches:
    """Where the cells of a phase's steps come from.

    Attributes
    ----------
    features, device, ranks
        The cache, where the model computes, and who shares a step.
    phase
        Its name.
    reach, labels, label_share
        Steps of the walks of Refine, and the labelled cells that they may lead to.
    """

    features: CachedFeatures
    device: torch.device
    ranks: Ranks
    phase: str
    reach: int
    labels: Labels | None
    label_share: float

    def cells(self, rows: np.ndarray, seed: list[int], expressed: Expressed | None = None) -> StepCells:
        """Return this rank's part of a step of ``rows`` (m,); ``seed`` decides where the walks from them lead.

        ``expressed`` is hop 0 of this rank's cells, where it is not read from the cache.
        """
        return self.several([rows], [seed], expressed)[0]

    def several(
        self, rows: Sequence[np.ndarray], seeds: Sequence[list[int]], expressed: Expressed | None = None
    ) -> list[StepCells]:
        """Return this rank's parts of several steps, which are read together: `cells` of each.

        Expression is that of a single step.
        """
        length = self.reach if self.phase == REFINE else WALK_STEPS
        redirected = self.phase == REFINE and self.labels is not None
        mine = [self.mine(step_rows) for step_rows in rows]
        own = np.concatenate([step_rows[share] for step_rows, share in zip(rows, mine, strict=True)])
        draws = [_draws(seed, len(step_rows), length, redirected) for seed, step_rows in zip(seeds, rows, strict=True)]
        draw_sm = np.concatenate([draw.take(share, axis=1) for draw, share in zip(draws, mine, strict=True)], axis=1)
        path = walk(self.features.operator, own, draw_sm[:length])
        ends = path[-1]
        if redirected and self.labels is not None:
            ends = self.labels.redirect(path, self.label_share, draw_sm[length:])
        cells = self.features.cells(own, self.device, expressed)
        hops = LAST if self.phase == REFINE else ALL  # Refine takes their backbones only
        others = self.features.cells(ends, self.device, hops=hops)
        if len(rows) == 1:
            return [StepCells(cells, others, len(rows[0]))]
        stops = np.cumsum([len(share) for share in mine])
        spans = [slice(stop - len(share), stop) for stop, share in zip(stops, mine, strict=True)]
        return [
            StepCells(cells.part(span), others.part(span), len(step_rows))
            for span, step_rows in zip(spans, rows, strict=True)
        ]

    def mine(self, rows: np.ndarray) -> np.ndarray:
        """Return the positions of this rank's cells in ``rows``."""
        return deal(rows, self.ranks.rank, self.ranks.world)

    def steps(
        self, plan: Plan | BlockPlan, rows: np.ndarray, seed: list[int], steps: range, expression: Expression | None
    ) -> Generator[StepCells, None, None]:
        """Yield this rank's part of each of the ``steps`` over the training ``rows`` (r,), made ready ahead."""
        return ahead(self._groups(plan, rows, seed, steps, expression), self.device)

    def _groups(
        self, plan: Plan | BlockPlan, rows: np.ndarray, seed: list[int], steps: range, expression: Expression | None
    ) -> Generator[list[StepCells], None, None]:
        if expression is None:
            yield from self._read_together(plan, rows, seed, steps)
            return
        streamed = expression.steps(rows, plan.batch_size, plan.seed, steps.start, steps.stop, self.mine)
        with closing(streamed):
            for step, (_, expressed) in zip(steps, streamed, strict=True):
                yield [self.cells(rows[plan.rows(step)], [*seed, step], expressed)]

    def _read_together(
        self, plan: Plan | BlockPlan, rows: np.ndarray, seed: list[int], steps: range
    ) -> Generator[list[StepCells], None, None]:
        """Yield groups of steps: the same ones wherever a training goes on, so that a step's numbers lie alike."""
        size = int(np.clip(TOGETHER_ROWS // plan.batch_size, 1, TOGETHER_STEPS))
        for first in range(steps.start - steps.start % size, steps.stop, size):
            group = range(first, min(first + size, steps.stop))
            made = self.several([rows[plan.rows(step)] for step in group], [[*seed, step] for step in group])
            yield made[max(steps.start - first, 0) :]


def _draws(seed: list[int], rows: int, length: int, redirected: bool) -> np.ndarray:
    """Return the numbers of a step's walks, and below them those of what labels make of them, (s, m)."""
    return np.random.default_rng(seed).random((length + LABEL_DRAWS * redirected, rows))


def ahead(groups: Generator[list[StepCells], None, None], device: torch.device) -> Generator[StepCells, None, None]:
    """Yield the steps of groups, which a thread asks for ahead of their use.

    It hands over few large things: each exchange between threads costs as much as a layer of the model. When the
    iterator is closed, or Ctrl-C ends it, ``groups`` are closed once the thread is done with them.
    """
    in_use = Lock()  # a pool does not wait for a thread that it was starting when Ctrl-C came

    def start() -> None:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)

    def take() -> list[StepCells] | None:
        with in_use:
            return next(groups, None)

    try:
        with ThreadPoolExecutor(1, "schelix-batches", start) as pool:
            waiting = deque(pool.submit(take) for _ in range(AHEAD))
            while (group := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(take))
                yield from group
    finally:
        with in_use:
            groups.close()


def cells_before(plan: Plan | BlockPlan, step: int) -> int:
    """Return how many cells the steps before ``step`` have in all."""
    epochs, position = divmod(step, plan.steps_per_epoch)
    return epochs * plan.n_rows + min(position * plan.batch_size, plan.n_rows)
