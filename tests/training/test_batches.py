from __future__ import annotations

import threading
import time
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import pytest
import torch

from schelix_scale.training.batches import TOGETHER_STEPS, Batches, ahead
from schelix_scale.training.data import CachedFeatures, Cells
from schelix_scale.training.dist import ALONE, Ranks
from schelix_scale.training.plan import Plan
from schelix_scale.training.step import ALIGN, REFINE, StepCells
from tests.training.rank_program import known_labels
from tests.training.tools import N, cached

CPU = torch.device("cpu")
ROWS, STEPS = np.arange(0, N, 2), 40
PLAN = Plan(len(ROWS), 16, (3,))
REACH = 6


class Counted(CachedFeatures):
    """Features that count how often they are read."""

    reads: list[int]

    def cells(self, rows: np.ndarray, *given: object, **more: object) -> Cells:
        self.reads.append(len(rows))
        return super().cells(rows, *given, **more)


def batches(phase: str, ranks: Ranks = ALONE, labels: bool = False) -> Batches:
    features = cached()
    counted = Counted(**{name: getattr(features, name) for name in features.__dataclass_fields__})
    object.__setattr__(counted, "reads", [])
    return Batches(counted, CPU, ranks, phase, REACH, known_labels(features) if labels else None, 0.5)


def same(one: StepCells, two: StepCells) -> bool:
    pairs = [(one.own, two.own), (one.other, two.other)]
    return one.total == two.total and all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in ("anchor", "variant", "batch")
    )


@pytest.mark.parametrize("phase", [ALIGN, REFINE])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("first", [0, 1, TOGETHER_STEPS - 1, TOGETHER_STEPS, STEPS - 1])
def test_steps_that_are_read_together_are_as_each_by_itself(phase: str, labels: bool, rank: int, first: int) -> None:
    found = batches(phase, replace(ALONE, rank=rank, world=2), labels)
    together = list(found.steps(PLAN, ROWS, [7], range(first, STEPS), None))
    assert len(together) == STEPS - first
    for step, cells in enumerate(together, first):
        assert same(cells, found.cells(ROWS[PLAN.rows(step)], [7, step]))


def test_the_cells_of_a_step_are_those_of_the_plan() -> None:
    found, features = batches(ALIGN), cached()
    for step, cells in enumerate(found.steps(PLAN, ROWS, [7], range(STEPS), None)):
        rows = ROWS[PLAN.rows(step)]
        np.testing.assert_array_equal(cells.own.anchor, features.anchor_nta[rows])
        np.testing.assert_array_equal(cells.own.batch, features.batch_n[rows])


def test_a_group_is_read_at_once_and_the_same_wherever_training_goes_on() -> None:
    """Numbers lie at the same places of the same arrays: their sums are rounded alike."""
    found = batches(REFINE)
    first = list(found.steps(PLAN, ROWS, [7], range(STEPS), None))
    reads = found.features.reads
    assert len(reads) == 2 * -(-STEPS // TOGETHER_STEPS), "own and other cells of each group"
    start = TOGETHER_STEPS + 3
    again = list(found.steps(PLAN, ROWS, [7], range(start, STEPS), None))
    for one, two in zip(first[start:], again, strict=True):
        assert one.own.anchor.storage_offset() == two.own.anchor.storage_offset()


@pytest.mark.parametrize("moment", ["while the thread starts", "while a step is used"])
def test_ctrl_c_waits_for_the_thread_and_stays_what_it_is(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a thread starts leaves a pool that does not know of it, and so does not wait for it."""
    at_work, said = threading.Event(), list[str]()

    def groups() -> Generator[list[StepCells], None, None]:
        try:
            while True:
                at_work.set()
                time.sleep(0.1)
                said.append("made")
                yield [batches(ALIGN).cells(ROWS[:4], [7])]
        finally:
            said.append("closed")

    started = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        started(thread)
        if moment == "while the thread starts":
            assert at_work.wait(10)
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start)
    steps = ahead(groups(), CPU)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - where it is raised is what differs
        next(steps)
        at_work.clear()
        assert at_work.wait(10)
        steps.throw(KeyboardInterrupt)
    assert said[-2:] == ["made", "closed"]
    assert said.count("closed") == 1
