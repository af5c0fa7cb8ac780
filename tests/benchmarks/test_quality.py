"""benchmarks/quality.py: its command line and, with small made-up data, a whole run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import quality
from _ablations import ABLATIONS
from _study import Problem, settings_of
from _tasks import Task, TaskFailed, run_task

from tests.benchmarks.data import made_up


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
        (["{kang}", "--methods", "pca,magic"], "unknown method magic. There are: schelix, schelix_labels, pca"),
        (["{kang}", "--methods", ","], "names none"),
        (["{kang}", "--seeds", "0"], "at least 1"),
        (["{kang}", "--methods", "schelix@magic"], "unknown method schelix@magic"),
        (["{kang}", "--set", "graph.kk=3"], "unknown setting graph.kk"),
        (["{kang}", "--set", "data.label_key=cell_type"], "the labels are what is scored"),
        (["{kang}", "--fill", "--no-cache"], "which --no-cache does without"),
        (["{kang}", "--split", "--methods", "pca"], "--split has its own methods, schelix, pca, harmony"),
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


def chosen(*arguments: str) -> list[str]:
    return quality.chosen_methods(quality.parser().parse_args(["a.h5ad", *arguments]))


def test_methods_that_are_run() -> None:
    ours = ["schelix", *(f"schelix@{name}" for name in ABLATIONS)]
    assert chosen() == ["schelix", "pca", "harmony", "scanorama", "scvi", "concord"]
    assert chosen("--methods", "scanvi, pca,pca") == ["scanvi", "pca"]
    assert chosen("--ablations") == ours
    assert chosen("--ablations", "--methods", "pca") == ["pca", *ours]
    assert chosen("--split") == ["schelix", "pca", "harmony"]


def test_settings_are_for_schelix_and_its_ablations() -> None:
    assert settings_of("schelix", ["graph.k=9"]) == ("graph.k=9",)
    assert settings_of("schelix@gate-off", ["graph.k=9"]) == ("graph.k=9", *ABLATIONS["gate-off"])
    assert settings_of("harmony", ["graph.k=9"]) == ()


def test_a_peer_that_is_not_installed_is_told_with_the_remedy(
    files: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(quality, "versions_of", lambda names: dict.fromkeys(set(names) - {"concord-sc"}, "1"))
    assert quality.main([str(files[0]), "--methods", "pca,concord"]) == 2
    message = capsys.readouterr().err
    assert "not installed: concord-sc (for concord). Install it: pip install" in message
    assert "leave the method out with --methods" in message


def test_a_failed_method_says_why(tmp_path: Path) -> None:
    task = Task(str(tmp_path / "none.h5ad"), "batch", "pca")
    with pytest.raises(TaskFailed, match=r"(?s)pca, seed 0, on .*none.h5ad ended with status 1.*FileNotFoundError"):
        run_task(task, tmp_path / "scratch")


def test_problems_carry_the_labels(files: list[Path]) -> None:
    assert quality.problems(files[:1], [], "bulk") == [Problem(files[0], "batch", "bulk")]


@pytest.mark.slow
def test_pca_and_harmony_are_run_scored_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scib_metrics", reason="scoring needs the extra [benchmark]")
    data, out = tmp_path / "made_up.h5ad", tmp_path / "quality.json"
    made_up(data)
    common = [str(data), "--cache", str(tmp_path / "cache"), "-o", str(out)]
    assert quality.main([*common, "--methods", "pca,harmony", "--seeds", "2", "--starts", "3"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [("pca", 0), ("pca", 1), ("harmony", 0), ("harmony", 1)]
    for row in rows:
        metrics = row["metrics"]
        assert (row["n_cells"], row["n_batches"], row["n_labels"]) == (240, 2, 3)
        assert metrics["total"] == pytest.approx(0.6 * metrics["bio"] + 0.4 * metrics["batch"])
        starts = row["starts"]
        assert [len(values) for values in starts.values()] == [3, 3]
        assert starts["nmi"][0] == pytest.approx(metrics["nmi_ari_cluster_labels_kmeans_nmi"])
        assert starts["ari"][0] == pytest.approx(metrics["nmi_ari_cluster_labels_kmeans_ari"])
        assert row["seconds"] > 0
        assert 50 < row["peak_mb"] < 5_000
        assert row["versions"]["scib-metrics"]
        assert set(row["guards"]) == {"kept_neighbors", "private_purity"}
        assert row["run"]["others"] is None or row["run"]["others"] >= 0
    assert rows[0]["guards"] == {"kept_neighbors": 1.0, "private_purity": None}
    assert rows[2]["metrics"]["batch"] > rows[0]["metrics"]["batch"]
    assert "± sd of 2" in capsys.readouterr().out

    assert quality.main([*common, "--methods", "harmony"]) == 0
    assert "harmony, seed 0" in (told := capsys.readouterr().err)
    assert told.count("MB, kept") == 2  # with pca, the reference
    again = json.loads(out.read_text())["rows"]
    assert [row["metrics"] for row in again] == [row["metrics"] for row in (rows[0], rows[1], rows[2])]

    assert quality.main([*common, "--methods", "harmony", "--again", "--fill"]) == 0
    assert capsys.readouterr().err.count("MB, kept") == 1

    assert quality.main([*common, "--methods", "pca", "--label-key", "kind"]) == 1
    assert "has no obs column 'kind'. Its columns: batch, cell_type" in capsys.readouterr().err
