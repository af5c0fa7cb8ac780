from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from schelix_scale.config import Config, DataConfig, GraphConfig, TrainConfig
from schelix_scale.errors import DataError, StoreError
from schelix_scale.inspection import estimate_costs, inspect_source
from schelix_scale.pipeline import integrate
from schelix_scale.progress import QuietReporter
from schelix_scale.stores import open_store


def cells(n: int = 240, g: int = 60, **obs: Any) -> ad.AnnData:
    rng = np.random.default_rng(0)
    x_ng = rng.poisson(2.0, (n, g)).astype(np.float32)
    table = {"batch": np.array(["a", "b", "b", "c"])[np.arange(n) % 4], "age": rng.normal(size=n)} | obs
    names = [f"cell{i}" for i in range(n)]
    var = pd.DataFrame(index=[f"gene{i}" for i in range(g)])
    return ad.AnnData(sparse.csr_matrix(x_ng), obs=pd.DataFrame(table, index=names), var=var)


def test_what_is_found_in_a_good_file(tmp_path: Path) -> None:
    adata = cells()
    adata.layers["counts"] = adata.X.copy()
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    found = inspect_source(path)
    assert (found.source, found.layer, found.layers) == (str(path), "X", ("X", "counts"))
    assert (found.n_cells, found.n_genes) == (240, 60)
    assert found.nonzeros_per_cell == pytest.approx((adata.X.toarray() > 0).sum() / 240)
    assert found.stored_bytes == path.stat().st_size
    assert (found.batch_key, found.batch_sizes) == ("batch", {"a": 60, "b": 120, "c": 60})
    assert found.value_kind == "counts"
    assert "all values are integral" in found.value_reason
    assert found.problems == ()
    assert found.likely_batch_columns == ()
    assert json.loads(json.dumps(found.to_dict()))["batch_sizes"] == {"a": 60, "b": 120, "c": 60}


def test_values_of_the_asked_layer_are_looked_at() -> None:
    adata = cells()
    adata.layers["log"] = adata.X.log1p() * 0.99
    found = inspect_source(adata, config=Config(data=DataConfig(layer="log")))
    assert (found.layer, found.value_kind, found.stored_bytes) == ("log", "log", None)


def test_an_absent_default_batch_key_is_no_problem_but_an_asked_one_is() -> None:
    adata = cells(donor=np.arange(240) % 5, plate=np.arange(240) % 2)
    del adata.obs["batch"]
    found = inspect_source(adata)
    assert (found.batch_key, found.batch_sizes, found.problems) == (None, {}, ())
    assert set(found.likely_batch_columns) == {"donor", "plate"}
    assert found.value_kind == "counts"
    for asked in (
        inspect_source(adata, batch_key="doner"),
        inspect_source(adata, config=Config(data=DataConfig(batch_key="doner"))),
    ):
        assert asked.batch_key is None
        assert asked.likely_batch_columns[0] == "donor"
        assert "has no obs column 'doner'" in asked.problems[0]
    assert inspect_source(adata, batch_key="donor").batch_sizes == dict.fromkeys("01234", 48)


def test_all_problems_are_collected() -> None:
    adata = cells(batch=[np.nan] * 3 + ["a"] * 237)
    adata.var_names = ["twin", "twin", *adata.var_names[2:]]
    adata.X.data[adata.X.indptr[7] : adata.X.indptr[8]] = 0
    found = inspect_source(adata, config=Config(data=DataConfig(protect=("stage",)), graph=GraphConfig(k=300)))
    assert found.batch_sizes == {"a": 237, "nan": 3}
    assert found.value_kind == "counts"
    for problem in (
        "missing or empty for 3 of 240 cells",
        "1 gene names that occur more than once",
        "1 of the 240 cells just read have no counts",
        "no obs column 'stage'",
        "has 240 cells; graph.k = 300 neighbours need more. Lower it: --set graph.k=60",
    ):
        assert any(problem in message for message in found.problems), problem
    assert len(found.problems) == 5


@pytest.mark.parametrize(
    ("value", "problem"), [(np.nan, "1 NaN values"), (-1.0, "1 negative values"), (np.inf, "1 infinite values")]
)
def test_bad_values_are_a_problem_and_no_kind_is_decided(value: float, problem: str) -> None:
    adata = cells()
    adata.X.data[5] = value
    found = inspect_source(adata)
    assert (found.value_kind, found.value_reason) == (None, "")
    assert problem in found.problems[0]


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        (["a"] * 240, "has one batch only"),
        ([*["a"] * 150, *["b"] * 89, "c"], "fewer than 2 cells"),
        ([f"cell{i}" for i in range(240)], "looks like an identifier of cells"),
        (np.linspace(0, 1, 240), "looks continuous"),
    ],
)
def test_batches_that_cannot_be_used(batch: Any, problem: str) -> None:
    assert problem in inspect_source(cells(batch=batch)).problems[0]


@pytest.mark.parametrize(
    ("asked", "settings", "problem"),
    [
        ("batch", {"protect": ["stage"]}, "the protected columns stage have no value in 3 of 240 cells"),
        ("stage", {"protect": ["stage"]}, "protect: 'stage' is the batch key"),
        ("batch", {"obs_columns": ["batch", "aeg"]}, "has no obs column 'aeg' (data.obs_columns)"),
        ("batch", {"obs_columns": ["schelix_row"]}, "obs columns schelix_row cannot be kept"),
        ("a_b", {"obs_columns": ["a/b"]}, "obs columns a_b cannot be kept: they have the same name once"),
        ("donor", {"label_key": "donor"}, "label_key: 'donor' is the batch key"),
        ("donor", {"label_key": "batch"}, None),
        ("batch", {"obs_columns": []}, None),
    ],
)
def test_what_stops_a_run_is_a_problem_and_nothing_else(
    tmp_path: Path, asked: str, settings: dict[str, Any], problem: str | None
) -> None:
    groups = np.arange(240) % 3
    stage = np.where(groups > 0, "late", "early").astype(object)
    if asked != "stage":
        stage[:3] = None
    adata = cells(stage=stage, donor=groups, schelix_row=0, a_b=groups, **{"a/b": groups})
    config = Config.model_validate({"data": {"obs_columns": ["batch", "donor", "stage"], **settings}})
    found = inspect_source(adata, asked, config)
    if problem is None:
        assert found.problems == ()
        return
    (message,) = found.problems
    assert problem in message
    with pytest.raises(DataError, match=re.escape(message)):
        integrate(adata, batch_key=asked, out=tmp_path / "run", config=config, reporter=QuietReporter())
    assert not (tmp_path / "run").exists(), "refused before anything is computed"


def test_many_batches_are_not_listed() -> None:
    assert inspect_source(cells(1500, 5, batch=[f"cell{i}" for i in range(1500)])).batch_sizes == {}


def test_kinds_that_differ_between_batches_are_a_problem() -> None:
    adata = cells()
    of_a = np.flatnonzero(adata.obs["batch"] == "a")
    dense = adata.X.toarray()
    dense[of_a] = np.log1p(dense[of_a]) * 1.1
    dense[-1, 0] = 200
    found = inspect_source(ad.AnnData(dense, obs=adata.obs))
    assert found.value_kind is None
    assert "different kinds of values" in found.problems[0]


def test_no_cells_are_a_problem(tmp_path: Path) -> None:
    cells()[:0].copy().write_h5ad(tmp_path / "none.h5ad")
    found = inspect_source(tmp_path / "none.h5ad")
    assert found.n_cells == 0
    assert any("has 0 cells" in problem for problem in found.problems)


def test_every_batch_of_a_large_source_is_sampled() -> None:
    adata = cells(9_000, 8, batch=np.r_[np.repeat("large", 8_990), np.repeat("small", 10)])
    adata.X.data[adata.X.indptr[8_990] :] += 0.5  # as large as counts, but for ten cells in nine thousand not integral
    assert "1 look log-transformed (small), 1 do not (large)" in inspect_source(adata).problems[0]


def test_what_cannot_be_opened_raises(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        inspect_source(tmp_path / "none.h5ad")
    with pytest.raises(StoreError, match="no layer 'count'"):
        inspect_source(cells(), config=Config(data=DataConfig(layer="count")))


def test_costs_grow_with_cells_and_follow_the_settings() -> None:
    small, large = open_store(cells(300, 20)), open_store(cells(30_000, 20))
    settings = Config(threads=2, max_memory="8GB")
    assert estimate_costs(large, settings) > estimate_costs(small, settings)
    untrained = settings.model_copy(update={"train": TrainConfig(enabled=False)})
    assert estimate_costs(large, untrained)[1] < estimate_costs(large, settings)[1]
    plain = settings.model_copy(update={"strength": 0.0})
    assert estimate_costs(large, plain)[1] == estimate_costs(large, untrained)[1]
    tight = settings.model_copy(update={"max_memory": "20MB"})
    assert estimate_costs(large, tight)[0] < estimate_costs(large, settings)[0]
    approximate = settings.model_copy(update={"graph": GraphConfig(method="pynndescent")})
    assert estimate_costs(small, approximate)[1] > estimate_costs(small, settings)[1]
