"""A demonstration on real cells that scanpy ships: data, run, scores before and after, and a picture, in one folder."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from schelix_scale.config_io import load_config
from schelix_scale.errors import RunError
from schelix_scale.metrics import batch_mixing, label_conservation
from schelix_scale.pipeline import integrate
from schelix_scale.progress import Reporter, RichReporter
from schelix_scale.publish import publish, write_json
from schelix_scale.run import Run

if TYPE_CHECKING:
    from anndata import AnnData

BATCH, LABEL = "gem_well", "bulk_labels"
# The same as configs/demo.toml, which is not installed with the package.
SETTINGS: dict[str, Any] = {
    "data.batch_key": BATCH,
    "genes.min_batch_cells": 50,
    "graph.k": 15,
}
COMPONENTS = 30
NEIGHBORS = 15


@dataclass(frozen=True)
class DemoResult:
    """What `run_demo` has made.

    Attributes
    ----------
    run, data, picture
        The finished run, the file of its cells, and the UMAP picture.
    seconds
        What each stage of the run took when it was done.
    before, after
        Scores of the principal components and of the embedding by name, all 0 to 1 and better when higher.
    single_stream
        Whether no batch signal was found, so that nothing was corrected.
    """

    run: Run
    data: Path
    picture: Path
    seconds: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]
    single_stream: bool


def run_demo(out: str | Path = "demo-run", reporter: Reporter | None = None) -> DemoResult:
    """Integrate 700 blood cells of 8 GEM wells, score the result and draw it.

    The cells are `scanpy.datasets.pbmc68k_reduced`, which comes with scanpy: log-normalised values of 765 genes
    (``raw``), the well from the barcode's suffix, and labels by correlation with sorted cells. ``out`` gets
    ``pbmc68k.h5ad``, ``run/``, ``scores.json`` and ``umap.png``; what is there from before is not done again.

    Parameters
    ----------
    out
        The folder, made if it is not there.
    reporter
        Where progress goes; standard error by default.

    Raises
    ------
    RunError
        ``out`` is a file, or ``out/run`` holds a run of other settings.

    References
    ----------
    G. X. Y. Zheng et al., "Massively parallel digital transcriptional profiling of single cells", Nature
    Communications 2017.
    """
    folder, reporter = Path(out).expanduser(), reporter or RichReporter()
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file, not a directory. Choose another output directory with -o.")
    data, picture = folder / "pbmc68k.h5ad", folder / "umap.png"
    if not data.exists():
        with reporter.stage("cells of scanpy", None, "steps"), publish(data) as partial:
            demo_cells().write_h5ad(partial)
    run = integrate(data, out=folder / "run", config=load_config(None, SETTINGS), reporter=reporter)
    scores = _finished_scores(folder, run)
    if scores is None:
        scores = _score_and_draw(run, data, picture, reporter)
        write_json(folder / "scores.json", {"embedding": _checksum(run), **scores})
    stages = {name: record["seconds"] for name, record in run.manifest["stages"].items()}
    single = run.manifest["summary"]["single_stream"]
    return DemoResult(run, data, picture, stages, scores["before"], scores["after"], single)


def demo_cells() -> AnnData:
    """Return the cells with log-normalised values, ``obs["gem_well"]`` and ``obs["bulk_labels"]``, and nothing else."""
    import anndata
    import scanpy

    shipped = scanpy.datasets.pbmc68k_reduced()
    obs = shipped.obs[[LABEL]].copy()
    obs[BATCH] = shipped.obs_names.str.rpartition("-").get_level_values(2)
    return anndata.AnnData(shipped.raw.X, obs=obs.astype("category"), var=shipped.raw.var[[]])
