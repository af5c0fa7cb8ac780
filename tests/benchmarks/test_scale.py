"""`scale.py` measures what it says: memory of whole process trees, stages, judged embeddings; and reports failures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scale
from _atlas import Atlas, Settings
from _atlas_write import write_atlas
from _watch import CommandFailed, python, watch

from .data import made_up

MB = 1_000_000
SMALL = ("train.align_steps=5", "train.refine_steps=5", "sketch.max_cells=200", "genes.iterations=1")


def test_watch_sees_the_memory_of_grandchildren(tmp_path: Path) -> None:
    hold = "import time; block = bytearray(b'x') * 300_000_000; time.sleep(2)"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}], check=True)"
    seen = watch(python("-c", start), tmp_path / "log")
    assert 300 * MB < seen.peak < 450 * MB
    assert seen.seconds > 2
    assert seen.peak_between(seen.times[0], seen.times[-1]) == seen.peak
    assert seen.peak_between(0, seen.times[0] - 1) == 0


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells proportional memory")
def test_watch_counts_shared_pages_once_in_pss(tmp_path: Path) -> None:
    share = "import os, time; block = bytearray(b'x') * 300_000_000; [os.fork() for _ in range(2)]; time.sleep(2)"
    seen = watch(python("-c", share), tmp_path / "log")
    assert seen.peak > 4 * 300 * MB
    assert 300 * MB < seen.pss_peak < 450 * MB


def test_saved_rows_are_replaced_by_those_of_the_same_settings(tmp_path: Path) -> None:
    row = {"atlas": "a.zarr", "cells": 9, "max_memory": "4GB", "settings": []}
    trial = {**row, "settings": ["seed=1", "graph.k=9"], "seconds": 1}
    for one in (row, trial, {**trial, "settings": ["graph.k=9", "seed=1"], "seconds": 2}, {**row, "seconds": 3}):
        scale.save(tmp_path / "scale.json", one)
    saved = json.loads((tmp_path / "scale.json").read_text())
    assert [(one["settings"], one["seconds"]) for one in saved] == [(["graph.k=9", "seed=1"], 2), ([], 3)]


def test_watch_reports_a_failure_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"(?s)status 3.*no luck"):
        watch(python("-c", "print('no luck'); raise SystemExit(3)"), tmp_path / "log")


def test_judge_knows_good_from_bad() -> None:
    rng = np.random.default_rng(0)
    types, batches = rng.integers(0, 3, 600), rng.integers(0, 2, 600)
    obs = pd.DataFrame({"cell_type": types.astype(str), "batch": batches.astype(str)})
    good = 8 * np.eye(3)[types] + rng.normal(size=(600, 3))
    apart = np.column_stack([good, 20 * batches])
    noise = rng.normal(size=(600, 3))
    scores = {name: scale.judge(z_nd, obs) for name, z_nd in (("good", good), ("apart", apart), ("noise", noise))}
    assert scores["good"]["type_purity"] > 0.99
    assert scores["noise"]["type_purity"] < 0.45
    assert scores["good"]["batch_mixing"] > 0.9 > 0.01 > scores["apart"]["batch_mixing"]


@pytest.mark.slow
def test_measures_an_atlas_and_its_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up(tmp_path / "template.h5ad")
    atlas = tmp_path / "small.zarr"
    write_atlas(Atlas(tmp_path / "template.h5ad", Settings(1_200, 90, 3, molecules=300)), atlas, {})
    settings = [part for setting in SMALL for part in ("--set", setting)]
    out = tmp_path / "scale.json"
    assert scale.main([str(atlas), "--peer", "-o", str(out), "--scratch", str(tmp_path / "runs"), *settings]) == 0
    (row,) = json.loads(out.read_text())
    assert (row["cells"], row["genes"]) == (1_200, 90)
    assert [stage["stage"] for stage in row["stages"]][:5] == ["genes", "features", "graph", "train", "embed"]
    assert sum(stage["seconds"] for stage in row["stages"]) == pytest.approx(row["seconds"], abs=0.5)
    assert set(row["floors"]) == set(scale.FLOORS)
    assert row["peer"]["peak_bytes"] > 100 * MB
    assert all(one["peak_pss_bytes"] <= one["peak_bytes"] for one in (row, row["peer"], *row["floors"].values()))
    assert {"schelix", "harmony", "pca"} == {"schelix", *row["peer"]["quality"]}
    printed = capsys.readouterr().out
    assert "| **schelix integrate** |" in printed
    assert "| floor: pynndescent alone |" in printed


def test_missing_atlas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.main([str(tmp_path / "no.zarr")]) == 2
    assert "make_atlas.py" in capsys.readouterr().err
