from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schelix_scale.training.batches import cells_before
from schelix_scale.training.plan import BlockPlan, Plan, deal

PLANS = (st.integers(1, 300), st.integers(1, 320), st.integers(0, 2**31))


@settings(max_examples=100, deadline=None)
@given(*PLANS, st.integers(0, 5))
def test_every_epoch_covers_every_row_once(n: int, batch: int, seed: int, epoch: int) -> None:
    plan = Plan(n, batch, (seed,))
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    parts = [plan.rows(step) for step in steps]
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert all(len(part) == batch for part in parts[:-1])
    assert 0 < len(parts[-1]) <= batch
    assert plan.steps_per_epoch == int(np.ceil(n / batch))


@settings(max_examples=60, deadline=None)
@given(*PLANS, st.lists(st.integers(0, 2_000), min_size=1, max_size=12))
def test_rows_are_a_pure_function_of_the_step(n: int, batch: int, seed: int, steps: list[int]) -> None:
    """Asked in any order, by any plan of the same settings, a step has the same rows."""
    in_order = {step: Plan(n, batch, (seed,)).rows(step).tolist() for step in sorted(steps)}
    plan = Plan(n, batch, (seed,))
    for step in steps:
        assert plan.rows(step).tolist() == in_order[step]


def epoch_of(plan: Plan, epoch: int) -> list[int]:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return np.concatenate([plan.rows(step) for step in steps]).tolist()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [epoch_of(Plan(200, 32, (seed,)), epoch) for seed in range(3) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 12
    assert list(range(200)) not in orders
    for a in range(12):
        for b in range(a):
            assert np.mean(np.array(orders[a]) == np.array(orders[b])) < 0.1


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    assert epoch_of(Plan(100, 7, (3,)), 2) == epoch_of(Plan(100, 30, (3,)), 2)


def test_callers_cannot_change_the_plan() -> None:
    rows = Plan(50, 10, (0,)).rows(0)
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 7


def test_a_phase_of_one_seed_is_not_another_phase_of_the_next() -> None:
    assert Plan(100, 100, (0, 1)).rows(0).tolist() != Plan(100, 100, (1, 0)).rows(0).tolist()


@settings(max_examples=100, deadline=None)
@given(*PLANS, st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_ranks_share_every_step_and_every_epoch(
    n: int, batch: int, seed: int, world: int, epoch: int, blocks: bool
) -> None:
    """Any number of ranks takes all rows of a step between them, in shares that differ by one at most."""
    plan = BlockPlan(n, batch, (seed,), 7, 3) if blocks else Plan(n, batch, (seed,))
    covered: list[int] = []
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        rows = plan.rows(step)
        shares = [rows[deal(rows, rank, world)] for rank in range(world)]
        assert sorted(np.concatenate(shares)) == sorted(rows)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert len(covered) + epoch * n == cells_before(plan, step)
        covered += np.concatenate(shares).tolist()
    assert sorted(covered) == list(range(n))


def test_one_rank_takes_rows_as_they_come_and_several_take_neighbours() -> None:
    rows = np.array([40, 3, 17, 9, 28])
    assert rows[deal(rows, 0, 1)].tolist() == rows.tolist()
    assert [rows[deal(rows, rank, 2)].tolist() for rank in range(2)] == [[3, 9], [17, 28, 40]]
