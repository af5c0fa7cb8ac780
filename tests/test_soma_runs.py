"""Whole runs of a SOMA experiment and of a census: as of the file of the same cells; exports into the source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tiledbsoma
import tiledbsoma.io
from typer.testing import CliRunner

from schelix_scale.cli import app
from schelix_scale.errors import RunError, StoreError
from schelix_scale.export import export_run
from schelix_scale.export_soma import export_into_source
from schelix_scale.pipeline import integrate
from schelix_scale.progress import QuietReporter
from schelix_scale.run import Run
from schelix_scale.stores import open_store

from .small_runs import SMALL, STAGE_NAMES, make_adata
from .stores.census_builder import CensusTruth, write_census

FAST = {**SMALL, "train.enabled": False}
FILTER = "tissue_general == 'lung' and is_primary_data == True"


def run(source: object, out: Path, **settings: Any) -> Run:
    settings = {**SMALL, **settings}
    return integrate(source, batch_key="batch", out=out, reporter=settings.pop("reporter", QuietReporter()), **settings)


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    return make_adata()


@pytest.fixture(scope="module")
def file_run(cells: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("file")
    cells.write_h5ad(folder / "cells.h5ad")
    return run(folder / "cells.h5ad", folder / "run")


@pytest.fixture(scope="module")
def written(cells: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an experiment of the cells in which each second joinid is of another tissue."""
    path = tmp_path_factory.mktemp("soma") / "cells.soma"
    others = cells.copy()
    others.obs_names = [f"other{i}" for i in range(others.n_obs)]
    both = ad.concat([cells, others])
    both.obs["tissue"] = np.repeat(["lung", "blood"], cells.n_obs)
    order = np.arange(both.n_obs).reshape(2, -1).T.reshape(-1)
    tiledbsoma.io.from_anndata(str(path), both[order].copy(), "RNA")
    return path


@pytest.fixture
def experiment(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "cells.soma"))


def as_census(cells: ad.AnnData, measured: np.ndarray | None = None) -> CensusTruth:
    """Each cell and, after it, a copy that is not primary; the batches are data sets, which measured all genes."""
    n, g = cells.shape
    obs = cells.obs.iloc[np.repeat(np.arange(n), 2)].reset_index(drop=True)
    obs.insert(0, "soma_joinid", np.arange(2 * n))
    obs["dataset_id"] = obs["batch"].astype(str)
    obs["tissue_general"] = "lung"
    obs["is_primary_data"] = np.arange(2 * n) % 2 == 0
    var = pd.DataFrame({"soma_joinid": np.arange(g), "feature_id": cells.var_names.to_numpy(object)})
    var["feature_name"] = [f"symbol{i}" for i in range(g)]
    datasets = sorted(set(obs["dataset_id"]))
    presence = np.ones((len(datasets), g), bool) if measured is None else measured
    return CensusTruth(np.repeat(cells.X.toarray(), 2, axis=0), obs, var, datasets, presence)


def test_a_filtered_experiment_is_integrated_as_its_file(file_run: Run, experiment: Path, tmp_path: Path) -> None:
    result = run(experiment, tmp_path / "run", data__obs_filter="tissue == 'lung'")
    np.testing.assert_allclose(result.embedding, file_run.embedding, atol=1e-5)
    pd.testing.assert_frame_equal(result.genes, file_run.genes)
    assert list(result.to_anndata().obs_names) == list(file_run.to_anndata().obs_names)


@pytest.mark.slow  # among the longest of the suite
def test_a_census_is_integrated_as_the_file_of_its_cells(
    file_run: Run, cells: ad.AnnData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    census = write_census(as_census(cells), tmp_path / "census")
    given = [
        "integrate",
        "census:homo_sapiens",
        "--census-uri",
        str(census),
        "-b",
        "batch",
        "-o",
        str(tmp_path / "run"),
    ]
    for key, value in SMALL.items():
        given += ["--set", f"{key}={json.dumps(value)}"]
    shown = CliRunner().invoke(app, [*given, "--obs-filter", FILTER])
    assert shown.exit_code == 0, shown.output
    assert "copies of cells" not in shown.output
    result = Run.open(tmp_path / "run")
    np.testing.assert_allclose(result.embedding, file_run.embedding, atol=1e-5)
    assert list(result.genes["feature_name"]) == [f"symbol{i}" for i in range(cells.n_vars)]
    assert list(result.genes.index) == list(cells.var_names)
    assert list(result.to_anndata().obs_names) == [str(2 * i) for i in range(cells.n_obs)]
    source = result.manifest["source"]
    assert source["uri"] == "census:homo_sapiens"
    assert source["census_build_date"] == "2025-11-08"
    assert len(source["soma_joinids_sha256"]) == 64

    again = CliRunner().invoke(app, [*given, "--obs-filter", FILTER])
    assert again.exit_code == 0, again.output
    assert all(f"{name}: done before, skipped" in again.output for name in STAGE_NAMES)
    other = CliRunner().invoke(app, [*given, "--obs-filter", "tissue_general == 'lung'"])
    assert other.exit_code == 1
    assert "other settings or cells" in other.output
    assert f"data.obs_filter: {FILTER}" in " ".join(other.output.split())
    write_census(as_census(cells), census, "2025-11-15")
    newer = CliRunner().invoke(app, [*given, "--obs-filter", FILTER])
    assert newer.exit_code == 1
    assert "source.census_build_date: 2025-11-08 -> 2025-11-15" in " ".join(newer.output.split())


def test_copies_in_a_census_are_warned_of(cells: ad.AnnData, tmp_path: Path) -> None:
    census = write_census(as_census(cells), tmp_path / "census")
    reporter = QuietReporter()
    run("census:homo_sapiens", tmp_path / "run", data__census_uri=str(census), reporter=reporter, **FAST)
    warned = [message for message in reporter.messages if message.startswith("warning: ")]
    assert any("360 of 720 cells of census:homo_sapiens are copies" in message for message in warned)


def test_genes_that_some_data_sets_did_not_measure(cells: ad.AnnData, tmp_path: Path) -> None:
    measured = np.ones((3, cells.n_vars), bool)
    measured[1, 100:120] = False
    measured[:, -1] = False
    truth = as_census(cells, measured)
    unseen = ~measured[[truth.datasets.index(name) for name in truth.obs["dataset_id"]]]
    truth.x_ng[unseen] = 0
    census = write_census(truth, tmp_path / "census")
    result = run("census:homo_sapiens", tmp_path / "run", data__census_uri=str(census), data__obs_filter=FILTER, **FAST)
    assert list(result.genes.index) == list(cells.var_names[:-1])
    assert np.isfinite(result.embedding).all()


def read_back(experiment: Path, value_filter: str | None = None) -> ad.AnnData:
    with tiledbsoma.Experiment.open(str(experiment)) as opened:
        query = tiledbsoma.AxisQuery(value_filter=value_filter) if value_filter else None
        with opened.axis_query("RNA", obs_query=query) as asked:
            return asked.to_anndata("data", obsm_layers=["X_schelix"])


@pytest.mark.slow  # among the longest of the suite
def test_an_experiment_is_exported_into_itself(experiment: Path, tmp_path: Path) -> None:
    lung = {"data__obs_filter": "tissue == 'lung'", **FAST}
    result = run(experiment, tmp_path / "run", **lung)
    shown = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(experiment), "--into-source"])
    assert shown.exit_code == 0, shown.output
    found = read_back(experiment, "tissue == 'lung'")
    z_nd = pd.DataFrame(result.embedding, index=result.to_anndata().obs_names)
    np.testing.assert_array_equal(found.obsm["X_schelix"], z_nd.loc[found.obs_names].to_numpy())
    with tiledbsoma.Experiment.open(str(experiment)) as opened:
        array = opened.ms["RNA"].obsm["X_schelix"]
        rows = array.read().tables().concat()["soma_dim_0"].to_numpy()
        assert json.loads(array.metadata["schelix"])["source"]["uri"] == str(experiment)
    assert set(rows) == set(range(0, 720, 2))
    # the source is as it was: the run is skipped, and the export needs --overwrite
    with pytest.raises(RunError, match=r"has obsm X_schelix already.*--overwrite"):
        export_into_source(result, experiment)
    again = run(experiment, tmp_path / "again", seed=1, **lung)
    assert export_into_source(again, experiment, overwrite=True) == str(experiment)
    found = read_back(experiment, "tissue == 'lung'")
    z_nd = pd.DataFrame(again.embedding, index=again.to_anndata().obs_names)
    np.testing.assert_array_equal(found.obsm["X_schelix"], z_nd.loc[found.obs_names].to_numpy())
    assert len([path for path in (experiment / "ms" / "RNA" / "obsm").iterdir() if "X_schelix" in path.name]) == 1


def test_in_pieces_and_beside_other_obsm(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("schelix_scale.export_soma._PIECE", 1000)
    with tiledbsoma.Experiment.open(str(experiment), "w") as opened:
        tiledbsoma.io.add_matrix_to_collection(opened, "RNA", "obsm", "X_pca", np.ones((720, 2), np.float32))
    result = run(experiment, tmp_path / "run", **FAST)
    export_into_source(tmp_path / "run", experiment)
    found = read_back(experiment)
    np.testing.assert_array_equal(found.obsm["X_schelix"], result.embedding)
    with tiledbsoma.Experiment.open(str(experiment)) as opened:
        assert set(opened.ms["RNA"].obsm) == {"X_pca", "X_schelix"}


def test_light_exports_and_what_is_refused(experiment: Path, file_run: Run, tmp_path: Path) -> None:
    result = run(experiment, tmp_path / "run", **FAST)
    for name in ("out.h5ad", "out.zarr"):
        out = export_run(result, tmp_path / name)
        found = ad.read_h5ad(out) if out.suffix == ".h5ad" else ad.read_zarr(out)
        assert found.X is None
        np.testing.assert_array_equal(found.obsm["X_schelix"], result.embedding)
        assert list(found.obs_names) == list(open_store(experiment).cell_names)
        assert json.loads(found.uns["schelix"]["source_facts"])["uri"] == str(experiment)
    experiment.rename(tmp_path / "away.soma")
    found = ad.read_h5ad(export_run(result, tmp_path / "out.h5ad", overwrite=True))
    np.testing.assert_array_equal(found.obsm["X_schelix"], result.embedding)
    (tmp_path / "away.soma").rename(experiment)
    with pytest.raises(RunError, match=r"is \(in\) the SOMA experiment.*--into-source"):
        export_run(result, experiment, overwrite=True)
    with pytest.raises(RunError, match=r"but .*elsewhere was named"):
        export_into_source(result, tmp_path / "elsewhere")
    source = file_run.manifest["source"]["uri"]
    with pytest.raises(RunError, match="is not a SOMA experiment"):
        export_into_source(file_run, source)
    with tiledbsoma.Experiment.open(str(experiment), "d") as opened:
        opened.obs.delete_cells(([3],))
    with pytest.raises(RunError, match="has changed since the run"):
        export_into_source(result, experiment)


def test_an_export_of_the_first_cells_leaves_queries_of_the_last_ones_working(written: Path, tmp_path: Path) -> None:
    experiment = tmp_path / "copy.soma"
    shutil.copytree(written, experiment)
    with tiledbsoma.Experiment.open(str(experiment)) as opened:
        total = opened.obs.count
    first = f"soma_joinid < {total // 2} and tissue == 'lung'"
    settings = {"data.obs_filter": first, "data.tiledb": {"vfs.s3.aws_secret_access_key": "SECRET"}}
    export_into_source(run(experiment, tmp_path / "run", **{**FAST, **settings}), experiment)
    with tiledbsoma.Experiment.open(str(experiment)) as opened:
        obsm = opened.ms["RNA"].obsm["X_schelix"]
        assert obsm.shape[0] == total
        assert "SECRET" not in str(dict(obsm.metadata))
        query = tiledbsoma.AxisQuery(value_filter=f"soma_joinid >= {total // 2}")
        with opened.axis_query("RNA", obs_query=query) as asked:
            assert asked.to_anndata("data", obsm_layers=["X_schelix"]).n_obs == total - total // 2


def test_settings_that_an_open_store_cannot_take_are_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is open already, so obs_filter would not be applied"):
        run(open_store(str(written)), tmp_path / "run", **{**FAST, "data.obs_filter": "tissue == 'lung'"})


def test_a_run_of_an_open_store_records_its_layer(cells: ad.AnnData, tmp_path: Path) -> None:
    layered = cells.copy()
    layered.layers["counts"] = layered.X.copy()
    layered.write_h5ad(tmp_path / "cells.h5ad")
    result = run(open_store(tmp_path / "cells.h5ad", layer="counts"), tmp_path / "run", **FAST)
    assert result.manifest["source"]["layer"] == "counts"
    assert ad.read_h5ad(export_run(result, tmp_path / "out.h5ad")).obsm["X_schelix"].shape == result.embedding.shape


@pytest.mark.slow
def test_keys_are_not_written_and_may_change(experiment: Path, tmp_path: Path) -> None:
    for number, secret in enumerate(("SECRET1", "SECRET2")):
        reporter = QuietReporter()
        keys = {"vfs.s3.aws_secret_access_key": secret, "vfs.s3.region": "eu-west-3"}
        result = run(experiment, tmp_path / "run", reporter=reporter, **{**FAST, "data.tiledb": keys})
        skipped = sum(message.endswith("done before, skipped") for message in reporter.messages)
        assert skipped == number * len(STAGE_NAMES)
    files = [path.read_bytes() for path in result.path.rglob("*") if path.is_file()]
    assert not any(b"SECRET" in content for content in files)
    assert any(b"eu-west-3" in content for content in files)
