"""Reading in one sweep: every asked row once and in order; rows that grow in memory, and rows that wait on disk."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from schelix_scale.errors import DataError
from schelix_scale.genes.sweep import MAX_BLOCK, MIN_BLOCK, RowStack, Spill, sweep
from schelix_scale.stores import MemoryStore

from ..counting import CountingStore

X_NG = np.random.default_rng(0).poisson(1.0, (9_000, 12)).astype(np.float32) + 1


def store_of(x_ng: np.ndarray) -> CountingStore:
    return CountingStore(MemoryStore(anndata.AnnData(sparse.csr_matrix(x_ng))))


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("cells", [10, 3_000, 10**6])
def test_every_row_is_read_once_and_in_order(threads: int, cells: int) -> None:
    store = store_of(X_NG)
    rows = np.sort(np.random.default_rng(1).choice(9_000, 4_000, replace=False))
    parts, blocks = zip(*sweep(store, rows, cells, threads), strict=True)
    np.testing.assert_array_equal(np.concatenate(parts), rows)
    np.testing.assert_array_equal(sparse.vstack(blocks).toarray(), X_NG[rows])
    np.testing.assert_array_equal(store.reads, np.isin(np.arange(9_000), rows))
    assert store.largest <= {10: MIN_BLOCK, 3_000: 375, 10**6: MAX_BLOCK}[cells]


def test_rows_far_from_each_other_are_not_read_at_once() -> None:
    rows = np.array([0, 1, 2, 400, 401, 8_000])
    parts = [part.tolist() for part, _ in sweep(store_of(X_NG), rows, 300)]
    assert parts == [[0, 1, 2], [400, 401], [8_000]]


def test_a_store_that_every_read_scans_is_read_in_few_blocks() -> None:
    store = store_of(X_NG)
    store.row_access = "scan"
    assert sum(1 for _ in sweep(store, np.arange(9_000), 6_000)) == store.blocks_read == 2


def test_bad_values_stop_the_sweep() -> None:
    spoiled = X_NG.copy()
    spoiled[700, 3] = -1
    with pytest.raises(DataError, match=r"negative.*cell 700"):
        list(sweep(store_of(spoiled), np.arange(9_000), 1_000))


@given(st.data())
def test_rows_are_put_between_others(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    n, k = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 15))
    x_ng = sparse.random(n + k, 5, 0.4, "csr", np.float32, rng)
    inserted = np.sort(rng.choice(n + k, k, replace=False))
    kept = np.setdiff1d(np.arange(n + k), inserted)
    stack = RowStack(5)
    cut = int(rng.integers(0, n + 1))
    for part in (kept[:cut], kept[cut:]):
        stack.append(x_ng[part])
    stack.insert(np.searchsorted(kept, inserted), x_ng[inserted])
    found = stack.matrix()
    found.check_format()
    np.testing.assert_array_equal(found.toarray(), x_ng.toarray())
    assert (found.dtype, found.indices.dtype) == (np.float32, np.int32)


def test_what_waits_on_disk_comes_back_and_leaves_nothing(tmp_path: Path) -> None:
    x_ng = sparse.csr_matrix(X_NG[:100])
    with Spill(tmp_path) as spill:
        for start in (0, 40):
            spill.append(np.arange(start, start + 40) + 1_000, x_ng[start : start + 40])
        assert list(tmp_path.iterdir()) == [], "the file has no name, so nothing is left if the process is killed"
        for rows, block in spill.blocks(12):
            np.testing.assert_array_equal(block.toarray(), X_NG[rows - 1_000])
        taken = spill.take(np.array([1_003, 1_039, 1_040, 1_079]), 12)
        np.testing.assert_array_equal(taken.toarray(), X_NG[[3, 39, 40, 79]])
    assert spill._file.closed
