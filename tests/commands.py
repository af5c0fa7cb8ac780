"""The command line, called as users call it, on cells of which a run takes a second."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from typer.testing import CliRunner

from schelix_scale.cli import app

PYTHON = [sys.executable, "-m", "schelix_scale"]

FAST = ["genes.n_hvg=100", "graph.k=10", "train.align_steps=20", "train.refine_steps=20", "train.evaluate_every=10"]


def cells(n: int = 240, g: int = 120, seed: int = 0) -> ad.AnnData:
    """Make counts of 3 types in 3 batches, each with genes of its own."""
    rng = np.random.default_rng(seed)
    kind, batch = np.arange(n) % 3, rng.integers(0, 3, n)
    mean_ng = np.tile(rng.gamma(1.0, 1.0, g) + 0.2, (n, 1))
    for i in range(3):
        mean_ng[np.ix_(kind == i, np.arange(i * 15, i * 15 + 15))] *= 6
        mean_ng[np.ix_(batch == i, np.arange(60 + i * 15, 75 + i * 15))] *= 3
    obs = pd.DataFrame({"batch": batch.astype(str), "type": kind.astype(str)}, index=[f"cell{i}" for i in range(n)])
    x_ng = sparse.csr_matrix(rng.poisson(mean_ng).astype(np.float32))
    return ad.AnnData(x_ng, obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(g)]))


def schelix(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def integrate(source: Path, out: Path, *more: object) -> list[object]:
    return ["integrate", source, "-o", out, "--threads", 1, *(part for key in FAST for part in ("--set", key)), *more]
