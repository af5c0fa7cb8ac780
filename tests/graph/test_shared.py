"""Operators that runs share: two processes that start at once build one, and a damaged one is noticed."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


def run(
    adata: ad.AnnData, out: Path, cache: Path, interrupted: tuple[str, ...] = (), **settings: object
) -> tuple[np.ndarray, str, list[str]]:
    """Build a graph after searches that were interrupted; return diffused features, the id, and what was said."""
    reporter = QuietReporter()
    keys = {**SMALL, "graph.cache_dir": str(cache), **{k.replace("__", "."): v for k, v in settings.items()}}
    prepare(adata, batch_key="batch", out=out, reporter=reporter, **keys)
    for name in interrupted:
        (out / "graph" / f"{name}.building").mkdir(parents=True)
    continue_run(out, "graph", reporter=reporter)
    name = json.loads((out / "stages" / "graph.json").read_text())["details"]["operator_id"]
    return np.load(out / "diffused" / name / "anchor.npy"), name, reporter.messages


def test_another_run_of_the_same_features_links_to_it(adata: ad.AnnData, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    _, name, said = run(adata, tmp_path / "one", cache)
    assert not any("was found" in message for message in said)
    _, same, said = run(adata, tmp_path / "two", cache, (name, "another"), train__width=64)
    assert [path.name for path in (tmp_path / "two" / "graph").iterdir()] == [name]
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


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def access(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode):o}"


def test_an_entry_is_open_to_whom_the_directory_is(tmp_path: Path) -> None:
    """Whatever the umask; nobody else may change the files, but users of the directory may replace the entry."""
    for mode, lock, folder, file in (("2770", "660", "770", "640"), ("755", "644", "755", "644")):
        cache, run_files = tmp_path / mode, [tmp_path / f"run-{mode}" / part / "abc" for part in ("graph", "diffused")]
        cache.mkdir()
        cache.chmod(int(mode, 8))
        shared = SharedOperators(cache)
        with umask(0o077):
            for files in run_files:
                files.mkdir(parents=True)
                (files / "weights.npy").write_text("weights")
            with shared.claimed("abc", QuietReporter()):
                shared.keep("abc", run_files)
        assert access(cache / "abc.lock") == lock
        for path in (cache / "abc", cache / "abc" / "graph"):
            assert access(path)[-3:] == folder
        for path in (cache / "abc" / "graph" / "weights.npy", cache / "abc" / "checksums.json"):
            assert access(path) == file
        found = [tmp_path / f"other-{mode}" / files.parent.name / "abc" for files in run_files]
        assert shared.fetch("abc", found, QuietReporter())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")
def test_another_user_may_take_turns_too(tmp_path: Path) -> None:
    """A forked process of another user, in a directory that is open to all, with locks of older versions too."""
    top = Path(tempfile.mkdtemp())
    try:
        top.chmod(0o755)
        cache = top / "cache"
        cache.mkdir()
        cache.chmod(0o1777)
        shared = SharedOperators(cache)
        with umask(0o077), shared.claimed("abc", QuietReporter()):
            pass
        (cache / "old.lock").touch(0o644)
        (cache / "closed.lock").touch(0o600)
        child = os.fork()
        if child == 0:
            try:
                _as_nobody(shared)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        shutil.rmtree(top)


def _as_nobody(shared: SharedOperators) -> None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    for name in ("abc", "old", "new"):
        with shared.claimed(name, QuietReporter()):
            pass
    with pytest.raises(RunError, match=r"cache is not open to this user .*chmod -R g\+rwX"):
        shared.claimed("closed", QuietReporter()).__enter__()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"graph\.cache_dir: .*file/cache cannot be made"):
        SharedOperators(tmp_path / "file" / "cache")
