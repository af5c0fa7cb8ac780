"""A refresh under two real ranks: one of them builds the new operator, and both go on with it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow  # two processes load torch
def test_one_rank_builds_and_all_read_the_same(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.graph.refresh_program", str(tmp_path)],
            env={**os.environ, **rendezvous, "OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank}
            | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    one, two = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in "01")
    assert [(made.pop("searches"), made.pop("versions")) for made in (one, two)] == [(1, 1), (0, 0)]
    assert one == two, "id, checksum, file, content as it is read, and the weights that were trained on it"
    assert one["operator"] != "first"
    assert one["file"] == str(tmp_path / "graph" / one["operator"] / "indices.npy")
    assert sorted(path.name for path in (tmp_path / "graph").iterdir()) == sorted(["first", one["operator"]])
    weights = np.load(tmp_path / "graph" / one["operator"] / "weights.npy")
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    audit = json.loads((tmp_path / "graph" / one["operator"] / "audit.json").read_text())
    assert audit["recall"] >= 0.95
    assert audit["method"] == "ivf, before it was blended with first"
