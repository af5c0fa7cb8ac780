"""The search in a process of its own finds what the same search finds here, and ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from schelix_scale import integrate
from schelix_scale.config import GraphConfig
from schelix_scale.errors import GraphError
from schelix_scale.graph.knn import Neighbors, find_neighbors
from schelix_scale.graph.search import FROM_CELLS, SearchProcess, worth_a_process
from schelix_scale.progress import QuietReporter
from tests.synthetic import gaussian_cells, make_cells


@pytest.fixture
def features(tmp_path: Path) -> np.memmap:
    z_nd, _, _ = gaussian_cells(n=1_500)
    np.save(tmp_path / "features.npy", z_nd.astype(np.float32))
    loaded = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert isinstance(loaded, np.memmap)
    return loaded


@pytest.mark.slow
def test_same_neighbors_as_in_this_process(features: np.memmap, tmp_path: Path) -> None:
    with SearchProcess(10, 2, 2) as search:  # compiled for features of other dimensions: they do not matter
        found = search.find(features, 3, tmp_path)
    here = find_neighbors(np.asarray(features), 10, "pynndescent", 3, 2)
    np.testing.assert_array_equal(found.indices_nk, here.indices_nk)
    np.testing.assert_array_equal(found.distances_nk, here.distances_nk)
    assert found.method == here.method
    assert [path.name for path in tmp_path.iterdir()] == ["features.npy"]


def test_a_search_that_fails_says_why(features: np.memmap, tmp_path: Path) -> None:
    Path(str(features.filename)).write_bytes(b"no array")
    with SearchProcess(10, 5, 1) as search, pytest.raises(GraphError, match=r"ended with status 1\. It said: .*Error"):
        search.find(features, 0, tmp_path)


def test_a_search_that_is_killed_says_so(features: np.memmap, tmp_path: Path) -> None:
    with SearchProcess(10, 5, 1) as search:
        search._process.kill()
        search._process.wait()
        with pytest.raises(GraphError, match="killed by signal 9, often because memory ran out"):
            search.find(features, 0, tmp_path)


def test_it_ends_when_its_parent_is_killed() -> None:
    code = (
        "import time; from schelix_scale.graph.search import SearchProcess\n"
        "search = SearchProcess(10, 5, 1); print(search._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


def test_only_large_approximate_searches_get_a_process() -> None:
    assert worth_a_process(FROM_CELLS, GraphConfig())
    assert not worth_a_process(FROM_CELLS, GraphConfig(exact_below=FROM_CELLS + 1))
    assert not worth_a_process(FROM_CELLS - 1, GraphConfig(method="pynndescent"))
    assert not worth_a_process(FROM_CELLS, GraphConfig(method="exact"))


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Neighbors] = []

    class Noted(SearchProcess):
        def find(self, features_nd: np.memmap, seed: int, scratch: Path) -> Neighbors:
            found.append(super().find(features_nd, seed, scratch))
            return found[-1]

    monkeypatch.setattr("schelix_scale.graph.search.SearchProcess", Noted)
    cells = make_cells()
    adata = ad.AnnData(sparse.csr_matrix(cells.counts_ng.astype(np.float32)))
    adata.obs["batch"] = cells.batch_n.astype(str)
    settings = {"graph.method": "pynndescent", "train.align_steps": 5, "train.refine_steps": 5}
    runs = []
    for name, least in (("here", 10**9), ("ahead", 1)):
        monkeypatch.setattr("schelix_scale.graph.search.FROM_CELLS", least)
        run = integrate(adata, batch_key="batch", out=tmp_path / name, reporter=QuietReporter(), **settings)
        runs.append(np.asarray(run.embedding[:]))
        assert len(found) == (name == "ahead")
    np.testing.assert_array_equal(*runs)
