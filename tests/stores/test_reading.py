"""How much is read: never the whole matrix, and few reads for scattered rows."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from schelix_scale.stores import AnnDataStore, _matrix
from schelix_scale.stores._rows import ranges, spans

from .truth import Truth, make_truth, to_anndata, write_zarr

N, G, PER_CELL = 20_000, 1_000, 200


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, sparse.csr_matrix]:
    """32 MB of CSR: 4 million stored values."""
    rng = np.random.default_rng(0)
    indices = (np.arange(PER_CELL, dtype=np.int32) * 5 + rng.integers(0, 5, (N, PER_CELL), dtype=np.int32)).ravel()
    data = rng.integers(1, 9, N * PER_CELL).astype(np.float32)
    x_ng = sparse.csr_matrix((data, indices, np.arange(N + 1, dtype=np.int64) * PER_CELL), shape=(N, G))
    small = make_truth(N, 1)
    adata = to_anndata(Truth(np.empty(0), small.obs, [f"g{i}" for i in range(G)]), x_ng)
    folder = tmp_path_factory.mktemp("large")
    adata.write_h5ad(folder / "cells.h5ad")
    write_zarr(adata, folder / "cells.zarr", 3, chunks=(20_000,))
    return folder, x_ng


@pytest.mark.parametrize("rows", [np.arange(9_000, 9_100), np.random.default_rng(2).permutation(N)[:100]])
@pytest.mark.parametrize("name", ["cells.h5ad", "cells.zarr"])
def test_never_whole(large: tuple[Path, sparse.csr_matrix], name: str, rows: np.ndarray) -> None:
    folder, x_ng = large
    store = AnnDataStore(folder / name)
    store.read(rows[:2])
    tracemalloc.start()
    try:
        got = store.read(rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(got.toarray(), x_ng[rows].toarray())
    assert peak < 6e6, f"{peak} bytes for 100 of {N} cells of a 32 MB matrix"


@pytest.mark.parametrize("encoding", ["csr", "csc", "dense"])
def test_pieces_smaller_than_the_asked_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """The result does not depend on how the read is cut, also when a piece is less than one row."""
    monkeypatch.setattr(_matrix, "BRIDGE", 0)
    truth = make_truth()
    matrix = truth.x_ng if encoding == "dense" else sparse.csr_matrix(truth.x_ng).asformat(encoding)
    write_zarr(to_anndata(truth, matrix), tmp_path / "a.zarr", 3, chunks=(4, 5) if encoding == "dense" else (6,))
    to_anndata(truth, matrix).write_h5ad(tmp_path / "a.h5ad")
    rows, genes = np.random.default_rng(3).permutation(83)[:60], np.array([20, 3, 35])
    for path in (tmp_path / "a.zarr", tmp_path / "a.h5ad"):
        for piece in (1, 7, 100):
            monkeypatch.setattr(_matrix, "PIECE", piece)
            got = AnnDataStore(path).read(rows)
            np.testing.assert_array_equal(got.toarray(), truth.x_ng[rows])
            np.testing.assert_array_equal(AnnDataStore(path).read(rows, genes).toarray(), truth.x_ng[rows][:, genes])


@settings(max_examples=100, deadline=None)
@given(
    gaps=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), max_size=40),
    bridge=st.integers(0, 20),
    cap=st.integers(1, 60),
)
def test_spans_cover_every_run_once(gaps: list[tuple[int, int]], bridge: int, cap: int) -> None:
    lengths = np.array([length for _, length in gaps], dtype=np.int64)
    starts = np.cumsum([gap for gap, _ in gaps], dtype=np.int64) + np.cumsum(np.r_[0, lengths])[: len(gaps)]
    stops = starts + lengths
    parts = list(spans(starts, stops, bridge, cap))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(gaps)))
    for part in parts:
        assert part.stop > part.start
        assert stops[part.stop - 1] - starts[part.start] <= cap + max(lengths[part])
        assert np.all(starts[part][1:] - stops[part][:-1] <= bridge)
    expected = [i for start, length in zip(starts, lengths, strict=True) for i in range(start, start + length)]
    assert ranges(starts, lengths).tolist() == expected


def test_overflow_becomes_infinite_without_a_warning(tmp_path: Path) -> None:
    x_ng = np.array([[1e300, 1.0], [2.0, np.nan]])
    truth = make_truth(2, 2)
    to_anndata(truth, x_ng).write_h5ad(tmp_path / "a.h5ad")
    got = AnnDataStore(tmp_path / "a.h5ad").read(np.arange(2)).toarray()
    np.testing.assert_array_equal(got, [[np.inf, 1], [2, np.nan]])
