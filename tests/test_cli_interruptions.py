"""The command line: runs that are killed or interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schelix_scale.interruptions import heed, listening
from schelix_scale.run import Run

from .commands import PYTHON, cells, integrate, schelix


@pytest.fixture(autouse=True)
def as_from_a_terminal() -> Iterator[None]:
    """Jobs that a shell starts in the background ignore Ctrl-C, and so do all their children: also these tests'."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "cells.h5ad"
    cells().write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return a finished run and what the command printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, schelix(*integrate(source, out, "--batch-key", "batch"))


def start_and_signal(source: Path, out: Path, after: str, with_: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Start an integration in another process and signal it once a stage is recorded."""
    command = [*PYTHON, *map(str, integrate(source, out))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (out / "stages" / f"{after}.json").exists() and process.poll() is None:
            assert time.monotonic() < deadline, "the stage was not finished in time"
            time.sleep(0.01)
        process.send_signal(with_)
        stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@pytest.mark.slow
@pytest.mark.parametrize("after", ["genes", "graph"])
def test_a_killed_run_continues_to_the_same_embedding(
    source: Path, finished: tuple[Path, Any], tmp_path: Path, after: str
) -> None:
    out = tmp_path / "run"
    killed = start_and_signal(source, out, after, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "manifest.json").exists()
    assert "is not finished" in schelix("verify", out).stderr
    continued = schelix(*integrate(source, out, "--batch-key", "batch"))
    assert continued.exit_code == 0, continued.output
    assert f"{after}: done before, skipped" in continued.stderr
    assert "embed: done before" not in continued.stderr
    np.testing.assert_array_equal(Run.open(out).embedding, Run.open(finished[0]).embedding)
    assert schelix("verify", out).exit_code == 0


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_continue(source: Path, tmp_path: Path) -> None:
    stopped = start_and_signal(source, tmp_path / "run", "genes", signal.SIGINT)
    assert stopped.returncode == 130, stopped.stderr
    assert "interrupted: Run the same command again to continue: finished stages are kept." in stopped.stderr
    assert "Traceback" not in stopped.stderr


def test_an_interruption_while_a_string_is_executed_is_130_too(tmp_path: Path) -> None:
    """Imports execute strings; CPython remembers the interruption and would end by the signal under -m."""
    (tmp_path / "interrupted.py").write_text(
        "import schelix_scale.pipeline\n"
        "def integrate(*args, **kwargs): exec('raise KeyboardInterrupt')\n"
        "schelix_scale.pipeline.integrate = integrate\n"
        "from schelix_scale.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-m", "interrupted", "integrate", "cells.h5ad", "-o", "run"]
    stopped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert stopped.returncode == 130, stopped.stderr
    assert "Run the same command again to continue" in stopped.stderr


SWALLOWING = """
import os, signal, threading, time
import schelix_scale.pipeline
from schelix_scale.cli import main

def swallow():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except BaseException:
        pass

def elsewhere(advance):
    thread = threading.Thread(target=advance)
    thread.start()
    thread.join()

def integrate(*args, reporter, **kwargs):
    {lines}
    print("went on")

schelix_scale.pipeline.integrate = integrate
main()
"""
SWALLOWED = {
    "before a stage": "swallow(); reporter.stage('graph').__enter__()",
    "within a stage": "stage = reporter.stage('graph').__enter__(); swallow(); stage.advance()",
    "while threads work": (
        "stage = reporter.stage('graph').__enter__(); swallow(); elsewhere(stage.advance); stage.advance()"
    ),
}


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("where", SWALLOWED)
def test_an_interruption_that_other_code_swallows_is_heeded_at_the_next_progress(
    tmp_path: Path, quiet: bool, where: str
) -> None:
    """Libraries have bare excepts, and Python drops what is raised in finalisers."""
    (tmp_path / "swallowing.py").write_text(SWALLOWING.format(lines=SWALLOWED[where]))
    command = [sys.executable, "-m", "swallowing", "integrate", "cells.h5ad", "-o", "run", *(["--quiet"] * quiet)]
    stopped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert stopped.returncode == 130, stopped.stderr
    assert not stopped.stdout
    assert "Run the same command again to continue" in stopped.stderr
    assert "Traceback" not in stopped.stderr


def test_a_handler_of_the_user_and_ignored_interruptions_are_left_alone() -> None:
    """As after nohup: what is ignored stays so."""
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with listening():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with listening():
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                heed()
            heed()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        heed()  # what a command has handled is not asked again
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
