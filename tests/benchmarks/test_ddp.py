"""`ddp.py`: what is measured in processes of their own, and how figures become ratios and a table."""

from __future__ import annotations

import json
from pathlib import Path

import ddp
import pytest

from schelix_scale.continuing import continue_run
from schelix_scale.pipeline import prepare
from schelix_scale.progress import QuietReporter

from .data import made_up


def test_ratios_are_those_of_a_round() -> None:
    def ranks(speed: float, private: float = 100.0) -> list[dict[str, object]]:
        return [{"speed": {"align": speed, "refine": speed}, "private_mb": private}]

    found = {
        "one process, one thread": [ranks(9), ranks(90)],
        "one process, one thread, in RAM": [ranks(10), ranks(100)],
        "one process, all threads": [ranks(20), ranks(100)],
        "one process, all threads, in RAM": [ranks(20), ranks(100)],
        "a rank on each core": [ranks(18, 340.0), ranks(90, 360.0)],
        "a rank on each core, idle": [ranks(0, 300.0), ranks(0, 300.0)],
        "scVI": [ranks(2), ranks(5)],
    }
    assert ddp.ratios(found, 2) == {
        "one thread, to the floor": 0.9,
        "all threads, to the floor": 1.0,
        "ranks, to threads": 0.9,
        "MB of another rank beyond torch's own": 50.0,
        "to scVI": 15.0,
    }
    assert ddp.speed_of([[{"speed": {"align": 10.0, "refine": 30.0}}]]) == [pytest.approx(15.0)]


def test_a_run_without_a_graph_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ddp.main([str(tmp_path), "-o", str(tmp_path / "ddp.json")]) == 2
    assert "schelix graph RUN" in capsys.readouterr().err


@pytest.mark.slow
def test_all_of_it(tmp_path: Path) -> None:
    made_up(tmp_path / "cells.h5ad", 400, 80)
    settings = {"genes.n_hvg": 60, "genes.min_batch_cells": 20, "graph.k": 10, "threads": 1}
    out = prepare(
        tmp_path / "cells.h5ad", batch_key="batch", out=tmp_path / "run", reporter=QuietReporter(), **settings
    )
    continue_run(out, "graph", reporter=QuietReporter())
    result = tmp_path / "ddp.json"
    small = ["--batch", "48", "--steps", "4", "--rounds", "1", "--scvi-cells", "0", "-o", str(result)]
    assert ddp.main([str(out), *small]) == 0
    row = json.loads(result.read_text())
    assert row["cells"] == 400
    assert [(one["task"], one["ranks"], one["threads"]) for one in row["contenders"]] == [
        ("train", 1, 1), ("floor", 1, 1), ("train", 1, 2), ("floor", 1, 2), ("train", 2, 1), ("idle", 2, 1)
    ]  # fmt: skip
    for one in row["contenders"]:
        (ranks,) = one["rounds"]
        assert [rank["rank"] for rank in ranks] == list(range(one["ranks"]))
        assert all(rank["private_mb"] > 50 for rank in ranks)
        speeds = [speed for rank in ranks for speed in rank.get("speed", {}).values()]
        assert all(speed > 0 for speed in speeds)
        assert bool(speeds) == (one["task"] != "idle")
    assert {"commit", "machine", "ratios"} <= set(row)
