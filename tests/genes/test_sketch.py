"""The sketch: every batch in it, rare types kept, reading bounded."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from schelix_scale.config import SketchConfig
from schelix_scale.errors import DataError
from schelix_scale.genes.sketch import Sketch, allocate, draw_sketch, sketch_size, swept_cells
from schelix_scale.stores import MemoryStore

from ..counting import CountingStore
from ..synthetic import dense_log_normalize, make_cells

LARGE = 10**12


def store_of(counts_ng: np.ndarray) -> CountingStore:
    return CountingStore(MemoryStore(anndata.AnnData(sparse.csr_matrix(counts_ng.astype(np.float32)))))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=30), st.integers(1, 4000), st.sampled_from([0.0, 0.5, 1.0]))
def test_allocate_deals_all_draws_and_leaves_no_group_out(sizes: list[int], total: int, power: float) -> None:
    given_out = allocate(np.array(sizes), total, power)
    assert (given_out <= sizes).all()
    assert (given_out >= 1).all()
    assert given_out.sum() == max(len(sizes), min(total, sum(sizes)))


def test_allocate_follows_the_square_root() -> None:
    np.testing.assert_allclose(allocate(np.array([10_000, 40_000, 90_000]), 600, 0.5), [100, 200, 300], atol=3)


def test_a_small_store_is_its_own_sketch_and_is_read_once() -> None:
    cells = make_cells(per_group=20)
    store = store_of(cells.counts_ng)
    names = [str(b) for b in range(4)]
    sketch = draw_sketch(store, cells.batch_n, names, SketchConfig(), len(cells.batch_n), "auto", 0)
    np.testing.assert_array_equal(sketch.rows, np.arange(len(cells.batch_n)))
    np.testing.assert_allclose(sketch.x_ng.toarray(), dense_log_normalize(cells.counts_ng), rtol=1e-5)
    assert (store.reads == 1).all()
    assert sketch.values.kind == "counts"


def large_store(rare: int) -> tuple[CountingStore, np.ndarray, np.ndarray]:
    """12,000 cells of 60 genes in batches of 10,000, 1,900 and 100; the last ``rare`` of the first are a type apart."""
    rng = np.random.default_rng(1)
    n = 12_000
    batch_n = np.repeat([0, 1, 2], [10_000, 1_900, 100])
    type_n = rng.integers(0, 3, n)
    type_n[10_000 - rare : 10_000] = 3
    profile = rng.lognormal(0, 1.5, (4, 60))
    counts = rng.poisson(profile[type_n] / profile.sum(axis=1)[type_n, None] * 500)
    return store_of(counts), batch_n, type_n


def test_sketch_of_a_large_store_has_every_batch_and_the_rare_type() -> None:
    store, batch_n, type_n = large_store(rare=12)
    config = SketchConfig(max_cells=1_500, rare_fraction=0.4)
    sketch = draw_sketch(store, batch_n, ["a", "b", "c"], config, config.max_cells, "auto", 0)
    assert len(sketch.rows) == 1_500
    assert (np.diff(sketch.rows) > 0).all()
    np.testing.assert_array_equal(sketch.batch_n, batch_n[sketch.rows])
    assert (np.bincount(sketch.batch_n) >= 60).all()
    expected = 12 * 1_500 / 12_000
    assert (type_n[sketch.rows] == 3).sum() >= 2 * expected, "an even draw would hold 1.5 of the 12"
    truth = dense_log_normalize(store.store.read(sketch.rows).toarray())
    np.testing.assert_allclose(sketch.x_ng.toarray(), truth, rtol=1e-5)


def test_reading_is_bounded_and_repeatable() -> None:
    store, batch_n, _ = large_store(rare=12)
    config = SketchConfig(max_cells=1_000)
    first = draw_sketch(store, batch_n, ["a", "b", "c"], config, config.max_cells, "auto", 3)
    assert store.reads.sum() <= 3.2 * config.max_cells
    assert store.reads.max() == 1, "one sweep"
    assert store.reads.sum() == swept_cells(store, config, config.max_cells) == 800 + 2 * 1_000
    assert store.largest <= 5_000
    again = draw_sketch(store, batch_n, ["a", "b", "c"], config, config.max_cells, "auto", 3)
    np.testing.assert_array_equal(first.rows, again.rows)
    other = draw_sketch(store, batch_n, ["a", "b", "c"], config, config.max_cells, "auto", 4)
    assert not np.array_equal(first.rows, other.rows)


def test_a_small_memory_budget_makes_a_smaller_sketch() -> None:
    store, _, _ = large_store(rare=0)
    config = SketchConfig()
    assert sketch_size(store, config, LARGE) == 12_000
    limited = sketch_size(store, config, int(4_000 * store.nonzeros_per_cell * 48))
    assert limited == pytest.approx(4_000, abs=1)


def test_bad_values_are_found_in_the_sketch() -> None:
    cells = make_cells(per_group=10)
    cells.counts_ng[5, 7] = np.nan
    with pytest.raises(DataError, match="NaN"):
        draw_sketch(store_of(cells.counts_ng), cells.batch_n, list("abcd"), SketchConfig(), 200, "auto", 0)


def test_bad_values_beside_the_first_draw_are_found_too() -> None:
    store, batch_n, _ = large_store(rare=0)
    counts = store.store.read(np.arange(12_000)).toarray()
    counts[:, 5] = np.where(np.arange(12_000) % 7 == 0, -1, counts[:, 5])
    config = SketchConfig(max_cells=300)
    clean = draw_sketch(store, batch_n, ["a", "b", "c"], config, 300, "auto", 0)
    first_only = np.setdiff1d(np.flatnonzero(counts[:, 5] < 0), clean.rows)
    counts[np.setdiff1d(np.flatnonzero(counts[:, 5] < 0), first_only), 5] = 0
    with pytest.raises(DataError, match="negative"):
        draw_sketch(store_of(counts), batch_n, ["a", "b", "c"], config, 300, "auto", 0)


def test_a_contradiction_in_the_pool_alone_is_found() -> None:
    store, batch_n, _ = large_store(rare=0)
    counts = store.store.read(np.arange(12_000)).toarray()
    config = SketchConfig(max_cells=300)
    draw_sketch(store, batch_n, ["a", "b", "c"], config, 300, "auto", 0)
    never_first = store.reads > 0
    drawn = draw_sketch(store, batch_n, ["a", "b", "c"], SketchConfig(max_cells=300, rare_fraction=0), 240, "auto", 0)
    never_first[drawn.rows] = False
    counts[never_first] += 0.5
    with pytest.raises(DataError, match=r"not integral.*decided from a sample"):
        draw_sketch(store_of(counts), batch_n, ["a", "b", "c"], config, 300, "auto", 0)


def test_what_does_not_fit_beside_the_values_of_few_genes_is_counted() -> None:
    sparse_cells = np.zeros((3_000, 4), np.float32)
    sparse_cells[:, 0] = 1
    assert sketch_size(store_of(sparse_cells), SketchConfig(), int(2_000 * 0.4 * (8 + 4_000))) == 2_000


def test_saved_and_loaded_with_some_of_the_genes(tmp_path: Path) -> None:
    cells = make_cells(per_group=20)
    drawn = draw_sketch(
        store_of(cells.counts_ng), cells.batch_n, list("abcd"), SketchConfig(), len(cells.batch_n), "auto", 0
    )
    genes = np.array([1, 4, 5, 179])
    drawn.save(tmp_path / "sketch.npz", genes)
    loaded = Sketch.load(tmp_path / "sketch.npz")
    expected = np.zeros_like(drawn.x_ng.toarray())
    expected[:, genes] = drawn.x_ng.toarray()[:, genes]
    assert expected.any(axis=0).sum() == 4
    np.testing.assert_array_equal(loaded.x_ng.toarray(), expected)
    assert loaded.x_ng.dtype == np.float32
    np.testing.assert_array_equal(loaded.rows, drawn.rows)
    np.testing.assert_array_equal(loaded.batch_n, cells.batch_n)
    assert loaded.values == drawn.values
