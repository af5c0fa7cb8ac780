"""Several processes train and embed a run from the command line, as one does; a killed one is started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from schelix_scale.continuing import continue_run
from schelix_scale.errors import TrainingError
from schelix_scale.pipeline import integrate, prepare
from schelix_scale.progress import QuietReporter
from schelix_scale.run import Run

from .small_runs import SMALL, make_adata

SETTINGS = {**SMALL, "train.align_steps": 60, "train.refine_steps": 60, "train.patience": 100}
SCHELIX = [sys.executable, "-m", "schelix_scale"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose graph is built."""
    folder = tmp_path_factory.mktemp("ready")
    make_adata().write_h5ad(folder / "cells.h5ad")
    out = prepare(folder / "cells.h5ad", batch_key="batch", out=folder / "run", reporter=QuietReporter(), **SETTINGS)
    continue_run(out, "graph", reporter=QuietReporter())
    return out


@pytest.fixture(scope="module")
def alone(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = Path(shutil.copytree(ready, tmp_path_factory.mktemp("alone") / "run"))
    run = continue_run(out, "train", then=["embed"], reporter=QuietReporter())
    assert run is not None
    return run


def test_two_processes_of_which_one_is_killed(ready: Path, alone: Run, tmp_path: Path) -> None:
    """The other ends by itself, both are started again, and nothing but rounding differs at the end."""
    out = Path(shutil.copytree(ready, tmp_path / "run"))
    command = [*SCHELIX, "train", str(out), "--embed", "--nproc", "2", "--set", "train.checkpoint_every=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 90
        while not list(out.glob("checkpoints/step-*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        victim = next(p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1")
        victim.send_signal(signal.SIGKILL)
        shown, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "warning: rank 1 was ended by SIGKILL; all ranks are started again" in said
    assert "training goes on from phase " in said
    assert shown.count("embedding  ") == 1
    run = Run.open(out)
    assert run.verify() == []
    assert run.manifest["stages"]["train"]["details"]["ranks"] == 2
    np.testing.assert_allclose(run.embedding, alone.embedding, atol=1e-4)


def test_ctrl_c_ends_all_ranks_and_is_no_traceback(ready: Path, tmp_path: Path) -> None:
    """As a terminal sends it: to the command and to its ranks."""
    out = Path(shutil.copytree(ready, tmp_path / "run"))
    endless = [
        "train.align_steps=100000",
        "train.max_epochs=100000",
        "train.patience=100000",
        "train.checkpoint_every=1",
    ]
    command = [*SCHELIX, "train", str(out), "--nproc", "2", *(part for text in endless for part in ("--set", text))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 90
        while not list(out.glob("checkpoints/step-*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ranks = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted: Run the same command again to continue" in said
    assert "Traceback" not in said
    assert not psutil.wait_procs(ranks, timeout=10)[1]


def test_two_processes_embed_what_one_has_trained(alone: Run, tmp_path: Path) -> None:
    out = Path(shutil.copytree(alone.path, tmp_path / "run"))
    shutil.rmtree(out / "embedding.zarr")
    run = continue_run(out, "embed", nproc=2, reporter=QuietReporter())
    assert run is not None
    assert run.verify() == []
    np.testing.assert_array_equal(run.embedding, alone.embedding)


def test_one_call_in_python_does_all_with_two_processes(ready: Path, alone: Run, tmp_path: Path) -> None:
    source, reporter = ready.parent / "cells.h5ad", QuietReporter()
    run = integrate(source, batch_key="batch", out=tmp_path / "run", nproc=2, reporter=reporter, **SETTINGS)
    np.testing.assert_allclose(run.embedding, alone.embedding, atol=1e-4)
    assert run.config == alone.config


def test_torchrun_itself_and_an_error_that_is_said_once(
    ready: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(ready, tmp_path / "run"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "schelix_scale", "train", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--set", "train.align_steps=3"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.count(f"Next: schelix embed {out}") == 1
    assert done.stderr.count("refine: step 60 on 2 ranks") == 1
    shutil.rmtree(out / "graph")
    with pytest.raises(TrainingError, match="a rank of 2 has failed; what it said stands above"):
        continue_run(out, "train", nproc=2, reporter=QuietReporter())
    assert capfd.readouterr().err.count(f"Run `schelix graph {out}` first") == 1


LEARNED = {"train.input": "stream", "train.loadings": "learned", "train.alignment": "symmetric"}
OTHER_MACHINE = """
import os
from schelix_scale.cli import main
configured = os.sysconf
if os.environ["RANK"] == "1":
    os.sysconf = lambda name: 100 if name == "SC_PHYS_PAGES" else configured(name)
main()
"""


@pytest.fixture(scope="module")
def streamed(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What one process makes of cells that it streams from the source, with learned loadings."""
    out = Path(shutil.copytree(ready, tmp_path_factory.mktemp("streamed") / "run"))
    run = continue_run(out, "train", then=["embed"], reporter=QuietReporter(), **LEARNED)
    assert run is not None
    return run


def test_ranks_read_their_own_cells_of_expression(ready: Path, streamed: Run, tmp_path: Path) -> None:
    out = Path(shutil.copytree(ready, tmp_path / "run"))
    run = continue_run(out, "train", then=["embed"], nproc=2, reporter=QuietReporter(), **LEARNED)
    assert run is not None
    np.testing.assert_allclose(run.embedding, streamed.embedding, atol=1e-4)


def test_a_rank_on_a_machine_of_less_memory_mixes_rows_as_the_main_one(
    ready: Path, streamed: Run, tmp_path: Path
) -> None:
    """How rows are mixed depends on the memory; ranks that mix them otherwise would skip cells."""
    out, program = Path(shutil.copytree(ready, tmp_path / "run")), tmp_path / "program.py"
    program.write_text(OTHER_MACHINE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = [part for key, value in LEARNED.items() for part in ("--set", f"{key}={value}")]
    subprocess.run(
        [*torchrun, str(program), "train", str(out), "--embed", "--quiet", *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    np.testing.assert_allclose(Run.open(out).embedding, streamed.embedding, atol=1e-4)
