"""benchmarks/quality.py: its command line and, with small made-up data, a whole run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import quality
from _study import Problem
from _tasks import Task, TaskFailed, run_task


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "kang.h5ad", tmp_path / "worm.h5ad"]
    for path in paths:
        path.touch()
    return paths


def found(files: list[Path], *keys: str) -> list[tuple[str, str]]:
    return [(problem.data.stem, problem.batch_key) for problem in quality.problems(files, keys, "cell_type")]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], [("kang", "batch"), ("worm", "batch")]),
        (["donor"], [("kang", "donor"), ("worm", "donor")]),
        (["kang.h5ad:stim"], [("kang", "stim"), ("worm", "batch")]),
        (["plate", "kang:stim", "kang:batch"], [("kang", "stim"), ("kang", "batch"), ("worm", "plate")]),
        (["a", "b", "a"], [("kang", "a"), ("kang", "b"), ("worm", "a"), ("worm", "b")]),
    ],
)
def test_batch_keys_of_each_file(files: list[Path], keys: list[str], expected: list[tuple[str, str]]) -> None:
    assert found(files, *keys) == expected


def test_a_file_may_be_named_by_its_path(files: list[Path]) -> None:
    assert found(files, f"{files[1]}:plate") == [("kang", "batch"), ("worm", "plate")]


def test_a_batch_key_of_no_file_is_refused(files: list[Path]) -> None:
    with pytest.raises(quality.UsageError, match=r"atlas.h5ad:stim: 'atlas.h5ad' is none of the files"):
        found(files, "atlas.h5ad:stim")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no DATA given"),
        (["{kang}", "--methods", "pca,magic"], "unknown method magic. There are: schelix, pca, harmony"),
        (["{kang}", "--methods", ","], "names none"),
        (["{kang}", "--seeds", "0"], "at least 1"),
        (["{kang}", "--set", "graph.kk=3"], "unknown setting graph.kk"),
        (["{kang}.gone"], "there is no file"),
    ],
)
def test_wrong_usage_is_told_before_work(
    files: list[Path],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    out = files[0].parent / "out.json"
    assert quality.main([*(text.format(kang=files[0]) for text in arguments), "-o", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_without_scib_metrics_the_remedy_is_named(
    files: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert quality.main([str(files[0])]) == 2
    assert "'.[benchmark]'" in capsys.readouterr().err


def test_a_failed_method_says_why(tmp_path: Path) -> None:
    task = Task(str(tmp_path / "none.h5ad"), "batch", "pca")
    with pytest.raises(TaskFailed, match=r"(?s)pca, seed 0, on .*none.h5ad ended with status 1.*FileNotFoundError"):
        run_task(task, tmp_path / "scratch")


def test_problems_carry_the_labels(files: list[Path]) -> None:
    assert quality.problems(files[:1], [], "bulk") == [Problem(files[0], "batch", "bulk")]


def made_up(path: Path, n: int = 240, g: int = 60) -> None:
    """Write three cell types in two batches, one gene of four shifted by batch."""
    import anndata
    import pandas as pd

    rng = np.random.default_rng(3)
    kinds, batches = rng.integers(0, 3, n), rng.integers(0, 2, n)
    means_ng = rng.gamma(2, 2, (3, g))[kinds] * np.where((np.arange(g) % 4 == 0) & (batches[:, None] == 1), 3.0, 1.0)
    obs = pd.DataFrame(
        {"batch": batches, "cell_type": [f"type {kind}" for kind in kinds]}, index=[f"c{i}" for i in range(n)]
    )
    anndata.AnnData(rng.poisson(means_ng).astype(np.float32), obs=obs).write_h5ad(path)


@pytest.mark.slow
def test_pca_and_harmony_are_run_scored_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scib_metrics", reason="scoring needs the extra [benchmark]")
    data, out = tmp_path / "made_up.h5ad", tmp_path / "quality.json"
    made_up(data)
    assert quality.main([str(data), "--methods", "pca,harmony", "--seeds", "2", "-o", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [("pca", 0), ("pca", 1), ("harmony", 0), ("harmony", 1)]
    for row in rows:
        metrics = row["metrics"]
        assert (row["n_cells"], row["n_batches"], row["n_labels"]) == (240, 2, 3)
        assert metrics["total"] == pytest.approx(0.6 * metrics["bio"] + 0.4 * metrics["batch"])
        assert row["seconds"] > 0
        assert 50 < row["peak_mb"] < 5_000
        assert row["versions"]["scib-metrics"]
    assert rows[2]["metrics"]["batch"] > rows[0]["metrics"]["batch"]
    assert "± sd of 2" in capsys.readouterr().out

    assert quality.main([str(data), "--label-key", "kind", "-o", str(tmp_path / "other.json")]) == 1
    assert "has no obs column 'kind'. Its columns: batch, cell_type" in capsys.readouterr().err
