from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from typer.testing import CliRunner

from schelix_scale.cli import app
from schelix_scale.config import Config
from schelix_scale.config_io import load_config
from schelix_scale.demo import BATCH, LABEL, SETTINGS, DemoResult, demo_cells, run_demo
from schelix_scale.errors import RunError
from schelix_scale.metrics import batch_mixing
from schelix_scale.progress import QuietReporter
from schelix_scale.stores import open_store
from schelix_scale.stores.batches import read_batches

CONFIGS = Path(__file__).parents[1] / "configs"


def test_the_demo_uses_its_config_file() -> None:
    assert load_config(CONFIGS / "demo.toml") == load_config(None, SETTINGS)


def test_there_are_these_configs() -> None:
    names = ["atlas", "census", "demo", "map", "small", "torchrun"]
    assert sorted(path.name for path in CONFIGS.iterdir()) == [f"{name}.toml" for name in names]


@pytest.mark.parametrize("name", ["atlas", "census", "demo", "small"])
def test_configs_load_and_every_key_is_explained(name: str) -> None:
    path = CONFIGS / f"{name}.toml"
    assert load_config(path) != Config()
    lines = [line for line in path.read_text().splitlines() if "=" in line and not line.startswith("#")]
    assert lines
    for line in lines:
        assert "  # " in line or " # " in line, f"{line!r} has no comment"


def test_the_cells_are_log_values_of_eight_wells() -> None:
    cells = demo_cells()
    assert cells.shape == (700, 765)
    assert list(cells.obs) == [LABEL, BATCH]
    assert all(name.endswith(f"-{well}") for name, well in cells.obs[BATCH].items())
    assert list(read_batches(open_store(cells), BATCH).sizes) == list(cells.obs[BATCH].value_counts().sort_index())
    assert cells.X.min() >= 0
    assert cells.X.max() < 20
    assert not cells.obsm


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo") / "out", QuietReporter())


@pytest.mark.slow
def test_the_demo_integrates_scores_and_draws(result: DemoResult) -> None:
    assert result.run.embedding.shape[0] == 700
    assert list(result.seconds) == list(result.run.manifest["stages"])
    assert result.single_stream == result.run.manifest["summary"]["single_stream"]
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    assert set(result.before) == set(result.after) == {"batch mixing", "labels: nmi", "labels: silhouette"}
    assert all(0 <= score <= 1 for score in (*result.before.values(), *result.after.values()))
    wells = ad.read_h5ad(result.data).obs[BATCH]
    assert result.after["batch mixing"] == batch_mixing(result.run.embedding, wells)
    # What the demonstration is to show: neither batches nor labels are worse than in the principal components.
    assert all(result.after[name] > before - 0.02 for name, before in result.before.items())
    assert result.after["batch mixing"] <= result.mixing_at_random + 0.05


@pytest.mark.slow
def test_again_nothing_is_done_anew(result: DemoResult) -> None:
    folder = result.picture.parent
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "run.json"}
    again = run_demo(folder, QuietReporter())
    assert (again.before, again.after, again.seconds) == (result.before, result.after, result.seconds)
    assert {path: path.stat().st_mtime_ns for path in times if path.name != ".lock"} == {
        path: time for path, time in times.items() if path.name != ".lock"
    }


@pytest.mark.slow
def test_a_lost_picture_and_scores_of_another_embedding_are_made_again(result: DemoResult) -> None:
    folder = result.picture.parent
    scores = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").write_text(json.dumps(scores | {"embedding": "other", "after": {}}))
    result.picture.unlink()
    again = run_demo(folder, QuietReporter())
    assert again.after == pytest.approx(result.after)
    assert again.picture.exists()


@pytest.mark.slow
def test_the_verb_prints_times_and_scores(result: DemoResult) -> None:
    shown = CliRunner().invoke(app, ["demo", "-o", str(result.picture.parent)])
    assert shown.exit_code == 0, shown.output
    assert f"picture    {result.picture}\n" in shown.stdout
    for name in ("batch mixing", "labels: nmi", "labels: silhouette"):
        (line,) = [line for line in shown.stdout.splitlines() if f"│ {name} " in line]
        assert f"{result.before[name]:.3f}" in line
        assert f"{result.after[name]:.3f}" in line
    assert all(f"│ {stage} " in shown.stdout for stage in result.seconds)
    assert ("the run is single-stream" in shown.stdout) == result.single_stream
    assert np.isfinite(result.mixing_at_random)


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RunError, match=r"out is a file, not a directory\. Choose another"):
        run_demo(tmp_path / "out", QuietReporter())
