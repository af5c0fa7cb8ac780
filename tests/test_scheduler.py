"""Tasks on a real cluster of two processes: the same bytes as on threads, the same errors, and clear refusals."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from typer.testing import CliRunner

from schelix_scale import scheduling
from schelix_scale.cli import app
from schelix_scale.config import GraphConfig
from schelix_scale.config_io import load_config
from schelix_scale.errors import ConfigError, DataError, RunError
from schelix_scale.features import onepass
from schelix_scale.graph import build, found, lists
from schelix_scale.pipeline import integrate
from schelix_scale.progress import QuietReporter
from schelix_scale.scheduling import run_tasks

from .synthetic import gaussian_cells, make_cells

SETTINGS = {"max_memory": "12MB", "threads": 2, "graph.k": 10, "train.enabled": False, "genes.iterations": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", memory_limit=0
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "cells.zarr"
    write(path, make_cells(per_group=60).counts_ng)
    return path


def write(path: Path, counts_ng: np.ndarray) -> None:
    batch_n = make_cells(per_group=60).batch_n
    obs = pd.DataFrame({"batch": pd.Categorical([f"b{code}" for code in batch_n])})
    obs.index = [f"c{i}" for i in range(len(obs))]
    with ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
        ad.AnnData(sparse.csr_matrix(counts_ng.astype(np.float32)), obs=obs).write_zarr(path)


def run(source: Path, out: Path, **settings: Any) -> Path:
    integrate(source, batch_key="batch", out=out, reporter=QuietReporter(), **SETTINGS, **settings)
    return out


@pytest.mark.slow  # among the longest of the suite
def test_threads_and_a_cluster_write_the_same_bytes(cluster: Any, source: Path, tmp_path: Path) -> None:
    here = run(source, tmp_path / "threads")
    there = run(source, tmp_path / "cluster", scheduler=cluster.scheduler_address)
    files = sorted(path.name for path in (here / "features").iterdir())
    assert files == ["anchor.npy", "anchor_corrected.npy", "variant.npy"], "what the tasks shared is gone"
    assert sorted(path.name for path in (there / "features").iterdir()) == files
    for name in files:
        assert (here / "features" / name).read_bytes() == (there / "features" / name).read_bytes()
    assert "shared_block" in cluster.scheduler.task_prefixes, "the cluster did it"


def test_neighbours_are_searched_on_a_cluster(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the lists and, with few of them at the start, the rounds; several tasks of each."""
    monkeypatch.setattr(build, "PROBES", 2)
    monkeypatch.setattr(found, "SPANS_A_TASK", 1)
    monkeypatch.setattr(lists, "MIN_CANDIDATES", 30)
    z_nd = np.asarray(gaussian_cells(n=9_000, d=12, n_types=6)[0], np.float32)
    config = GraphConfig(method="ivf", k=15)
    here, _ = build.build_neighbors(z_nd, tmp_path / "threads", config, 0, 2, 10**12)
    address = cluster.scheduler_address
    there, _ = build.build_neighbors(z_nd, tmp_path / "cluster", config, 0, 2, 10**12, scheduler=address)
    # another process may round products of matrices otherwise, and so order equally far cells otherwise
    np.testing.assert_allclose(there.distances_nk, here.distances_nk, atol=1e-6)
    assert (np.asarray(there.indices_nk) == np.asarray(here.indices_nk)).mean() > 0.999
    done = {name.partition("(")[0] for name in cluster.scheduler.task_prefixes}
    assert {"Probe", "Expand"} <= done, "the cluster did it"


@pytest.mark.slow  # among the longest of the suite
def test_a_run_goes_on_with_another_scheduler(cluster: Any, source: Path, tmp_path: Path) -> None:
    out = run(source, tmp_path / "run")
    (out / "features" / "anchor.npy").unlink()
    reporter = QuietReporter()
    integrate(source, batch_key="batch", out=out, reporter=reporter, **SETTINGS, scheduler=cluster.scheduler_address)
    assert "genes: done before, skipped" in reporter.messages
    assert "graph: done before, skipped" in reporter.messages, "the same features, so the same graph"


def test_bad_values_arrive_as_the_same_error(cluster: Any, tmp_path: Path) -> None:
    counts = make_cells(per_group=60).counts_ng
    write(tmp_path / "cells.zarr", counts)
    address = cluster.scheduler_address
    with pytest.raises(DataError, match="negative") as here:
        _spoiled(tmp_path / "cells.zarr", tmp_path / "a", None)
    with pytest.raises(DataError, match="negative") as there:
        _spoiled(tmp_path / "cells.zarr", tmp_path / "b", address)
    assert str(here.value) == str(there.value)
    assert not list(tmp_path.rglob("*.partial*"))


def _spoiled(source: Path, out: Path, scheduler: str | None) -> None:
    """Spoil the source between the sketch and the pass."""
    import zarr

    class Spoiler(QuietReporter):
        def stage(self, name: str, total: int | None = None, unit: str = "cells") -> Any:
            if name == "features":
                data = zarr.open_array(source / "X" / "data", mode="r+")
                data[-1] = -1
            return super().stage(name, total, unit)

    integrate(source, batch_key="batch", out=out, reporter=Spoiler(), **SETTINGS, scheduler=scheduler)


def test_a_lost_worker_is_made_up_for(cluster: Any, tmp_path: Path) -> None:
    done: list[int] = []
    run_tasks(partial(_die_once, str(tmp_path / "died")), range(50), 1, cluster.scheduler_address, done.append)
    assert (tmp_path / "died").exists()
    assert sum(done) == 50


def _die_once(marker: str, part: int) -> int:
    if part == 3 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1


def test_workers_that_die_over_a_task_are_an_error(cluster: Any) -> None:
    before, cluster.scheduler.allowed_failures = cluster.scheduler.allowed_failures, 0
    try:
        with pytest.raises(RunError, match=r"workers died over the same task.*Lower max_memory"):
            run_tasks(_die, [0], 1, cluster.scheduler_address)
    finally:
        cluster.scheduler.allowed_failures = before


def _die(part: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return part


def test_a_folder_that_workers_do_not_see(cluster: Any, tmp_path: Path) -> None:
    task = partial(onepass._shared_block, str(tmp_path / "elsewhere" / "pass.partial.pickle"))
    with pytest.raises(RunError, match=r"does not see .*elsewhere\. A cluster needs the run directory"):
        run_tasks(task, [(0, 1)], 1, cluster.scheduler_address)


def test_workers_of_another_version(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.wait_for_workers(2, timeout=60)  # one that an earlier test has killed may not be back yet
    monkeypatch.setattr(scheduling, "__version__", "99.0")
    with pytest.raises(ConfigError, match=r"2 of 2 workers have another version .* here: 99.0.* Install"):
        run_tasks(_die, [0], 1, cluster.scheduler_address)


def test_an_address_where_nothing_answers(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "CONNECT_SECONDS", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"scheduler={address}: no dask.distributed scheduler answers"):
        run(source, tmp_path / "run", scheduler=address)
    assert not (tmp_path / "run" / "stages").exists(), "noticed before the sketch"


def test_a_cluster_without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr(scheduling, "CONNECT_SECONDS", 1)
    with (
        LocalCluster(n_workers=0, processes=True, dashboard_address=":0") as empty,
        pytest.raises(ConfigError, match="no workers came within 1 seconds"),
    ):
        run_tasks(_die, [0], 1, empty.scheduler_address)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"pip install 'schelix-scale\[cluster\]'"):
        run_tasks(_die, [0], 1, "tcp://127.0.0.1:1")


def test_the_command_line_takes_an_address(source: Path, tmp_path: Path) -> None:
    arguments = ["integrate", str(source), "-o", str(tmp_path / "run"), "--scheduler", "nowhere"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "'nowhere' is no address" in " ".join(result.stderr.split())


@pytest.mark.parametrize("address", ["10.0.0.1:8786", "http://host:1", "tcp://"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a"):
        load_config(None, {"scheduler": address})
