"""Whole runs of several files: the same as of one, each file a batch, batch keys of several columns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from schelix_scale.cli import app
from schelix_scale.config import Config, DataConfig
from schelix_scale.errors import DataError, RunError
from schelix_scale.export import export_run
from schelix_scale.inspection import inspect_source
from schelix_scale.pipeline import integrate
from schelix_scale.progress import QuietReporter
from schelix_scale.run import Run

from .small_runs import SMALL, STAGE_NAMES, make_adata


def split(adata: ad.AnnData, folder: Path, *drop: str) -> list[Path]:
    """Write the cells of each third to a file of its own; the genes of all but the first are permuted."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for place, rows in enumerate(np.array_split(np.arange(adata.n_obs), 3)):
        genes = np.arange(adata.n_vars) if place == 0 else rng.permutation(adata.n_vars)
        part = adata[rows, genes].copy()
        part.obs = part.obs.drop(columns=list(drop))
        paths.append(folder / f"donor{(2, 9, 10)[place]}.h5ad")
        part.write_h5ad(paths[-1])
    return paths


@pytest.fixture(scope="module")
def whole() -> ad.AnnData:
    return make_adata()


@pytest.fixture(scope="module")
def files(whole: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return split(whole, tmp_path_factory.mktemp("files") / "donors")


@pytest.fixture(scope="module")
def by_donor(whole: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return files of one batch each, without the batch column."""
    folder = tmp_path_factory.mktemp("by_donor") / "donors"
    folder.mkdir()
    paths = []
    for name in sorted(whole.obs["batch"].cat.categories):
        part = whole[whole.obs["batch"] == name].copy()
        part.obs_names = [f"c{i}" for i in range(part.n_obs)]
        part.obs = part.obs.drop(columns="batch")
        paths.append(folder / f"{name}.h5ad")
        part.write_h5ad(paths[-1])
    return paths


def test_files_give_what_one_file_gives(whole: ad.AnnData, files: list[Path], tmp_path: Path) -> None:
    whole.write_h5ad(tmp_path / "whole.h5ad")
    one = integrate(tmp_path / "whole.h5ad", batch_key="batch", out=tmp_path / "one", reporter=QuietReporter(), **SMALL)
    pattern = str(files[0].parent / "*.h5ad")
    reporter = QuietReporter()
    many = integrate(pattern, batch_key="batch", out=tmp_path / "many", reporter=reporter, **SMALL)
    pd.testing.assert_frame_equal(many.genes, one.genes)
    np.testing.assert_allclose(many.embedding, one.embedding, atol=1e-5)
    pd.testing.assert_frame_equal(many.cells.drop(columns="file"), one.cells)
    sizes = [len(rows) for rows in np.array_split(np.arange(whole.n_obs), 3)]
    assert many.cells["file"].tolist() == list(np.repeat(["donor2", "donor9", "donor10"], sizes))
    assert any("3 files are joined by the 150 genes that all have, of 150 in each" in m for m in reporter.messages)
    assert many.manifest["source"]["files"] == [str(path) for path in files]
    assert many.manifest["source"]["uri"].startswith("3 files: ")
    again = integrate(
        [str(p) for p in files], batch_key="batch", out=many.path, reporter=(r := QuietReporter()), **SMALL
    )
    assert [m for m in r.messages if "skipped" in m] == [f"{name}: done before, skipped" for name in STAGE_NAMES]
    np.testing.assert_array_equal(again.embedding, many.embedding)
    with pytest.raises(RunError, match=r"other settings or cells .*source\.uri: 3 files.* -> 2 files"):
        integrate(files[:2], batch_key="batch", out=many.path, reporter=QuietReporter(), **SMALL)


@pytest.mark.slow
def test_a_union_of_the_same_genes_is_their_intersection(files: list[Path], tmp_path: Path) -> None:
    for how in ("intersection", "union"):
        integrate(files, batch_key="batch", out=tmp_path / how, reporter=QuietReporter(), data__genes_join=how, **SMALL)
    one, two = Run.open(tmp_path / "intersection"), Run.open(tmp_path / "union")
    pd.testing.assert_frame_equal(one.genes, two.genes)
    np.testing.assert_array_equal(one.embedding, two.embedding)


@pytest.mark.slow  # among the longest of the suite
def test_a_union_has_the_genes_of_all_files(by_donor: list[Path], tmp_path: Path) -> None:
    adata = ad.read_h5ad(by_donor[2])
    adata[:, 30:].copy().write_h5ad(tmp_path / "less.h5ad")
    paths, reporter = [*by_donor[:2], tmp_path / "less.h5ad"], QuietReporter()
    settings = {**SMALL, "data.genes_join": "union"}
    run = integrate(paths, out=tmp_path / "run", reporter=reporter, **settings)
    assert list(run.genes.index) == list(adata.var_names)
    assert any(
        "3 files are joined by all their 150 genes; 2 of the files have all of them" in m for m in reporter.messages
    )
    shared = integrate(paths, out=tmp_path / "shared", reporter=QuietReporter(), **SMALL)
    assert list(shared.genes.index) == list(adata.var_names[30:])
    assert run.embedding.shape == shared.embedding.shape


@pytest.mark.slow
def test_each_file_is_a_batch_without_a_key(by_donor: list[Path], whole: ad.AnnData, tmp_path: Path) -> None:
    reporter = QuietReporter()
    run = integrate(by_donor, out=tmp_path / "run", reporter=reporter, **SMALL)
    assert any("each file is a batch ('file')" in message for message in reporter.messages)
    assert any("all get their file's name, as c0-donor0" in message for message in reporter.messages)
    assert run.manifest["config"]["data"]["batch_key"] == "file"
    assert run.manifest["summary"]["batches"] == 3
    expected = np.repeat([0, 1, 2], whole.obs["batch"].value_counts().sort_index())
    np.testing.assert_array_equal(run.cells["schelix_batch"], expected)
    order = np.argsort(whole.obs["batch"].cat.codes.to_numpy(), kind="stable")
    sorted_cells = whole[order].copy()
    one = integrate(sorted_cells, batch_key="batch", out=tmp_path / "one", reporter=QuietReporter(), **SMALL)
    np.testing.assert_allclose(run.embedding, one.embedding, atol=1e-5)
    for given in ({}, {"batch_key": "file"}):
        reporter = QuietReporter()
        integrate(by_donor, out=tmp_path / "run", reporter=reporter, **given, **SMALL)
        assert sum("skipped" in message for message in reporter.messages) == len(STAGE_NAMES)
    with pytest.raises(DataError, match=r"no obs column 'batch' \(batch_key\).*file"):
        integrate(by_donor, batch_key="batch", out=tmp_path / "other", reporter=QuietReporter(), **SMALL)


def test_a_run_of_files_is_exported_without_x(by_donor: list[Path], tmp_path: Path) -> None:
    run = integrate(by_donor, out=tmp_path / "run", reporter=QuietReporter(), **{**SMALL, "train.enabled": False})
    found = ad.read_h5ad(export_run(run, tmp_path / "light.h5ad"))
    assert found.X is None
    np.testing.assert_array_equal(found.obsm["X_schelix"], run.embedding)
    assert json.loads(found.uns["schelix"]["source_facts"])["files"] == [str(path) for path in by_donor]
    assert found.obs["file"].tolist() == run.cells["file"].tolist()
    before = by_donor[1].read_bytes()
    with pytest.raises(RunError, match=r"donor1\.h5ad is \(in\) one of the files that the run read"):
        export_run(run, by_donor[1], overwrite=True)
    assert by_donor[1].read_bytes() == before


def test_kinds_of_values_are_told_by_file(by_donor: list[Path], tmp_path: Path) -> None:
    for path in by_donor:
        shutil.copy(path, tmp_path / path.name)
    adata = ad.read_h5ad(by_donor[1])
    adata.X = adata.X.log1p()
    adata.write_h5ad(tmp_path / by_donor[1].name)
    with pytest.raises(DataError, match=r"1 look log-transformed \(donor1\), 2 do not \(donor0, donor2\)"):
        integrate(str(tmp_path / "*.h5ad"), out=tmp_path / "run", reporter=QuietReporter(), **SMALL)


@pytest.mark.slow
def test_a_batch_key_of_two_columns_is_that_of_their_texts(whole: ad.AnnData, tmp_path: Path) -> None:
    adata = whole.copy()
    adata.obs["lane"] = (np.arange(adata.n_obs) // 3 % 2).astype(np.int64)
    adata.obs["both"] = [f"{b} | {lane}" for b, lane in zip(adata.obs["batch"], adata.obs["lane"], strict=True)]
    one = integrate(adata, batch_key="both", out=tmp_path / "one", reporter=QuietReporter(), **SMALL)
    settings = {**SMALL, "data.obs_columns": ["cell_type"]}
    two = integrate(adata, batch_key="batch,lane", out=tmp_path / "two", reporter=QuietReporter(), **settings)
    np.testing.assert_array_equal(two.embedding, one.embedding)
    assert two.manifest["config"]["data"]["batch_key"] == "batch,lane"
    assert two.manifest["summary"]["batches"] == 6
    assert two.cells.columns.tolist() == ["schelix_row", "schelix_batch", "batch", "lane", "cell_type"]
    np.testing.assert_array_equal(two.cells["schelix_batch"], one.cells["schelix_batch"])
    found = inspect_source(adata, batch_key="batch,lane")
    assert found.batch_sizes == adata.obs["both"].value_counts().to_dict()
    assert found.problems == ()
    protected = {**SMALL, "data.protect": ["lane", "batch"]}
    with pytest.raises(DataError, match="'batch,lane' is the batch key"):
        integrate(adata, batch_key="batch,lane", out=tmp_path / "no", reporter=QuietReporter(), **protected)


def test_inspection_of_files(by_donor: list[Path], whole: ad.AnnData) -> None:
    found = inspect_source(by_donor)
    assert (found.batch_key, found.problems) == ("file", ())
    assert found.batch_sizes == whole.obs["batch"].astype(str).value_counts().to_dict()
    assert found.stored_bytes == sum(path.stat().st_size for path in by_donor)
    assert found.files == tuple(str(path) for path in by_donor)
    assert found.notes[0].startswith("3 files are joined by the 150 genes")
    asked = inspect_source(by_donor, config=Config(data=DataConfig(batch_key="donor")))
    assert asked.batch_key is None
    assert "no obs column 'donor'" in asked.problems[0]


@pytest.mark.slow  # among the longest of the suite
def test_the_command_line_takes_files_and_patterns(by_donor: list[Path], tmp_path: Path) -> None:
    fast = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    pattern = str(by_donor[0].parent / "*.h5ad")
    shown = CliRunner().invoke(app, ["integrate", pattern, "-o", str(tmp_path / "run"), *fast])
    assert shown.exit_code == 0, shown.output
    assert "360 in 3 batches" in shown.output
    assert "schelix export" not in shown.output
    listed = [
        "integrate",
        *map(str, by_donor),
        "-o",
        str(tmp_path / "run"),
        "--genes-join",
        "intersection",
        "-q",
        *fast,
    ]
    assert CliRunner().invoke(app, listed).exit_code == 0
    union = CliRunner().invoke(app, [*listed[: -len(fast)], *fast, "--genes-join", "union"])
    assert union.exit_code == 1
    assert "data.genes_join: intersection -> union" in " ".join(union.output.split())
    inspected = CliRunner().invoke(app, ["inspect", *map(str, by_donor), "--json"])
    assert (
        json.loads(inspected.output)["batch_sizes"] == Run.open(tmp_path / "run").cells["file"].value_counts().to_dict()
    )
    text = CliRunner().invoke(app, ["inspect", *map(str, by_donor)]).output
    assert "3 files are joined by the 150 genes that all have" in text
