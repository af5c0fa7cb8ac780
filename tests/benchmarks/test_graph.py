"""`graph.py`: made-up features look like real ones, recall is that of exact neighbours, rows are kept and compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import _graph_features
import _graph_report
import graph
import numpy as np
import pytest
from _graph_diffusion import largest_difference
from _graph_run import own_memory
from _graph_scores import Recall, agreement, exact_limits, others, recall_of
from sklearn.neighbors import NearestNeighbors


def test_features_are_near_real_cells_and_the_first_ones_never_change(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    centres = 30 * np.eye(3, 6)
    real = (centres[np.repeat([0, 1, 2], [600, 300, 100])] + rng.normal(size=(1_000, 6))).astype(np.float32)
    np.save(tmp_path / "like.npy", real)
    few, many = (_graph_features.write_features(tmp_path / "like.npy", n, 7, tmp_path) for n in (2_000, 70_000))
    rows = np.load(many)
    assert rows.shape == (70_000, 6)
    np.testing.assert_array_equal(np.load(few), rows[:2_000])
    assert np.unique(rows, axis=0).shape == rows.shape
    distances = np.linalg.norm(rows[:, None] - centres, axis=2)
    shares = np.bincount(distances.argmin(axis=1)) / len(rows)
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=0.01)
    assert distances.min(axis=1).max() < 12  # nothing between the groups, which are 42 apart
    other = _graph_features.write_features(tmp_path / "like.npy", 2_000, 8, tmp_path)
    assert other != few
    assert not np.array_equal(np.load(other), np.load(few))


def test_recall_is_that_of_exact_neighbours() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(400, 5)).astype(np.float32)
    features[7] = features[3]
    rows, k = np.array([3, 7, 50, 399]), 6
    search = NearestNeighbors(n_neighbors=k + 1, metric="cosine").fit(features.astype(np.float64))
    distances, found = search.kneighbors(features[rows].astype(np.float64))
    limits = exact_limits(features, rows, k)
    np.testing.assert_allclose(limits, 1 - distances[:, -1], atol=1e-12)

    assert recall_of(features, rows, limits, found, k).recall == 1  # with the row itself, or its copy instead of it
    wrong = others(found, rows, k)
    wrong[2, :3] = wrong[2, 3]  # the same neighbour four times
    wrong[3, 0] = -1
    score = recall_of(features, rows, limits, wrong, k)
    hits = np.array([1, 1, 3 / 6, 5 / 6])
    half = 1.96 * hits.std(ddof=1) / 2
    assert score.recall == pytest.approx(hits.mean())
    assert score.low == pytest.approx(hits.mean() - half)
    assert recall_of(features, rows, limits, np.repeat(rows[:, None], k + 1, axis=1), k).recall == 0


def test_audit_agrees_when_sampling_explains_the_difference() -> None:
    audit = {"recall": 0.97, "low": 0.966, "high": 0.974, "cells": 300}
    allowed = 1.96 * np.sqrt(0.04**2 / 600 + 0.04**2 / 300)
    values = (0.97 + 0.99 * allowed, 0.97 - 1.01 * allowed)
    near, far = (agreement(Recall(value, 0, 1, 600, 0.04), audit) for value in values)
    assert near["allowed"] == pytest.approx(allowed)
    assert (near["agree"], near["inside"]) == (True, False)
    assert far["agree"] is False


def _row(**changes: Any) -> dict[str, Any]:
    recall = {"recall": 0.98, "low": 0.97, "high": 0.99}
    row = {
        **{"what": "neighbors", "cells": 1_000, "dims": 30, "k": 30, "data": "real", "method": "schelix"},
        **{"search": "ivf", "budget": "1GB", "settings": {}, "run": "a", "threads": 2, "others": 0.0, "recall": recall},
        **{
            "seconds": 30.0,
            "peak_bytes": 1_400_000_000,
            "peak_pss_bytes": None,
            "own_bytes": 900_000_000,
            "audit": recall,
        },
        **{"agreement": {"agree": True, "difference": 0.0, "allowed": 0.01}, "answer": {"budget_bytes": 10**9}},
        **{"date": "2026-01-01T00:00:00", "commit": None, "dirty": False, "searchers": {}},
        "machine": {"cpu": "x", "cores": 2, "ram_gb": 8.0, "python": "3.11"},
    }
    return row | changes


def test_rows_are_kept_compared_and_held_against_what_is_asked(tmp_path: Path) -> None:
    peer = _row(method="pynndescent", search=None, budget=None, seconds=12.0)
    del peer["audit"]
    diffusion = {"what": "diffusion", "budget": None, "settings": {"columns": 60, "hops": [0, 1, 3]}}
    new = [_row(seconds=99.0), _row(), _row(cells=5_000, seconds=240.0), peer]
    new += [_row(**diffusion, parts={"diffusion": 1.2}), _row(**diffusion, method="scipy", parts={"diffusion": 1.0})]
    for row in new:
        rows = _graph_report.save(tmp_path / "graph.json", row)
    assert [row["seconds"] for row in rows[:3]] == [30.0, 240.0, 12.0]
    assert json.loads((tmp_path / "graph.json").read_text())["rows"] == rows

    failed = {what: found for what, _, found, holds in _graph_report.checks(rows) if not holds}
    assert failed == {
        "**schelix** (ivf), budget 1GB, 1,000 cells: time": 2.5,
        "**schelix** (ivf), budget 1GB: time from 1,000 to 5,000 cells": 8.0,
    }
    assert len(_graph_report.checks(rows)) == 9

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{_graph_report.BEGIN}\nstale\n{_graph_report.END}\nafter\n")
    _graph_report.update_readme(readme, rows)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text
    assert "| **schelix** (ivf), budget 1GB |  | 30.0 | 2.50 x | 0.9800 (0.9700-0.9900) |" in text
    assert "| schelix | 1.20 | 1.20 x |" in text
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="put them back"):
        _graph_report.update_readme(readme, rows)


def test_diffused_features_are_compared_by_stream_and_hop(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    streams, hops = rng.normal(size=(2, 50, 3, 4)), [tmp_path / f"hop{number}.npy" for number in range(3)]
    files = [tmp_path / f"stream{number}.npy" for number in range(2)]
    for file, stream in zip(files, streams, strict=True):
        np.save(file, stream)
    for number, hop in enumerate(hops):
        np.save(hop, np.hstack([stream[:, number] for stream in streams]) + (0.5 if number == 2 else 0))
    largest = max(np.abs(np.load(hop)).max() for hop in hops)
    assert largest_difference(list(map(str, files)), list(map(str, hops))) == pytest.approx(0.5 / largest)


def test_searches_and_diffuses_in_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = np.random.default_rng(3).normal(size=(200, 6)).astype(np.float32)
    np.save(tmp_path / "like.npy", real)
    out = tmp_path / "graph.json"
    command = ["--like", str(tmp_path / "like.npy"), "--scratch", str(tmp_path / "scratch"), "-o", str(out)]
    command += ["--cells", "500", "--k", "5", "--rows", "100", "--methods", "schelix-small,diffusion"]
    assert graph.main(command) == 0
    search, ours, theirs = json.loads(out.read_text())["rows"]
    assert (search["search"], search["budget"], search["answer"]["budget_bytes"]) == ("exact", "1GB", 10**9)
    assert search["recall"]["recall"] == search["audit"]["recall"] == 1
    assert search["agreement"]["agree"] is True
    assert search["own_bytes"] < search["peak_bytes"]
    assert (ours["method"], theirs["method"]) == ("schelix", "scipy in memory")
    assert ours["difference"] < 1e-5
    assert "| **schelix** (exact), budget 1GB |" in capsys.readouterr().out


def test_memory_of_a_task_is_not_that_of_processes_before_it() -> None:
    held = "import sys; held = b'x' * {}; print('there', flush=True); sys.stdin.readline()"
    others = subprocess.Popen(
        [sys.executable, "-c", held.format(150_000_000)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with others:
        assert others.stdout is not None
        assert others.stdout.readline() == "there\n"
        with own_memory() as own:
            subprocess.run([sys.executable, "-c", "import time; held = b'x' * 60_000_000; time.sleep(0.5)"], check=True)
        others.communicate("go\n")
    assert 60e6 < max(own) < 120e6


def test_settings_of_peers_follow_the_cells_and_the_command_line() -> None:
    assert graph.settings_of("faiss-ivf", 1_000_000) == {"nlist": 4096, "nprobe": 32}
    assert graph.settings_of("hnswlib", 9, ["faiss-hnsw.ef=7", "hnswlib.ef=60"])["ef"] == 60
    assert graph.settings_of("pynndescent", 9) == {}


def test_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    like = tmp_path / "like.npy"
    base = ["--like", str(like), "--scratch", str(tmp_path / "scratch")]
    assert graph.main(base) == 2
    assert "name features/anchor_corrected.npy" in capsys.readouterr().err
    np.save(like, np.zeros((100, 3), np.float32))
    assert graph.main([*base, "--as-is", "--cells", "50"]) == 2
    assert "has 100 cells" in capsys.readouterr().err
    assert graph.main([*base, "--methods", "annoy"]) == 2
    assert "annoy is none of" in capsys.readouterr().err
    assert graph.main([*base, "--set", "hnswlib.nprobe=3"]) == 2
    assert "faiss-ivf.nprobe" in capsys.readouterr().err
