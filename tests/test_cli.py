"""The command line: what the verbs do, print and explain."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from typer.testing import CliRunner

from schelix_scale import __version__
from schelix_scale.cli import app
from schelix_scale.output import print_run
from schelix_scale.run import Run

from .commands import cells, integrate, schelix

VERBS = ["integrate", "prepare", "graph", "train", "embed", "inspect", "verify", "export", "demo"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "cells.h5ad"
    cells().write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return a finished run and what the command printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, schelix(*integrate(source, out, "--batch-key", "batch"))


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS)], ids=["root", *VERBS])
def test_help_loads_nothing_heavy(verb: list[str]) -> None:
    code = """
import sys
from schelix_scale.cli import app
try:
    app([*sys.argv[1:], "--help"])
except SystemExit as done:
    print("\\nexit", done.code, *sorted({name.split(".")[0] for name in sys.modules}))
"""
    shown = subprocess.run([sys.executable, "-c", code, *verb], capture_output=True, text=True, check=True).stdout
    text, _, loaded = shown.rpartition("\nexit 0 ")
    assert {"rich", "schelix_scale", "typer"} <= set(loaded.split())
    heavy = {"anndata", "dask", "h5py", "matplotlib", "numpy", "pandas", "scanpy", "scipy", "torch", "zarr"}
    assert set(loaded.split()) & heavy == set()
    assert ("Example" in text) == bool(verb)


def test_no_arguments_show_the_help() -> None:
    shown = schelix()
    assert "Usage: schelix" in shown.output or "Usage: root" in shown.output
    assert all(verb in shown.output for verb in VERBS)


def test_version() -> None:
    assert schelix("--version").stdout == f"schelix {__version__}\n"


def test_integrate_says_where_the_embedding_is(finished: tuple[Path, Any]) -> None:
    out, shown = finished
    assert shown.exit_code == 0, shown.output
    run = Run.open(out)
    for fact in (
        f"embedding  {out / 'embedding.zarr'}, obsm['X_schelix']: 240 cells x {run.embedding.shape[1]}\n",
        "cells      240 in 3 batches\n",
        f"genes      120: {(run.genes['role'] == 'anchor').sum()} Anchors",
        "values     counts: all values are integral",
        "time       ",
        f"schelix export {out} cells-integrated.h5ad",
    ):
        assert fact in shown.stdout
    assert all(f"{stage} " in shown.stdout for stage in run.manifest["stages"])
    assert "embed: done" in shown.stderr
    assert list(ad.read_zarr(out / "embedding.zarr").obs["type"]) == list(cells().obs["type"])


def test_the_next_command_can_be_pasted(
    finished: tuple[Path, Any], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, odd = Run.open(finished[0]), tmp_path / "my cells; v2.h5ad"
    odd.symlink_to(source)
    run.manifest["source"]["uri"] = str(odd)
    print_run(run, "my runs/$1")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "schelix export" in line]
    assert shlex.split(line)[:4] == ["schelix", "export", "my runs/$1", "my cells; v2-integrated.h5ad"]
    for none in ("AnnData in memory", str(tmp_path / "gone.h5ad")):
        run.manifest["source"]["uri"] = none
        print_run(run, "~/run")
        shown = capsys.readouterr().out
        assert "export" not in shown
        assert f"read_zarr('{Path.home()}/run/embedding.zarr')" in shown


def test_overwrite_says_that_the_run_is_removed() -> None:
    shown = CliRunner().invoke(app, ["integrate", "--help"], env={"COLUMNS": "200"}).output
    assert "Start over: remove what is in the directory that -o names." in shown


def test_strength_is_explained() -> None:
    shown = CliRunner().invoke(app, ["integrate", "--help"], env={"COLUMNS": "200"}).output
    assert "How much is corrected and smoothed: 1 (the default) is the full method, 0 is plain PCA." in shown


def test_the_same_command_again_skips_everything(source: Path, finished: tuple[Path, Any]) -> None:
    out, _ = finished
    before = Run.open(out).manifest["finished"]
    again = schelix(*integrate(source, out, "--batch-key", "batch"))
    assert again.exit_code == 0
    assert again.stderr.count("done before, skipped") == 5
    assert Run.open(out).manifest["finished"] == before


def test_quiet_shows_nothing(source: Path, finished: tuple[Path, Any]) -> None:
    shown = schelix(*integrate(source, finished[0], "--batch-key", "batch", "--quiet"))
    assert (shown.exit_code, shown.output) == (0, "")


def test_other_settings_are_refused(source: Path, finished: tuple[Path, Any]) -> None:
    out, _ = finished
    refused = schelix(*integrate(source, out, "--seed", 4))
    assert refused.exit_code == 1
    assert "holds a run with other settings or cells (seed: 0 -> 4)" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert Run.open(out).verify() == []


def test_options_win_over_set_and_set_over_the_file(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("seed = 1\nthreads = 2\n[genes]\nn_hvg = 90\n[graph]\nk = 12\n[train]\nenabled = false\n")
    chosen = [
        "--config",
        file,
        "--set",
        "seed=2",
        "--set",
        "graph.k=9",
        "--seed",
        3,
        "--threads",
        1,
        "--protect",
        "type",
        "--set",
        "strength=0.9",
        "--strength",
        0.25,
    ]
    shown = schelix("integrate", source, "-o", tmp_path / "run", *chosen, "--max-memory", "2GB", "--device", "cpu")
    assert shown.exit_code == 0, shown.output
    config = Run.open(tmp_path / "run").config
    assert (config.seed, config.threads, config.graph.k, config.genes.n_hvg) == (3, 1, 9, 90)
    assert config.strength == 0.25
    assert (config.data.protect, config.max_memory, config.device) == (("type",), "2GB", "cpu")
    replaced = schelix("integrate", source, "-o", tmp_path / "run", "-c", file, "--seed", 5, "--overwrite")
    assert replaced.exit_code == 0, replaced.output
    assert Run.open(tmp_path / "run").config.seed == 5


def test_inspect(source: Path) -> None:
    shown = schelix("inspect", source)
    assert shown.exit_code == 0, shown.output
    assert f"source     {source}" in shown.stdout
    for fact in ("cells      240", "genes      120", "3 of 'batch': ", "values     counts: ", "needs      about "):
        assert fact in shown.stdout
    found = json.loads(schelix("inspect", source, "--json", "--batch-key", "type").stdout)
    assert (found["n_cells"], found["batch_sizes"]) == (240, {"0": 80, "1": 80, "2": 80})


def test_inspect_exits_with_1_if_there_are_problems(source: Path) -> None:
    shown = schelix("inspect", source, "-b", "donor", "--set", "graph.k=400")
    assert shown.exit_code == 1
    assert shown.stdout.count("problem: ") == 2
    assert "columns that could name batches: batch, type" in shown.stdout
    as_json = schelix("inspect", source, "-b", "donor", "--json")
    assert as_json.exit_code == 1
    assert "donor" in json.loads(as_json.stdout)["problems"][0]


def test_verify(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert schelix(*integrate(source, out, "--set", "train.enabled=false")).exit_code == 0
    shown = schelix("verify", out)
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert f"{out} is complete" in shown.stdout
    with (out / "genes.parquet").open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    (out / "cells.parquet").unlink()
    shown = schelix("verify", out)
    assert shown.exit_code == 1
    assert shown.stderr.count("problem: ") == 2
    assert "genes.parquet (made by stage genes) has another checksum" in shown.stderr
    assert "cells.parquet (made by stage genes) is missing" in shown.stderr
    assert schelix(*integrate(source, out, "--set", "train.enabled=false")).exit_code == 0
    assert schelix("verify", source.parent).exit_code == 1


def test_export(source: Path, finished: tuple[Path, Any], tmp_path: Path) -> None:
    out, _ = finished
    target = tmp_path / "copy.h5ad"
    shown = schelix("export", out, target)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == f"wrote {target} with obsm['X_schelix']\n"
    np.testing.assert_array_equal(ad.read_h5ad(target).obsm["X_schelix"], Run.open(out).embedding)
    refused = schelix("export", out, target)
    assert refused.exit_code == 1
    assert "copy.h5ad exists" in refused.stderr
    assert schelix("export", out, target, "--overwrite", "--quiet").output == ""
    assert "is the file that the run read" in schelix("export", out, source, "--overwrite").stderr
