"""One reference for all tests of mapping: three batches of five types, and a fourth batch that it has not seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import schelix_scale
from schelix_scale.progress import QuietReporter
from tests.synthetic import make_cells

SETTINGS = {
    "genes__min_batch_cells": 20,
    "features__anchor_dims": 10,
    "features__variant_dims": 10,
    "graph__k": 15,
    "train__align_steps": 20,
    "train__refine_steps": 20,
    "train__evaluate_every": 10,
    "threads": 1,
}
NOVEL = "type4"


@dataclass(frozen=True)
class Atlas:
    """A finished run, the cells it was made of, and all cells of a batch that it has not seen.

    The reference lacks the cells of ``type4``; the new batch has them.
    """

    run: Path
    reference: anndata.AnnData
    query: anndata.AnnData

    @property
    def known(self) -> anndata.AnnData:
        """The new batch without the type that the reference lacks."""
        return self.query[self.query.obs["cell_type"] != NOVEL].copy()


def cells() -> anndata.AnnData:
    made = make_cells(batch_strength=0.6, per_group=40, n_genes=180, seed=3)
    obs = pd.DataFrame(
        {
            "batch": [f"b{code}" for code in made.batch_n],
            "cell_type": [f"type{code}" for code in made.type_n],
            "side": [("left", "right")[code % 2] for code in made.type_n],
        },
        index=[f"cell{i}" for i in range(len(made.type_n))],
    )
    names = pd.DataFrame(index=[f"g{i}" for i in range(made.counts_ng.shape[1])])
    return anndata.AnnData(sparse.csr_matrix(made.counts_ng.astype(np.float32)), obs=obs, var=names)


@pytest.fixture(scope="session")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    folder = tmp_path_factory.mktemp("atlas")
    made = cells()
    new = (made.obs["batch"] == "b3").to_numpy()
    seen = ~new & (made.obs["cell_type"] != NOVEL).to_numpy()
    reference = made[seen].copy()
    schelix_scale.integrate(
        reference, batch_key="batch", out=folder / "run", reporter=QuietReporter(), config=None, **SETTINGS
    )
    return Atlas(folder / "run", reference, made[new].copy())


@pytest.fixture(scope="session")
def reference(atlas: Atlas) -> schelix_scale.Reference:
    return schelix_scale.Reference.open(atlas.run)
