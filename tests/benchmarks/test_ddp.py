"""`ddp.py`: what is measured in processes of their own, and how figures become ratios and a table."""

from __future__ import annotations

import json
from pathlib import Path

import ddp
import pytest
from _ddp_report import keep, speed_of, update_readme

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
    assert speed_of([[{"speed": {"align": 10.0, "refine": 30.0}}]]) == [pytest.approx(15.0)]


def row_of(batch: int, ratio: float) -> dict[str, object]:
    ranks = [{"speed": {"align": 1000.0, "refine": 3000.0}, "private_mb": 300.0}]
    contender = {"label": "one process", "task": "train", "ranks": 1, "threads": 1, "rounds": [ranks]}
    machine = {"cpu": "a CPU", "cores": 2, "ram_gb": 8.0, "python": "3.11", "platform": "Linux"}
    return {
        **{
            "run": "run",
            "cells": 200_000,
            "batch": batch,
            "cores": 2,
            "steps": 150,
            "scvi_cells": 0,
            "date": "2026-01-01",
        },
        **{"contenders": [contender], "ratios": {"ranks, to threads": ratio}, "machine": machine, "peer_versions": {}},
        **{"commit": "0123456789abcdef", "dirty": False, "versions": {"torch": "2"}},
    }


def test_rows_are_kept_by_batch_and_shown_in_the_readme(tmp_path: Path) -> None:
    results, readme = tmp_path / "results" / "ddp.json", tmp_path / "README.md"
    readme.write_text("before\n<!-- ddp:begin -->\nold\n<!-- ddp:end -->\nafter\n")
    for batch, ratio in ((4_096, 1.08), (1_024, 0.63), (1_024, 0.95), (512, 0.5)):
        rows = keep(results, row_of(batch, ratio))
    update_readme(readme, rows)
    text = readme.read_text()
    assert text.startswith("before\n<!-- ddp:begin -->\n#### 200,000 cells, steps of 512, 2 cores")
    assert text.endswith("\n<!-- ddp:end -->\nafter\n")
    assert "| one process | 1 | 1 | 1,500 | 1,000 | 3,000 | 300 |" in text
    for line in (
        "| 512 | >= 0.9 | 0.5 | **no** |",
        "| 1,024 | >= 0.9 | 0.95 | yes |",
        "| 4,096 | >= 0.9 | 1.08 | yes |",
    ):
        assert text.count(f"| ranks, to threads {line}\n") == 1
    assert "0.63" not in text


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
    (row,) = json.loads(result.read_text())["rows"]
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
