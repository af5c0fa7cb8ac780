"""The command line: one message with the remedy for what cannot work."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from .commands import PYTHON, cells, integrate, schelix


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "cells.h5ad"
    cells().write_h5ad(path)
    return path


def broken(change: Callable[[ad.AnnData], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        adata = cells()
        change(adata)
        adata.write_h5ad(folder / "bad.h5ad")
        return folder / "bad.h5ad"

    return write


def text_file(folder: Path) -> Path:
    (folder / "bad.h5ad").write_text("cell,gene\n")
    return folder / "bad.h5ad"


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (lambda folder: folder / "bad.h5ad", [], "bad.h5ad does not exist"),
        (text_file, [], "bad.h5ad is not an HDF5 file"),
        (
            broken(lambda a: None),
            ["-b", "bach"],
            "has no obs column 'bach' (batch_key). Columns that could name batches",
        ),
        (broken(lambda a: a.obs.__setitem__("batch", "one")), [], "has one batch only"),
        (broken(lambda a: a.X.data.__setitem__(3, np.nan)), [], "1 NaN values"),
        (broken(lambda a: setattr(a, "var_names", ["g"] * a.n_vars)), [], "gene names that occur more than once"),
        (broken(lambda a: None), ["--layer", "counts"], "has no layer 'counts'"),
        (broken(lambda a: None), ["--set", "genes.hvg=3"], "unknown setting genes.hvg"),
        (broken(lambda a: None), ["--set", "graph.k=one"], "graph.k = 'one'"),
        (broken(lambda a: None), ["--config", "none.toml"], "none.toml does not exist"),
        (broken(lambda a: None), ["--strength", "2"], "strength = 2.0"),
        (broken(lambda a: None), ["--max-memory", "much"], "'much' is not an amount of memory"),
        (broken(lambda a: None), ["--device", "cuda:99"], "CUDA"),
        (broken(lambda a: None), ["--protect", "stage"], "has no obs column 'stage' (protect)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_bad_input_is_one_message(
    tmp_path: Path, write: Callable[[Path], Path], options: list[str], message: str
) -> None:
    shown = schelix("integrate", write(tmp_path), "-o", tmp_path / "run", *options)
    assert shown.exit_code == 1
    assert shown.stdout == ""
    assert "Traceback" not in shown.stderr
    (error,) = [line for line in shown.stderr.splitlines() if line.startswith("error: ")]
    assert message in error
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_foreign_directories_are_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    shown = schelix(*integrate(source, tmp_path, "--overwrite"))
    assert shown.exit_code == 1
    assert "is not a run (no run.json) and not empty: it has thesis.tex" in shown.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [*PYTHON, "inspect", str(tmp_path / "none.h5ad")]
    for arguments, environment in [
        (["--debug", *command[3:]], {}),
        (command[3:], {"SCHELIX_DEBUG": "1"}),
    ]:
        shown = subprocess.run(
            [*PYTHON, *arguments], capture_output=True, text=True, check=False, env=os.environ | environment
        )
        assert shown.returncode == 1
        assert "Traceback" in shown.stderr
        assert "StoreError" in shown.stderr
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout) == (1, "")
    assert shown.stderr.startswith("error: ")
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["integrat"], "Did you mean 'integrate'"),
        (["integrate", "x.h5ad", "-o", "run", "--bach-key", "donor"], "--batch-key"),
        (["integrate", "x.h5ad"], "--out"),
    ],
)
def test_typos_get_a_suggestion(arguments: list[str], suggestion: str) -> None:
    shown = schelix(*arguments)
    assert shown.exit_code == 2
    assert suggestion in shown.output
