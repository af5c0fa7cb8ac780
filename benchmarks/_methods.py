"""The methods: each a function of a task and an empty directory that returns its embeddings, run as its users run it.

A new method is one function (peers: in `_peers`) and one line in `METHODS`. Import its libraries inside the function:
each method is measured in a process of its own, and what is imported counts. Embeddings are (n, d), in row order of the
file, under the names of their rows in the table: the name of the method, or ``method:part``; None stands for a part
that this run does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _peers
from _machine import threads
from _prepare import partial_labels, prepared
from _tasks import Task

if TYPE_CHECKING:
    import numpy as np

Embeddings = dict[str, "np.ndarray | None"]
PARTS = ("backbone", "anchor", "variant")
COMMON = ("numpy", "scipy", "scikit-learn", "pandas", "anndata", "scanpy")


@dataclass(frozen=True)
class Method:
    """A method, the distributions it needs beside `COMMON`, and whether labels of cells are told to it."""

    run: Callable[[Task, Path], Embeddings]
    libraries: tuple[str, ...] = ()
    sees_labels: bool = False


def pca(task: Task, scratch: Path) -> Embeddings:
    """50 principal components of centred, log-normalised, batch-aware variable genes: no integration."""
    return {"pca": prepared(task).obsm["X_pca"]}


def schelix(task: Task, scratch: Path) -> Embeddings:
    """scHelix-Scale from the file: the embedding its users get, the backbone it grew from, and both streams.

    An ablation (``schelix@name``) has the embedding alone.
    """
    from schelix_scale import integrate, load_config
    from schelix_scale.progress import QuietReporter

    reporter = QuietReporter()
    config = load_config(overrides=[*task.settings, "embed.streams=true", *_conditions(task)])
    run = integrate(task.data, batch_key=task.batch_key, out=scratch / "run", config=config, reporter=reporter)
    print(*reporter.messages, sep="\n")
    obsm = run.to_anndata().obsm
    parts = {} if "@" in task.method else {f"schelix:{part}": _part(obsm, f"X_schelix_{part}") for part in PARTS}
    return {task.method: obsm["X_schelix"], **parts}


def schelix_labels(task: Task, scratch: Path) -> Embeddings:
    """scHelix-Scale that is told the labels of a fifth of the cells, the same cells as `scanvi`."""
    import anndata

    from schelix_scale import integrate, load_config
    from schelix_scale.progress import QuietReporter

    reporter = QuietReporter()
    adata = anndata.read_h5ad(task.data)
    adata.obs["partly_known"] = partial_labels(task)
    config = load_config(overrides=[*task.settings, *_conditions(task)])
    run = integrate(
        adata,
        batch_key=task.batch_key,
        label_key="partly_known",
        out=scratch / "run",
        config=config,
        reporter=reporter,
    )
    print(*reporter.messages, sep="\n")
    return {"schelix_labels": run.embedding}


METHODS: dict[str, Method] = {
    "schelix": Method(schelix, ("torch", "harmonypy", "pynndescent", "numba")),
    "schelix_labels": Method(schelix_labels, ("torch", "harmonypy", "pynndescent", "numba"), sees_labels=True),
    "pca": Method(pca),
    "harmony": Method(_peers.harmony, ("harmonypy",)),
    "scanorama": Method(_peers.scanorama, ("scanorama", "annoy", "fbpca")),
    "scvi": Method(_peers.scvi, ("scvi-tools", "torch", "lightning")),
    "concord": Method(_peers.concord, ("concord-sc", "torch")),
    "scanvi": Method(_peers.scanvi, ("scvi-tools", "torch", "lightning"), sees_labels=True),
}


def _conditions(task: Task) -> list[str]:
    """Return the settings that make a run comparable: its seed, and the processor and threads that peers get."""
    return [f"seed={task.seed}", "device=cpu", f"threads={threads()}"]


def method_of(name: str) -> Method:
    """Return the method of a task's name; ``schelix@no-gate`` is schelix with other settings."""
    return METHODS[name.partition("@")[0]]


def _part(obsm: Any, key: str) -> np.ndarray | None:
    """Return a stream, or None where the run has it not, or only as zeros or NaN (a single-stream run)."""
    import numpy as np

    z_nd = np.asarray(obsm[key]) if key in obsm else np.zeros((0, 0))
    return z_nd if np.nan_to_num(z_nd).any() else None
