"""The plan and the features -> what a rank computes in each step, made ready by a thread while the model works."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

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
AHEAD = 2
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
        rng, mine = np.random.default_rng(seed), self.mine(rows)
        steps = self.reach if self.phase == REFINE else WALK_STEPS
        draw_sm, operator = rng.random((steps, len(rows))), self.features.operator
        path = walk(operator, rows[mine], draw_sm.take(mine, axis=1))
        ends = path[-1]
        if self.phase == REFINE and self.labels is not None:
            ends = self.labels.redirect(path, self.label_share, rng.random((3, len(rows)))[:, mine])
        own = self.features.cells(rows[mine], self.device, expressed)
        hops = LAST if self.phase == REFINE else ALL  # Refine takes their backbones only
        return StepCells(own, self.features.cells(ends, self.device, hops=hops), len(rows))

    def mine(self, rows: np.ndarray) -> np.ndarray:
        """Return the positions of this rank's cells in ``rows``."""
        return deal(rows, self.ranks.rank, self.ranks.world)

    def steps(
        self, plan: Plan | BlockPlan, rows: np.ndarray, seed: list[int], steps: range, expression: Expression | None
    ) -> Generator[StepCells, None, None]:
        """Yield this rank's part of each of the ``steps`` over the training ``rows`` (r,), made ready ahead."""
        return ahead(self._steps(plan, rows, seed, steps, expression), self.device)

    def _steps(
        self, plan: Plan | BlockPlan, rows: np.ndarray, seed: list[int], steps: range, expression: Expression | None
    ) -> Generator[StepCells, None, None]:
        if expression is None:
            for step in steps:
                yield self.cells(rows[plan.rows(step)], [*seed, step])
            return
        streamed = expression.steps(rows, plan.batch_size, plan.seed, steps.start, steps.stop, self.mine)
        with closing(streamed):
            for step, (_, expressed) in zip(steps, streamed, strict=True):
                yield self.cells(rows[plan.rows(step)], [*seed, step], expressed)


def ahead(batches: Generator[StepCells, None, None], device: torch.device) -> Generator[StepCells, None, None]:
    """Yield what ``batches`` yields, which a thread asks for a few steps before it is needed."""

    def start() -> None:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)

    def take() -> StepCells | None:
        return next(batches, None)

    with closing(batches), ThreadPoolExecutor(1, "schelix-batches", start) as pool:
        waiting = deque(pool.submit(take) for _ in range(AHEAD))
        while (cells := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(take))
            yield cells


def cells_before(plan: Plan | BlockPlan, step: int) -> int:
    """Return how many cells the steps before ``step`` have in all."""
    epochs, position = divmod(step, plan.steps_per_epoch)
    return epochs * plan.n_rows + min(position * plan.batch_size, plan.n_rows)
