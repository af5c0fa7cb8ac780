"""The search in a process of its own finds what the same search finds here, and ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from schelix_scale.errors import GraphError
from schelix_scale.graph.knn import find_neighbors
from schelix_scale.graph.search import SearchProcess
from tests.synthetic import gaussian_cells


@pytest.fixture
def features(tmp_path: Path) -> np.memmap:
    z_nd, _, _ = gaussian_cells(n=1_500)
    np.save(tmp_path / "features.npy", z_nd.astype(np.float32))
    loaded = np.load(tmp_path / "features.npy", mmap_mode="r")
    assert isinstance(loaded, np.memmap)
    return loaded


@pytest.fixture
def talkative(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python process that is started says something, more than a pipe holds."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text("print('a warning of a library\\n' * 10_000, flush=True)\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.slow
@pytest.mark.usefixtures("talkative")
def test_same_neighbors_as_in_this_process(features: np.memmap, tmp_path: Path) -> None:
    with SearchProcess(10, 2, 2) as search:  # compiled for features of other dimensions: they do not matter
        found = search.find(Path(str(features.filename)), 3, tmp_path)
        rows = np.arange(0, 1_500, 2)
        of_half = search.find(Path(str(features.filename)), 3, tmp_path, rows)
        fewer = search.find(Path(str(features.filename)), 3, tmp_path, k=6)
    for one, chosen, k in ((found, features, 10), (of_half, features[rows], 10), (fewer, features, 6)):
        here = find_neighbors(np.asarray(chosen), k, "pynndescent", 3, 2)
        np.testing.assert_array_equal(one.indices_nk, here.indices_nk)
        np.testing.assert_array_equal(one.distances_nk, here.distances_nk)
        assert one.method == here.method
    assert [path.name for path in tmp_path.iterdir()] == ["features.npy"]


def test_a_search_that_fails_says_why(features: np.memmap, tmp_path: Path) -> None:
    Path(str(features.filename)).write_bytes(b"no array")
    with SearchProcess(10, 5, 1) as search, pytest.raises(GraphError, match=r"ended with status 1\. It said: .*Error"):
        search.find(Path(str(features.filename)), 0, tmp_path)


@pytest.mark.usefixtures("talkative")
def test_a_search_that_fails_among_other_output(features: np.memmap, tmp_path: Path) -> None:
    Path(str(features.filename)).write_bytes(b"no array")
    with SearchProcess(10, 5, 1) as search, pytest.raises(GraphError, match=r"ended with status 1\. It said: .*Error"):
        search.find(Path(str(features.filename)), 0, tmp_path)


def test_a_search_that_is_killed_at_work_says_so(features: np.memmap, tmp_path: Path) -> None:
    with SearchProcess(10, 5, 1) as search:
        killer = threading.Timer(0.5, search._process.kill)
        killer.start()
        with pytest.raises(GraphError, match="killed by signal 9"):
            search.find(Path(str(features.filename)), 0, tmp_path)
    assert not list(tmp_path.glob("search-*"))


def test_a_search_that_is_killed_says_so(features: np.memmap, tmp_path: Path) -> None:
    with SearchProcess(10, 5, 1) as search:
        search._process.kill()
        search._process.wait()
        with pytest.raises(GraphError, match="killed by signal 9, often because memory ran out"):
            search.find(Path(str(features.filename)), 0, tmp_path)


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
