"""A run is continued from its directory alone, stage by stage, to what `integrate` gives."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from schelix_scale.cli import app
from schelix_scale.continuing import continue_run
from schelix_scale.errors import ConfigError, RunError
from schelix_scale.pipeline import integrate, prepare
from schelix_scale.progress import QuietReporter
from schelix_scale.run import Run, RunDirectory

from .small_runs import SMALL, make_adata

SETTINGS: dict[str, Any] = {**SMALL, "data.label_key": "cell_type", "data.obs_columns": ("condition",)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "cells.h5ad"
    adata = make_adata()
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).where(np.arange(adata.n_obs) % 3 == 0, "unknown")
    adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "run"
    return prepare(source, batch_key="batch", out=out, reporter=QuietReporter(), **SMALL)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("whole") / "run"
    return integrate(source, batch_key="batch", out=out, reporter=QuietReporter(), **SMALL)


def schelix(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow  # among the longest of the suite
def test_stage_by_stage_is_the_same_as_at_once_and_needs_no_source(
    whole: Run, prepared: Path, source: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(prepared, tmp_path / "run"))
    moved = source.rename(source.with_suffix(".away"))
    try:
        for verb, after in (("graph", f"Next: schelix train {out}"), ("train", f"Next: schelix embed {out}")):
            shown = schelix(verb, out)
            assert shown.exit_code == 0, shown.output
            assert after in shown.stdout
        shown = schelix("embed", out)
        assert shown.exit_code == 0, shown.output
        assert "embedding.zarr" in shown.stdout
    finally:
        moved.rename(source)
    np.testing.assert_array_equal(Run.open(out).embedding, whole.embedding)
    assert Run.open(out).verify() == []
    assert {key: value for key, value in Run.open(out).manifest["summary"].items() if key != "seconds"} == {
        key: value for key, value in whole.manifest["summary"].items() if key != "seconds"
    }
    reporter = QuietReporter()
    integrate(source, batch_key="batch", out=out, reporter=reporter, **SMALL)
    assert sum(message.endswith("done before, skipped") for message in reporter.messages) == 5


def test_what_is_missing_is_named_with_its_command(prepared: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(prepared, tmp_path / "run"))
    for verb, message in (("train", f"Run `schelix graph {out}` first"), ("embed", f"Run `schelix graph {out}` first")):
        refused = schelix(verb, out)
        assert refused.exit_code == 1
        assert message in refused.stderr
    continue_run(out, "graph", reporter=QuietReporter())
    with pytest.raises(RunError, match=rf"stage train of {out} is not done.*Run `schelix train {out}` first"):
        continue_run(out, "embed", reporter=QuietReporter())
    (out / "features" / "anchor.npy").unlink()
    with pytest.raises(RunError, match=r"is not prepared: stage features is not done, or damaged.*schelix prepare"):
        continue_run(out, "train", reporter=QuietReporter())
    with pytest.raises(RunError, match=r"is not a run"):
        continue_run(tmp_path, "train", reporter=QuietReporter())


def test_a_stage_takes_other_settings_of_its_own(prepared: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(prepared, tmp_path / "run"))
    continue_run(out, "graph", reporter=QuietReporter(), graph__k=9)
    assert np.load(next(out.glob("graph/*/indices.npy"))).shape[1] == 9
    run = continue_run(out, "train", then=["embed"], reporter=QuietReporter(), train__refine_steps=11)
    assert run is not None
    assert (run.config.graph.k, run.config.train.refine_steps) == (9, 11)
    with pytest.raises(
        ConfigError, match=rf"graph\.k: 9 -> 12: this cannot change in stage train.*`schelix graph {out}"
    ):
        continue_run(out, "train", reporter=QuietReporter(), graph__k=12)
    with pytest.raises(ConfigError, match=r"seed: 0 -> 3: .*Give it to another run"):
        continue_run(out, "train", reporter=QuietReporter(), seed=3)
    with pytest.raises(ConfigError, match="unknown setting"):
        continue_run(out, "train", reporter=QuietReporter(), train__steps=3)
    assert Run.open(out).verify() == []
    continue_run(out, "graph", reporter=QuietReporter(), graph__k=10)
    with pytest.raises(RunError, match=rf"stage train of {out} .* is older than what it was made from"):
        continue_run(out, "embed", reporter=QuietReporter())


@pytest.mark.slow
def test_labels_that_the_run_does_not_carry_are_read_from_the_source(source: Path, tmp_path: Path) -> None:
    whole = integrate(source, batch_key="batch", out=tmp_path / "whole", reporter=QuietReporter(), **SETTINGS)
    out = prepare(source, batch_key="batch", out=tmp_path / "run", reporter=QuietReporter(), **SETTINGS)
    continue_run(out, "graph", reporter=QuietReporter())
    run = continue_run(out, "train", then=["embed"], reporter=QuietReporter())
    assert run is not None
    np.testing.assert_array_equal(run.embedding, whole.embedding)
    make_adata(seed=5).write_h5ad(tmp_path / "changed.h5ad")
    with RunDirectory.open(out, writable=True) as directory:
        directory.source["uri"] = str(tmp_path / "changed.h5ad")
        directory.configure(directory.config)
    with pytest.raises(RunError, match=r"changed\.h5ad is not what .* was prepared from"):
        continue_run(out, "train", reporter=QuietReporter())


def test_cells_in_memory_can_be_trained_from_the_cache_only(tmp_path: Path) -> None:
    settings = {**SMALL, "train.align_steps": 3, "train.refine_steps": 3}
    out = prepare(make_adata(), batch_key="batch", out=tmp_path / "run", reporter=QuietReporter(), **settings)
    continue_run(out, "graph", reporter=QuietReporter())
    with pytest.raises(RunError, match=r"were in memory and are not at hand"):
        continue_run(out, "train", reporter=QuietReporter(), train__input="stream")
    assert continue_run(out, "train", then=["embed"], reporter=QuietReporter(), train__input="cache") is not None
