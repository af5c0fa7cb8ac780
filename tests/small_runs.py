"""Whole runs of few cells of known types and batches."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

import schelix_scale
from schelix_scale.pipeline import integrate
from schelix_scale.progress import QuietReporter

from .synthetic import make_cells

SMALL = {
    "genes.n_hvg": 150,
    "genes.min_batch_cells": 20,
    "features.anchor_dims": 10,
    "features.variant_dims": 10,
    "graph.k": 12,
    "train.width": 16,
    "train.batch_size": 128,
    "train.align_steps": 20,
    "train.refine_steps": 20,
    "train.evaluate_every": 10,
    "threads": 1,
}
STAGE_NAMES = ["genes", "features", "graph", "train", "embed"]


def make_adata(**kwargs: object) -> anndata.AnnData:
    cells = make_cells(n_types=4, n_batches=3, per_group=30, n_genes=150, **kwargs)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical([f"donor{b}" for b in cells.batch_n]),
            "cell_type": pd.Categorical([f"type{t}" for t in cells.type_n]),
            "condition": cells.condition_n.astype(str),
        },
        index=[f"cell{i}" for i in range(len(cells.batch_n))],
    )
    var = pd.DataFrame(index=[f"gene{i}" for i in range(cells.counts_ng.shape[1])])
    return anndata.AnnData(sparse.csr_matrix(cells.counts_ng.astype(np.float32)), obs=obs, var=var)


def run(source: object, out: Path, **settings: object) -> schelix_scale.Run:
    given = {"reporter": QuietReporter(), **SMALL, **settings}
    return integrate(source, batch_key="batch", out=out, **given)


def within_and_between(embedding: np.ndarray, codes: np.ndarray) -> float:
    """Share of the variance of an embedding that lies between groups of cells."""
    total = ((embedding - embedding.mean(axis=0)) ** 2).sum()
    within = sum(((embedding[codes == c] - embedding[codes == c].mean(axis=0)) ** 2).sum() for c in np.unique(codes))
    return float(1 - within / total)
