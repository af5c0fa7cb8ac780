from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import anndata
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from schelix_scale.errors import ConfigError, StoreError
from schelix_scale.stores.anndata import AnnDataStore
from schelix_scale.training.loader import Minibatch, Shuffle, StreamLoader, shuffle_for
from schelix_scale.training.plan import BlockPlan
from tests.counting import CountingStore

N, G = 301, 17


@pytest.fixture(scope="module")
def dense() -> np.ndarray:
    x_ng = np.random.default_rng(4).poisson(1.0, (N, G)).astype(np.float32)
    x_ng[[0, 7, N - 1]] = 0
    return x_ng


@pytest.fixture(scope="module", params=["zarr", "h5ad"])
def store(request: pytest.FixtureRequest, dense: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> AnnDataStore:
    path, adata = tmp_path_factory.mktemp("cells") / f"cells.{request.param}", anndata.AnnData(sparse.csr_matrix(dense))
    if request.param == "zarr":
        with anndata.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
            adata.write_zarr(path)
    else:
        adata.write_h5ad(path)
    return AnnDataStore(path)


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("schelix-loader")]


def check(batches: Iterable[Minibatch], dense: np.ndarray) -> list[int]:
    """Compare values with the dense matrix; return the rows in order."""
    rows: list[int] = []
    for batch in batches:
        np.testing.assert_array_equal(batch.x_ng.toarray(), dense[batch.rows])
        assert batch.x_ng.dtype == np.float32
        rows += batch.rows.tolist()
    return rows


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 90), st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_every_epoch_covers_every_row_once(n: int, batch: int, block: int, buffer_steps: int, epoch: int) -> None:
    plan = BlockPlan(n, batch, (3,), block, buffer_steps)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    rows = [plan.rows(step) for step in steps]
    assert [len(r) for r in rows[:-1]] == [batch] * (len(rows) - 1)
    assert sorted(np.concatenate(rows)) == list(range(n))
    for step in reversed(steps):
        left, count = BlockPlan(n, batch, (3,), block, buffer_steps).buffer(step)
        followers = rows[step - steps[0] : step - steps[0] + count]
        np.testing.assert_array_equal(left, np.concatenate(followers))


def test_a_buffer_has_few_blocks_and_orders_differ() -> None:
    """A buffer of 64 rows has at most 4 blocks of 16 and parts of another; no two orders are alike."""
    plans = [BlockPlan(960, 32, (seed,), 16, 2) for seed in (0, 1)]
    orders = [
        np.concatenate([plan.rows(30 * epoch + step) for step in range(30)]) for plan in plans for epoch in (0, 1, 2)
    ]
    assert len({tuple(order) for order in orders}) == 6
    for order in orders:
        for first in range(0, 960, 64):
            assert len(np.unique(order[first : first + 64] // 16)) == 4
        assert np.mean(np.diff(order) == 1) < 0.1
        assert np.abs(np.corrcoef(order, np.arange(960))[0, 1]) < 0.5


def test_callers_cannot_change_the_plan() -> None:
    rows = BlockPlan(50, 10, (0,), 4, 2).rows(0)
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 7


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 200), st.integers(0, 3), st.integers(0, 12), st.data())
def test_any_sizes_from_any_step(
    batch: int, block: int, buffer: int, epoch: int, first: int, data: st.DataObject
) -> None:
    loader = StreamLoader(AnnDataStore(ANY), batch_size=batch, seed=(2,), shuffle=Shuffle(block, buffer))
    first = min(first, loader.steps_per_epoch - 1)
    rows = check(loader.epoch(epoch, first), ANY_DENSE)
    steps = range(epoch * loader.steps_per_epoch + first, (epoch + 1) * loader.steps_per_epoch)
    assert rows == np.concatenate([loader.plan.rows(step) for step in steps]).tolist()
    if first == 0:
        assert sorted(rows) == list(range(90))


ANY_DENSE = np.random.default_rng(1).poisson(1.0, (90, 5)).astype(np.float32)
ANY = Path()


@pytest.fixture(autouse=True, scope="module")
def _any(tmp_path_factory: pytest.TempPathFactory) -> None:
    global ANY
    ANY = tmp_path_factory.mktemp("any") / "any.h5ad"
    anndata.AnnData(sparse.csr_matrix(ANY_DENSE)).write_h5ad(ANY)


def test_epochs_follow_each_other(store: AnnDataStore, dense: np.ndarray) -> None:
    loader = StreamLoader(store, batch_size=40, shuffle=Shuffle(8, 80))
    rows = check(loader.steps(0, 16), dense)
    assert rows == np.concatenate([loader.plan.rows(step) for step in range(16)]).tolist()
    assert sorted(rows[:N]) == sorted(rows[N:]) == list(range(N))
    assert rows[:N] != rows[N:]


def test_some_rows_and_genes(store: AnnDataStore, dense: np.ndarray) -> None:
    some, genes = np.flatnonzero(np.arange(N) % 3 != 1), np.array([5, 2, 16])
    loader = StreamLoader(store, some, batch_size=32, shuffle=Shuffle(8, 64), genes=genes)
    batches = list(loader.epoch(0))
    for batch in batches:
        np.testing.assert_array_equal(batch.x_ng.toarray(), dense[np.ix_(batch.rows, genes)])
    assert sorted(np.concatenate([batch.rows for batch in batches])) == some.tolist()


@pytest.mark.parametrize(("first", "stop"), [(3, 6), (7, 8), (0, 1), (5, 13), (4, 4)])
def test_reads_only_what_the_steps_hold(store: AnnDataStore, dense: np.ndarray, first: int, stop: int) -> None:
    counting = CountingStore(store)
    loader = StreamLoader(counting, batch_size=40, shuffle=Shuffle(8, 120))
    rows = check(loader.steps(first, stop), dense)
    assert rows == [row for step in range(first, stop) for row in loader.plan.rows(step)]
    np.testing.assert_array_equal(counting.reads, np.bincount(np.array(rows, int), minlength=N))
    assert counting.largest <= 120


def test_reads_ahead_by_one_buffer_at_the_most(store: AnnDataStore) -> None:
    counting = CountingStore(store)
    with closing(StreamLoader(counting, batch_size=8, shuffle=Shuffle(8, 32)).steps(0, 200)) as batches:
        dealt = 0
        for _ in range(100):
            dealt += len(next(batches).rows)
            assert dealt <= counting.reads.sum() <= dealt + 2 * 32
    assert readers() == []


def test_reads_while_a_minibatch_is_used(store: AnnDataStore) -> None:
    """The second buffer is read although only the first minibatch of the first was asked for."""
    counting = CountingStore(store)
    with closing(StreamLoader(counting, batch_size=16, shuffle=Shuffle(8, 64)).epoch(0)) as batches:
        next(batches)
        for _ in range(500):
            if counting.blocks_read == 2:
                break
            threading.Event().wait(0.01)
        assert (counting.blocks_read, counting.reads.sum()) == (2, 128)


def test_leaving_early_ends_the_thread(store: AnnDataStore, dense: np.ndarray) -> None:
    for batch in StreamLoader(store, batch_size=16, shuffle=Shuffle(8, 32)).epoch(0):
        check([batch], dense)
        break
    assert readers() == []


class Damaged(CountingStore):
    """Cannot read one of its cells."""

    bad = -1

    def read(self, rows: np.ndarray, genes: np.ndarray | None = None) -> sparse.csr_matrix:
        if self.bad in rows:
            raise StoreError("this cell is damaged")
        return super().read(rows, genes)


def test_errors_reach_the_consumer_after_what_was_read(store: AnnDataStore, dense: np.ndarray) -> None:
    damaged, dealt = Damaged(store), list[Minibatch]()
    loader = StreamLoader(damaged, batch_size=10, shuffle=Shuffle(5, 20))
    damaged.bad = int(loader.plan.rows(9)[0])
    with pytest.raises(StoreError, match="this cell is damaged"):
        dealt.extend(loader.epoch(0))
    assert len(dealt) == 8
    check(dealt, dense)
    assert readers() == []


def test_refuses_nothing_to_load(store: AnnDataStore) -> None:
    with pytest.raises(ConfigError, match="there are no cells to load"):
        StreamLoader(store, np.empty(0, int), batch_size=4, shuffle=Shuffle(2, 4))
    with pytest.raises(ConfigError, match="must be 1 or more"):
        StreamLoader(store, batch_size=0, shuffle=Shuffle(2, 4))


@pytest.mark.parametrize(
    ("budget", "expected"), [(80_000_000, (64, 1_000)), (10**9, (390, 12_500)), (10**12, (512, 65_536)), (1, (64, 64))]
)
def test_buffers_follow_from_memory(store: AnnDataStore, budget: int, expected: tuple[int, int]) -> None:
    class Rich(CountingStore):
        nonzeros_per_cell = 2_000.0

    assert shuffle_for(Rich(store), budget) == expected
