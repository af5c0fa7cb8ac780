"""The whole run: input and settings that cannot work are named before anything is computed."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse

import schelix_scale
from schelix_scale.errors import ConfigError, DataError, RunError, StoreError
from schelix_scale.pipeline import integrate
from schelix_scale.progress import QuietReporter

from .small_runs import make_adata, run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "cells.h5ad"
    make_adata().write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> schelix_scale.Run:
    return run(source, tmp_path_factory.mktemp("finished") / "run")


def bad(change: str) -> anndata.AnnData:
    adata = make_adata()
    if change == "one batch":
        adata.obs["batch"] = "same"
    elif change == "lone cell":
        adata.obs["batch"] = ["alone", *adata.obs["batch"].astype(str)[1:]]
    elif change == "missing batch":
        adata.obs["batch"] = [np.nan, *adata.obs["batch"].astype(str)[1:]]
    elif change in ("nan", "inf", "negative"):
        adata.X.data[7] = {"nan": np.nan, "inf": np.inf, "negative": -1.0}[change]
    elif change == "empty cell":
        adata.X = sparse.csr_matrix(adata.X.toarray() * (np.arange(adata.n_obs) != 3)[:, None])
    elif change == "duplicate genes":
        adata.var_names = ["gene0", *adata.var_names[:-1]]
    elif change == "duplicate cells":
        adata.obs_names = ["cell0", *adata.obs_names[:-1]]
    return adata


@pytest.mark.filterwarnings("ignore:Observation names are not unique", "ignore:Variable names are not unique")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("one batch", "one batch"),
        ("lone cell", "alone"),
        ("missing batch", "batch"),
        ("nan", "NaN"),
        ("inf", r"infinite|inf"),
        ("negative", "negative"),
        ("empty cell", "no counts at all"),
        ("duplicate genes", "gene0"),
        ("duplicate cells", "cell0"),
    ],
)
def test_bad_input_is_named_and_leaves_no_run_that_looks_finished(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "bad.h5ad"
    bad(change).write_h5ad(path)
    with pytest.raises(DataError, match=message) as caught:
        run(path, tmp_path / "run")
    assert "bad.h5ad" in str(caught.value)
    with pytest.raises(RunError, match=r"not a run|not finished"):
        schelix_scale.Run.open(tmp_path / "run")


def test_a_missing_batch_key_lists_the_likely_columns(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"donor_id.*batch"):
        integrate(source, batch_key="donor_id", out=tmp_path / "run", reporter=QuietReporter())
    assert not (tmp_path / "run").exists()


def test_another_configuration_in_the_directory_is_refused(finished: schelix_scale.Run, source: Path) -> None:
    with pytest.raises(RunError, match=r"graph.k: 12 -> 9"):
        run(source, finished.path, **{"graph.k": 9})
    assert schelix_scale.Run.open(finished.path).verify() == []


def test_unknown_and_contradicting_settings(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"graph\.kk"):
        run(source, tmp_path / "run", graph__kk=3)
    with pytest.raises(ConfigError, match="Give one"):
        run(source, tmp_path / "run", data__batch_key="condition")
    with pytest.raises(StoreError, match=r"nowhere\.h5ad"):
        run(tmp_path / "nowhere.h5ad", tmp_path / "run")


def test_what_cannot_work_is_refused_before_anything_is_computed(source: Path, tmp_path: Path) -> None:
    adata = make_adata()
    adata.obs["schelix_row"] = 1
    with pytest.raises(DataError, match="schelix_row"):
        run(adata, tmp_path / "run")
    with pytest.raises(DataError, match=r"--set graph\.k="):
        run(source, tmp_path / "run", **{"graph.k": 400})
    adata = make_adata()
    adata.obs["condition"] = [np.nan, *adata.obs["condition"][1:]]
    with pytest.raises(DataError, match=r"condition have no value in 1 of 360 cells \(first: cell0\)"):
        run(adata, tmp_path / "run", protect=("condition",))
    with pytest.raises(DataError, match="is the batch key"):
        run(source, tmp_path / "run", data__protect=("batch",))
    assert not (tmp_path / "run").exists()
