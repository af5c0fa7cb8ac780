"""The same atlas as zarr, h5ad, SOMA and census gives the same genes and the same embedding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from _atlas import Atlas, Settings
from _atlas_write import write_atlas
from scipy import sparse

from schelix_scale import Run, integrate
from schelix_scale.progress import QuietReporter

from ..stores.census_builder import CensusTruth, write_census
from .data import made_up

SMALL = {"train.align_steps": 20, "train.refine_steps": 20, "sketch.max_cells": 400, "threads": 1}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    template = tmp_path_factory.mktemp("template") / "cells.h5ad"
    made_up(template, n=200, g=120)
    return Atlas(template, Settings(1_000, 150, 3, molecules=400))


def run_on(source: str, out: Path, **settings: object) -> Run:
    return integrate(source, batch_key="batch", out=out, reporter=QuietReporter(), **SMALL, **settings)


@pytest.fixture(scope="module")
def expected(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("expected")
    write_atlas(atlas, folder / "atlas.zarr", {})
    return run_on(str(folder / "atlas.zarr"), folder / "run")


def check(found: Run, expected: Run) -> None:
    names = [name for name in found.genes.columns if name != "feature_name"]  # which the census alone has
    assert set(expected.genes["role"]) == {"anchor", "variant"}
    pd.testing.assert_frame_equal(found.genes[names], expected.genes, check_names=False)
    np.testing.assert_allclose(found.embedding[:], expected.embedding[:], atol=1e-5)


@pytest.mark.parametrize("suffix", [".h5ad", ".soma"])
def test_h5ad_and_soma_as_zarr(atlas: Atlas, expected: Run, tmp_path: Path, suffix: str) -> None:
    write_atlas(atlas, tmp_path / f"atlas{suffix}", {})
    check(run_on(str(tmp_path / f"atlas{suffix}"), tmp_path / "run"), expected)


def test_census_as_zarr(atlas: Atlas, expected: Run, tmp_path: Path) -> None:
    x_ng = sparse.vstack([block.x_ng for block in atlas.blocks()]).toarray()
    n, g = x_ng.shape
    obs = pd.DataFrame(
        {
            "soma_joinid": np.arange(n, dtype=np.int64),
            "dataset_id": "one",
            "batch": atlas.obs["batch"].astype(str).to_numpy(),
            "is_primary_data": True,
        }
    )
    names = atlas.var.index.to_numpy()
    var = pd.DataFrame({"soma_joinid": np.arange(g, dtype=np.int64), "feature_id": names, "feature_name": names})
    census = write_census(CensusTruth(x_ng, obs, var, ["one"], np.ones((1, g), bool)), tmp_path / "census")
    found = run_on("census:homo_sapiens", tmp_path / "run", **{"data.census_uri": str(census)})
    check(found, expected)
    assert found.manifest["source"]["census_build_date"] == "2025-11-08"
