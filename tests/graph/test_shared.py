"""Operators that runs share: two processes that start at once build one, and a damaged one is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from schelix_scale import continue_run, prepare
from schelix_scale.errors import RunError
from schelix_scale.graph.shared import SharedOperators
from schelix_scale.progress import QuietReporter
from tests.synthetic import make_cells

SMALL = {"graph.k": 8}


@pytest.fixture(scope="module")
def adata() -> ad.AnnData:
    cells = make_cells()
    adata = ad.AnnData(sparse.csr_matrix(cells.counts_ng.astype(np.float32)))
    adata.obs["batch"] = cells.batch_n.astype(str)
    return adata


def run(adata: ad.AnnData, out: Path, cache: Path, **settings: object) -> tuple[np.ndarray, str, list[str]]:
    """Build a graph; return diffused features, the operator's id, and what was said."""
    reporter = QuietReporter()
    keys = {**SMALL, "graph.cache_dir": str(cache), **{k.replace("__", "."): v for k, v in settings.items()}}
    prepare(adata, batch_key="batch", out=out, reporter=reporter, **keys)
    continue_run(out, "graph", reporter=reporter)
    name = json.loads((out / "stages" / "graph.json").read_text())["details"]["operator_id"]
    return np.load(out / "diffused" / name / "anchor.npy"), name, reporter.messages


def test_another_run_of_the_same_features_links_to_it(adata: ad.AnnData, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    _, name, said = run(adata, tmp_path / "one", cache)
    assert not any("was found" in message for message in said)
    _, same, said = run(adata, tmp_path / "two", cache, train__width=64)
    assert same == name
    assert any("was found" in message for message in said)
    files = [tmp_path / out / "graph" / name / "indices.npy" for out in ("one", "two")]
    assert files[0].stat().st_ino == files[1].stat().st_ino
    _, other, _ = run(adata, tmp_path / "three", cache, graph__k=9)
    assert other != name


def test_a_damaged_one_is_built_again(adata: ad.AnnData, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, name, _ = run(adata, tmp_path / "one", cache)
    weights = cache / name / "graph" / "weights.npy"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 0xFF
    weights.unlink()  # the run's own file keeps its content
    weights.write_bytes(content)
    again, _, said = run(adata, tmp_path / "two", cache)
    assert any("is damaged (graph: other content" in message and "built again" in message for message in said)
    np.testing.assert_array_equal(again, first)
    (cache / name / "checksums.json").write_text("{")
    _, _, said = run(adata, tmp_path / "three", cache)
    assert any("is damaged" in message for message in said)


CLAIM = """
import sys, time
from pathlib import Path
from schelix_scale.graph.shared import SharedOperators
from schelix_scale.progress import QuietReporter
folder, log = Path(sys.argv[1]), Path(sys.argv[2])
reporter = QuietReporter()
with SharedOperators(folder).claimed("abc", reporter):
    with log.open("a") as file:
        print("in", file=file, flush=True)
        time.sleep(0.3)
        print("out", file=file, flush=True)
print(*reporter.messages)
"""


def test_processes_that_start_at_once_take_turns(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CLAIM, str(tmp_path / "cache"), str(tmp_path / "log")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 3
    assert sum("another process builds operator abc" in text for text in said) >= 1


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"graph\.cache_dir: .*file/cache cannot be made"):
        SharedOperators(tmp_path / "file" / "cache")
