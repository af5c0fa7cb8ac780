"""What methods share, and the peers where they are installed."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import anndata
import numpy as np
import pytest
from _peers import _countable, by_batch, in_file_order
from _prepare import partial_labels, selected
from _split import write_split
from _tasks import Task, run_task

from tests.benchmarks.data import made_up


def task_of(path: Path, method: str = "pca", seed: int = 0) -> Task:
    return Task(str(path), "batch", method, seed)


def test_a_fifth_of_the_labels_is_told_the_same_for_a_seed(tmp_path: Path) -> None:
    made_up(tmp_path / "a.h5ad")
    truth = anndata.read_h5ad(tmp_path / "a.h5ad").obs["cell_type"].astype(str).to_numpy()
    told = [partial_labels(task_of(tmp_path / "a.h5ad", seed=seed)) for seed in (0, 0, 1)]
    known = [labels_n != "Unknown" for labels_n in told]
    assert [int(mask.sum()) for mask in known] == [48, 48, 48]
    assert all((labels_n[mask] == truth[mask]).all() for labels_n, mask in zip(told, known, strict=True))
    assert (known[0] == known[1]).all()
    assert (known[0] != known[2]).any()


def test_batch_by_batch_and_back(tmp_path: Path) -> None:
    made_up(tmp_path / "a.h5ad")
    adata = selected(task_of(tmp_path / "a.h5ad"))
    batches, rows = by_batch(adata, "batch")
    assert [set(batch.obs["batch"]) for batch in batches] == [{"0"}, {"1"}]
    assert (in_file_order([batch.X.toarray() for batch in batches], rows) == np.asarray(adata.X)).all()


@pytest.mark.parametrize(
    ("kind", "noted"),
    [
        ("counts", ""),
        ("linear", "values are not all integral: its counts are rounded\n"),
        ("log", "values are logarithms: its counts are exp(x) - 1, rounded\n"),
    ],
)
def test_counts_of_any_values(tmp_path: Path, kind: str, noted: str) -> None:
    made_up(tmp_path / "a.h5ad")
    adata = anndata.read_h5ad(tmp_path / "a.h5ad")
    counts_ng = np.asarray(adata.X).copy()
    changed = {"counts": counts_ng, "linear": counts_ng * 1.01 + 0.2 * (counts_ng > 30), "log": np.log1p(counts_ng)}
    adata.X = changed[kind].astype(np.float32)
    adata.write_h5ad(tmp_path / "b.h5ad")
    found = _countable(task_of(tmp_path / "b.h5ad"), tmp_path)
    expected_ng = np.round(changed[kind]) if kind == "linear" else counts_ng
    assert (found.layers["counts"].toarray() == expected_ng).all()
    notes = tmp_path / "notes.txt"
    assert (notes.read_text() if notes.exists() else "") == noted


def test_scanorama_rows_are_those_of_the_file(tmp_path: Path) -> None:
    pytest.importorskip("scanorama", reason="the peers come with the extra [benchmark]")
    from _peers import scanorama

    made_up(tmp_path / "a.h5ad")
    rows = made_up(tmp_path / "sorted.h5ad", sort_batches=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own libraries
        mixed_nd = scanorama(task_of(tmp_path / "a.h5ad", "scanorama"), tmp_path)["scanorama"]
        sorted_nd = scanorama(task_of(tmp_path / "sorted.h5ad", "scanorama"), tmp_path)["scanorama"]
    assert mixed_nd.shape == (240, 59)
    np.testing.assert_allclose(mixed_nd[rows], sorted_nd, atol=1e-4)


def test_the_largest_batch_is_split_in_two(tmp_path: Path) -> None:
    made_up(tmp_path / "a.h5ad")
    cells = anndata.read_h5ad(tmp_path / "a.h5ad").obs["batch"].astype(str)
    largest = cells.value_counts().idxmax()
    about = write_split(str(tmp_path / "a.h5ad"), "batch", 0, str(tmp_path / "split.h5ad"))
    found = anndata.read_h5ad(tmp_path / "split.h5ad")
    assert about == {"n_cells": int((cells == largest).sum()), "largest": largest}
    assert list(found.obs_names) == list(cells.index[cells == largest])
    sizes = found.obs["pseudo_batch"].value_counts()
    assert sorted(sizes.index) == ["a", "b"]
    assert abs(sizes["a"] - sizes["b"]) <= 1
    other = write_split(str(tmp_path / "a.h5ad"), "batch", 1, str(tmp_path / "other.h5ad"))
    assert other == about
    assert list(anndata.read_h5ad(tmp_path / "other.h5ad").obs["pseudo_batch"]) != list(found.obs["pseudo_batch"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "module", "dimensions"), [("concord", "concord", 100), ("scvi", "scvi", 30), ("scanvi", "scvi", 30)]
)
def test_deep_peers_embed_every_cell(
    tmp_path: Path, method: str, module: str, dimensions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip("the peers come with the extra [benchmark]")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other on a busy machine take minutes
    made_up(tmp_path / "a.h5ad")
    outcome = run_task(task_of(tmp_path / "a.h5ad", method), tmp_path / "scratch")
    assert np.load(outcome.embeddings[method]).shape == (240, dimensions)
