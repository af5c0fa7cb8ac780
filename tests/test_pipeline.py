"""The whole run: real files, real stages; killed, damaged and repeated."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import schelix_scale
from schelix_scale import stages
from schelix_scale.errors import RunError
from schelix_scale.pipeline import integrate
from schelix_scale.progress import QuietReporter
from schelix_scale.run import RunDirectory

from .small_runs import SMALL, STAGE_NAMES, make_adata, run, within_and_between
from .synthetic import make_cells


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "cells.h5ad"
    make_adata().write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> schelix_scale.Run:
    return run(source, tmp_path_factory.mktemp("finished") / "run")


def test_embedding_keeps_types_and_drops_batches(finished: schelix_scale.Run, source: Path) -> None:
    from sklearn.decomposition import PCA

    adata = anndata.read_h5ad(source)
    before = PCA(10, random_state=0).fit_transform(np.log1p(adata.X.toarray() / adata.X.sum(axis=1).A1[:, None] * 1e4))
    types, batches = adata.obs["cell_type"].cat.codes.to_numpy(), adata.obs["batch"].cat.codes.to_numpy()
    assert within_and_between(before, batches) > 0.1, "the data must have a batch effect for this test to mean anything"
    assert within_and_between(finished.embedding, batches) < 0.1 * within_and_between(before, batches)
    assert within_and_between(finished.embedding, types) > 0.8


def test_what_a_run_holds(finished: schelix_scale.Run, source: Path) -> None:
    adata = anndata.read_h5ad(source)
    result = finished.to_anndata()
    pd.testing.assert_index_equal(result.obs_names, adata.obs_names, check_names=False)
    assert result.obs["cell_type"].tolist() == adata.obs["cell_type"].tolist()
    np.testing.assert_array_equal(result.obsm["X_schelix"], finished.embedding)
    assert finished.embedding.dtype == np.float32
    assert result.uns["schelix"]["source"] == str(source)
    with np.load(finished.path / "streams.npz") as streams:
        assert finished.manifest["summary"]["choices"]["clusters"] == len(streams["correction_centroids_kd"])
    assert list(finished.genes.columns) == ["mean", "var", "beta", "gamma", "rho", "role"]
    dense = adata.X.toarray() / adata.X.toarray().sum(axis=1, keepdims=True) * 1e4
    np.testing.assert_allclose(finished.genes["mean"], np.log1p(dense).mean(axis=0), rtol=1e-5)
    assert finished.cells["schelix_row"].tolist() == list(range(adata.n_obs))
    assert finished.verify() == []
    summary = finished.manifest["summary"]
    assert (summary["cells"], summary["genes"], summary["batches"], summary["values"]) == (360, 150, 3, "counts")


def test_a_finished_run_is_returned_untouched(finished: schelix_scale.Run, source: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.is_file()}
    reporter = QuietReporter()
    again = integrate(source, batch_key="batch", out=finished.path, reporter=reporter, **SMALL)
    assert reporter.messages == [f"{name}: done before, skipped" for name in STAGE_NAMES]
    after = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*") if path.is_file()}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {"run.json", ".lock"}
    np.testing.assert_array_equal(again.embedding, finished.embedding)


@pytest.mark.slow  # among the longest of the suite
def test_same_seed_same_embedding_other_seed_another(finished: schelix_scale.Run, source: Path, tmp_path: Path) -> None:
    np.testing.assert_array_equal(run(source, tmp_path / "same").embedding, finished.embedding)
    assert not np.array_equal(run(source, tmp_path / "other", seed=1).embedding, finished.embedding)


@pytest.mark.slow
def test_an_anndata_in_memory_and_zarr_give_the_same(finished: schelix_scale.Run, source: Path, tmp_path: Path) -> None:
    adata = anndata.read_h5ad(source)
    np.testing.assert_array_equal(run(adata, tmp_path / "memory").embedding, finished.embedding)
    with anndata.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
        adata.write_zarr(tmp_path / "cells.zarr")
    np.testing.assert_array_equal(run(tmp_path / "cells.zarr", tmp_path / "zarr").embedding, finished.embedding)


def _killed_after(source: Path, out: Path, stage: int) -> None:
    """Run in a child that kills itself right after a stage was recorded."""
    done = stages.STAGES[stage]

    def stage_then_die(context: object, directory: RunDirectory) -> None:
        done(context, directory)
        os.kill(os.getpid(), signal.SIGKILL)

    import schelix_scale.pipeline as pipeline

    pipeline.STAGES = (*stages.STAGES[:stage], stage_then_die, *stages.STAGES[stage + 1 :])
    run(source, out)


AFTER = [pytest.param(i, id=name, marks=[] if i in (1, 3) else pytest.mark.slow) for i, name in enumerate(STAGE_NAMES)]


@pytest.mark.parametrize("stage", AFTER)
def test_killed_after_a_stage_the_next_call_finishes_with_the_same_embedding(
    finished: schelix_scale.Run, source: Path, tmp_path: Path, stage: int
) -> None:
    out = tmp_path / "run"
    child = multiprocessing.get_context("spawn").Process(target=_killed_after, args=(source, out, stage))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    with pytest.raises(RunError, match="not finished"):
        schelix_scale.Run.open(out)
    reporter = QuietReporter()
    resumed = integrate(source, batch_key="batch", out=out, reporter=reporter, **SMALL)
    skipped = [message for message in reporter.messages if message.endswith("done before, skipped")]
    assert skipped == [f"{name}: done before, skipped" for name in STAGE_NAMES[: stage + 1]]
    np.testing.assert_array_equal(resumed.embedding, finished.embedding)
    assert resumed.verify() == []


@pytest.mark.parametrize(
    ("how", "damaged"),
    [
        ("cut", "features/anchor.npy"),
        ("bit flipped", "features/variant.npy"),
        pytest.param("bit flipped", "features/anchor.npy", marks=pytest.mark.slow),
        pytest.param("cut", "features/variant.npy", marks=pytest.mark.slow),
        pytest.param("cut", "genes.parquet", marks=pytest.mark.slow),
        ("bit flipped", "embedding.zarr/zarr.json"),
        pytest.param("cut", "embedding.zarr/zarr.json", marks=pytest.mark.slow),
        pytest.param("bit flipped", "genes.parquet", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_artifact_is_rebuilt_and_said(
    finished: schelix_scale.Run, source: Path, tmp_path: Path, damaged: str, how: str
) -> None:
    out = tmp_path / "run"
    run(source, out)
    path, reporter = out / damaged, QuietReporter()
    content = path.read_bytes()
    flipped = content[:-50] + bytes([content[-50] ^ 4]) + content[-49:]
    path.write_bytes(content[:-20] if how == "cut" else flipped)
    assert any(damaged.split("/")[0] in problem for problem in schelix_scale.Run.open(out).verify())
    assert run(source, out, reporter=reporter).verify() == []
    (said,) = [message for message in reporter.messages if message.endswith("is done again")]
    assert str(out / damaged.split("/zarr")[0]) in said
    np.testing.assert_array_equal(schelix_scale.Run.open(out).embedding, finished.embedding)


def test_no_batch_signal_is_said_and_nothing_is_corrected(tmp_path: Path) -> None:
    reporter = QuietReporter()
    adata = make_adata(batch_strength=0.0)
    result = integrate(adata, batch_key="batch", out=tmp_path / "run", reporter=reporter, **SMALL)
    assert any("no batch signal" in message for message in reporter.messages)
    assert result.manifest["summary"]["single_stream"] is True
    assert set(result.genes["role"]) <= {"anchor", "unused"}
    features = result.path / "features"
    np.testing.assert_array_equal(np.load(features / "anchor.npy"), np.load(features / "anchor_corrected.npy"))


def test_streams_and_backbone_are_written_when_asked(source: Path, tmp_path: Path) -> None:
    obsm = run(source, tmp_path / "run", **{"embed.streams": True}).to_anndata().obsm
    backbone = obsm["X_schelix_backbone"]
    bound = 0.4 + 0.2 * 1.4  # anchor_residual, and gate times the largest norm of z_A
    moved = np.linalg.norm(obsm["X_schelix"] - backbone, axis=1) / np.linalg.norm(backbone, axis=1)
    assert moved.max() <= bound + 1e-5
    assert moved.max() > 0
    assert obsm["X_schelix_variant"].shape == backbone.shape


def test_backbone_only(source: Path, tmp_path: Path) -> None:
    obsm = run(source, tmp_path / "run", **{"train.enabled": False, "embed.streams": True}).to_anndata().obsm
    np.testing.assert_array_equal(obsm["X_schelix"], obsm["X_schelix_backbone"])


def test_log_values_are_detected_and_give_nearly_the_same(
    finished: schelix_scale.Run, source: Path, tmp_path: Path
) -> None:
    adata = anndata.read_h5ad(source)
    counts = adata.X.toarray().astype(np.float64)
    adata.X = sparse.csr_matrix(np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4).astype(np.float32))
    reporter = QuietReporter()
    log = integrate(adata, batch_key="batch", out=tmp_path / "run", reporter=reporter, **SMALL)
    assert any("values are log" in message for message in reporter.messages)
    np.testing.assert_allclose(log.genes["mean"], finished.genes["mean"], rtol=1e-4)


def test_settings_from_a_config_object_and_keywords_are_merged() -> None:
    from schelix_scale.config_io import merge_settings

    config = schelix_scale.Config(seed=3, graph={"k": 11})
    merged = merge_settings(config, "donor", {"graph__theta": 0.5, "seed": 4})
    assert (merged.seed, merged.graph.k, merged.graph.theta, merged.data.batch_key) == (4, 11, 0.5, "donor")


@pytest.mark.parametrize("strength", [0.0, 0.9])
def test_many_small_batches_are_compared_all_the_same(tmp_path: Path, strength: float) -> None:
    cells = make_cells(n_types=4, n_batches=30, per_group=4, n_genes=150, batch_strength=strength)
    obs = pd.DataFrame({"batch": [f"b{b}" for b in cells.batch_n]}, index=[f"c{i}" for i in range(len(cells.batch_n))])
    adata = anndata.AnnData(sparse.csr_matrix(cells.counts_ng.astype(np.float32)), obs=obs)
    assert run(adata, tmp_path / "run").manifest["summary"]["single_stream"] is (strength == 0)


def test_batches_that_share_no_cluster_are_named_as_such(tmp_path: Path) -> None:
    adata = make_adata(batch_strength=0.0)
    profiles = np.random.default_rng(0).lognormal(0, 3, (3, adata.n_vars))
    codes = adata.obs["batch"].cat.codes.to_numpy()
    counts = np.random.default_rng(1).poisson(profiles[codes] / profiles.sum(axis=1)[codes, None] * 3000)
    counts[:, 0] += 1
    adata.X = sparse.csr_matrix(counts.astype(np.float32))
    reporter = QuietReporter()
    result = integrate(adata, batch_key="batch", out=tmp_path / "run", reporter=reporter, **SMALL)
    assert result.manifest["stages"]["genes"]["details"]["comparable"] == 0
    assert any("cannot be told apart" in message for message in reporter.messages)
    assert not any("no batch signal" in message for message in reporter.messages)


def test_awkward_obs_columns_come_along(tmp_path: Path) -> None:
    adata = make_adata()
    n = adata.n_obs
    adata.obs["cell"] = np.arange(n)
    adata.obs["when"] = pd.date_range("2020-01-01", periods=n)
    adata.obs["bin"] = pd.cut(np.arange(n), 4)
    adata.obs["span"] = pd.to_timedelta(np.arange(n), unit="s")
    adata.obs["mixed"] = [1, "a"] * (n // 2)
    adata.obs["CD4/CD8"] = 1.5
    adata.obs["maybe"] = pd.array([True, None] * (n // 2), dtype="boolean")
    result = run(adata, tmp_path / "run").to_anndata().obs
    assert result["cell"].tolist() == list(range(n))
    assert result["when"].astype(str).tolist()[0].startswith("2020-01-01")
    assert result["mixed"].astype(str).tolist()[:2] == ["1", "a"]
    assert (result["CD4_CD8"] == 1.5).all()
    assert {"bin", "span", "maybe", "batch"} <= set(result.columns)


@pytest.mark.slow  # among the longest of the suite
def test_less_memory_means_a_smaller_sketch_and_is_said(tmp_path: Path) -> None:
    cells = make_cells(n_types=4, n_batches=3, per_group=100, n_genes=150)
    obs = pd.DataFrame({"batch": [f"b{b}" for b in cells.batch_n]}, index=[f"c{i}" for i in range(len(cells.batch_n))])
    adata = anndata.AnnData(sparse.csr_matrix(cells.counts_ng.astype(np.float32)), obs=obs)
    reporter = QuietReporter()
    integrate(adata, batch_key="batch", out=tmp_path / "run", reporter=reporter, max_memory="10MB", **SMALL)
    assert any("memory allows a sketch of 1,000 cells" in message for message in reporter.messages)
    reporter = QuietReporter()
    integrate(adata, batch_key="batch", out=tmp_path / "run", reporter=reporter, max_memory="8GB", **SMALL)
    assert not any(message.endswith("skipped") for message in reporter.messages), "the sketch is another"


@pytest.mark.slow  # among the longest of the suite
def test_a_damaged_final_checkpoint_is_made_again(source: Path, tmp_path: Path) -> None:
    finished, reporter = run(source, tmp_path / "run"), QuietReporter()
    expected = np.array(finished.embedding)
    state = sorted(finished.path.glob("checkpoints/step-*"))[-1] / "state.pt"
    state.write_bytes(bytes(state.stat().st_size))
    shutil.rmtree(finished.path / "embedding.zarr")
    again = run(source, tmp_path / "run", reporter=reporter)
    assert any(message.endswith("train is done again") for message in reporter.messages)
    np.testing.assert_array_equal(again.embedding, expected)
    assert again.verify() == []
