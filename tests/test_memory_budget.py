"""A run keeps to max_memory: what it holds beyond its libraries, measured in a process of its own, stage by stage."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from schelix_scale.budget import least_needs, require_memory
from schelix_scale.config import Config
from schelix_scale.errors import ConfigError
from schelix_scale.inspection import inspect_source
from schelix_scale.pipeline import integrate
from schelix_scale.progress import QuietReporter
from schelix_scale.stores import MemoryStore

from .counting import CountingStore
from .small_runs import SMALL, make_adata
from .stores.truth import write_zarr

CELLS, GENES, BATCHES = 27_000, 3_000, 4
BUDGET = 100_000_000
ROOT = Path(__file__).parents[1]
MEASURABLE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}  # what is freed is given back at once

# Peaks are of VmHWM, which starts anew at every stage; "before" is what is resident after a run of 1,000 cells, that is
# with all libraries loaded and warm.
MEASURED_RUN = """
import json, sys
from contextlib import contextmanager
from pathlib import Path
from schelix_scale.pipeline import integrate
from schelix_scale.progress import QuietReporter

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

class Watch(QuietReporter):
    def __init__(self):
        super().__init__()
        self.peaks = {}

    @contextmanager
    def stage(self, name, total=None, unit="cells"):
        Path("/proc/self/clear_refs").write_text("5")
        with super().stage(name, total, unit) as progress:
            yield progress
        self.peaks[name] = status("VmHWM")

small, large, out, settings = sys.argv[1:]
settings = json.loads(settings)
integrate(small, out=out + "-small", reporter=QuietReporter(), **settings | {"max_memory": "1GB"})
before = status("VmRSS")
watch = Watch()
Path("/proc/self/clear_refs").write_text("5")
integrate(large, out=out, reporter=watch, **settings)
print(json.dumps({name: peak - before for name, peak in watch.peaks.items()} | {"end": status("VmHWM") - before}))
"""


@pytest.mark.parametrize(
    ("values", "memory", "message"),
    [
        (100, "4MB", r"stage genes needs about 5MB .* sketch of 1,000 cells with 100 values each; max_memory = 4MB"),
        (5, "1MB", r"stage features needs about 2MB .* on 1 threads.*--max-memory 2MB, or lower threads \(now 1\)"),
        (5, "1.5MB", r"stage graph needs about 2MB .* 30 neighbours of 1,000 cells.* or lower graph.k \(now 30\)"),
        (5, "2MB", None),
    ],
)
def test_too_little_memory_is_refused_before_anything_is_read(
    tmp_path: Path, values: int, memory: str, message: str | None
) -> None:
    x_ng = np.zeros((1_000, 200), np.float32)
    x_ng[:, :values] = 1
    store = CountingStore(MemoryStore(ad.AnnData(sparse.csr_matrix(x_ng), obs=batches(1_000))))
    config = Config(max_memory=memory, threads=1)
    problems = [text for text in inspect_source(store, "batch", config).problems if "stage" in text]
    if message is None:
        assert problems == []
        require_memory(store, config)
        return
    assert len(problems) == 1
    assert re.search(message, problems[0])
    store.reads[:] = 0
    with pytest.raises(ConfigError, match=message):
        integrate(store, batch_key="batch", out=tmp_path / "run", config=config, reporter=QuietReporter())
    assert store.reads.sum() == 0


def test_a_store_smaller_than_a_block_needs_no_more_than_its_cells() -> None:
    x_ng = sparse.csr_matrix(np.ones((40, 3), np.float32))
    need = max(least_needs(MemoryStore(ad.AnnData(x_ng, obs=batches(40))), Config(threads=1)), key=lambda n: n.memory)
    assert (need.stage, need.memory) == ("features", 40 * 4_000), "40 cells are less than a block"


def test_streamed_training_needs_its_buffers() -> None:
    store = MemoryStore(ad.AnnData(sparse.csr_matrix(np.ones((1_000, 20), np.float32)), obs=batches(1_000)))
    stream = {"train": {"input": "stream", "batch_size": 500}, "threads": 1}
    need = least_needs(store, Config.model_validate(stream))[-1]
    assert (need.stage, need.memory) == ("train", 125 * 20 * 40), "an eighth of the cells, their values 40 bytes each"
    for change in ({"train": {}}, {"strength": 0.0}, {"train": {**stream["train"], "enabled": False}}):
        assert [need.stage for need in least_needs(store, Config.model_validate(stream | change))][-1] == "graph"


def test_a_run_that_goes_on_needs_memory_for_what_is_left_only() -> None:
    store = MemoryStore(ad.AnnData(sparse.csr_matrix(np.ones((1_000, 100), np.float32)), obs=batches(1_000)))
    config = Config.model_validate({"max_memory": "4.5MB", "threads": 1})  # genes 5 MB, features less, graph 1.7
    for first, due in (("genes", None), ("genes", {"genes", "features"})):
        with pytest.raises(ConfigError, match="stage genes needs about 5MB"):
            require_memory(store, config, first, due)
    require_memory(store, config, "features")
    tighter = config.model_copy(update={"max_memory": "1.5MB"})
    for first in ("features", "graph"):
        with pytest.raises(ConfigError, match="stage graph needs"):
            require_memory(store, tighter, first)
    require_memory(store, tighter, "train")
    require_memory(store, tighter, "features", {"train", "embed"})


@pytest.mark.slow
def test_a_run_that_is_continued_with_too_little_memory_is_refused(tmp_path: Path) -> None:
    settings = {**SMALL, "train.enabled": False, "reporter": QuietReporter()}
    adata, out = make_adata(), tmp_path / "run"
    integrate(adata, batch_key="batch", out=out, **settings)
    assert integrate(adata, batch_key="batch", out=out, max_memory="200KB", **settings).path == out, "it is finished"
    for name in ("manifest.json", "stages/graph.json"):
        (out / name).unlink()
    with pytest.raises(ConfigError, match=r"stage graph needs about 1MB .* neighbours of 360 cells"):
        integrate(adata, batch_key="batch", out=out, max_memory="200KB", **settings)
    integrate(adata, batch_key="batch", out=out, **settings)


def batches(n: int) -> pd.DataFrame:
    codes = [f"b{i % BATCHES}" for i in range(n)]
    return pd.DataFrame({"batch": pd.Categorical(codes)}, index=[f"c{i}" for i in range(n)])


def write_cells(path: Path, n: int) -> int:
    """Write cells in which half of the genes are expressed; return the bytes of their values and positions."""
    rng = np.random.default_rng(0)
    profiles = rng.gamma(1.5, 0.7, (6, 1, GENES)) * np.exp(
        rng.normal(0, 0.4, (BATCHES, GENES)) * (np.arange(GENES) % 3 == 0)
    )
    blocks = [
        sparse.csr_matrix(
            rng.poisson(profiles[rng.integers(0, 6, stop - start), np.arange(start, stop) % BATCHES]).astype(np.float32)
        )
        for start in range(0, n, 1_000)
        for stop in [min(start + 1_000, n)]
    ]
    x_ng = sparse.vstack(blocks, format="csr")
    write_zarr(ad.AnnData(x_ng, obs=batches(n)), path, 3, chunks=(1 << 17,))
    return int(x_ng.data.nbytes + x_ng.indices.nbytes)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a stage")
def test_a_run_keeps_to_its_memory_at_every_stage(tmp_path: Path) -> None:
    write_cells(tmp_path / "small.zarr", 1_000)
    assert write_cells(tmp_path / "large.zarr", CELLS) >= 3 * BUDGET
    settings = {
        "batch_key": "batch",
        "max_memory": str(BUDGET),
        "threads": 2,
        "graph__k": 10,
        "graph__method": "exact",
        "genes__iterations": 1,
        "train__align_steps": 20,
        "train__refine_steps": 20,
    }
    arguments = [str(tmp_path / name) for name in ("small.zarr", "large.zarr", "run")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED_RUN, *arguments, json.dumps(settings)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | MEASURABLE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert {"sketch", "genes", "components", "features", "diffusion", "embed"} <= set(peaks)
    assert max(peaks.values()) <= BUDGET, {name: f"{peak / 1e6:.0f} MB" for name, peak in peaks.items()}
