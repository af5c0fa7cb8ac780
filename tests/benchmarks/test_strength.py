"""benchmarks/strength.py: its command line and, with small made-up data, a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import strength

from tests.benchmarks.data import made_up


@pytest.mark.parametrize(
    ("text", "expected"), [("0,.25,1", [0.0, 0.25, 1.0]), ("1, 0.5,1,", [0.5, 1.0]), ("1e-3", [0.001])]
)
def test_strengths_are_ascending_and_different(text: str, expected: list[float]) -> None:
    assert strength.chosen_strengths(text, []) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strengths", "0,half"], "could not convert string to float: 'half'. Write numbers with commas"),
        (["--strengths", ","], "names none"),
        (["--strengths", "0,1.5"], "strength = 1.5"),
        (["--set", "graph.kk=3"], "unknown setting graph.kk"),
    ],
)
def test_wrong_usage_is_told_before_work(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kang.h5ad").touch()
    out = tmp_path / "out.json"
    assert strength.main([str(tmp_path / "kang.h5ad"), *arguments, "-o", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_missing_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert strength.main([str(tmp_path / "none.h5ad")]) == 2
    assert "there is no file" in capsys.readouterr().err


def row(level: float | None, bio: float, batch: float | None, kept: float) -> dict[str, object]:
    about = {"data": "kang", "batch_key": "donor", "n_cells": 1200, "n_batches": 2}
    total = None if batch is None else 0.6 * bio + 0.4 * batch
    metrics = {"bio": bio, "batch": batch, "total": total}
    return {**about, "strength": level, "metrics": metrics, "guards": {"kept_neighbors": kept}}


def test_table_and_picture(tmp_path: Path) -> None:
    rows = [row(None, 0.5, 0.25, 1.0), row(0.0, 0.5, None, 0.9), row(0.5, 0.7, 0.5, 0.4)]
    shown = strength.table(rows).splitlines()
    assert shown[0] == "kang, batch key donor: 1,200 cells, 2 batches"
    assert [line.split() for line in shown[1:]] == [
        ["bio", "batch", "total", "kept"],
        ["pca", "0.500", "0.250", "0.400", "1.000"],
        ["strength", "0", "0.500", "-", "-", "0.900"],
        ["strength", "0.5", "0.700", "0.500", "0.620", "0.400"],
    ]
    strength.draw(rows, tmp_path / "deep" / "strength.png")
    assert (tmp_path / "deep" / "strength.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["strength.png"]


@pytest.mark.slow
def test_strengths_are_run_scored_drawn_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scib_metrics", reason="scoring needs the extra [benchmark]")
    data, out, picture = tmp_path / "made_up.h5ad", tmp_path / "strength.json", tmp_path / "strength.png"
    made_up(data)
    small = [
        "genes.n_hvg=60",
        "genes.min_batch_cells=20",
        "graph.k=10",
        "train.align_steps=10",
        "train.refine_steps=10",
    ]
    settings = [part for key in small for part in ("--set", key)]
    command = [str(data), "--cache", str(tmp_path / "cache"), "-o", str(out), "--picture", str(picture), *settings]
    assert strength.main([*command, "--strengths", "1,0"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(found["method"], found["strength"]) for found in rows] == [("pca", None), ("schelix", 0), ("schelix", 1)]
    for found in rows:
        metrics = found["metrics"]
        assert metrics["total"] == pytest.approx(0.6 * metrics["bio"] + 0.4 * metrics["batch"])
        assert {"commit", "machine", "versions", "date"} <= set(found)
    assert rows[0]["guards"]["kept_neighbors"] == 1
    assert rows[1]["guards"]["kept_neighbors"] > rows[2]["guards"]["kept_neighbors"]
    assert rows[2]["metrics"]["batch"] > rows[1]["metrics"]["batch"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "strength 0.5" not in capsys.readouterr().out

    assert strength.main([*command, "--label-key", "kind"]) == 1
    assert "has no obs column 'kind'" in capsys.readouterr().err
    assert len(json.loads(out.read_text())["rows"]) == 3
