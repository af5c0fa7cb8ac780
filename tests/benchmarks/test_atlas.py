"""An atlas is what its description says: counts as dense NumPy expects from its plan, the same in each format."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import make_atlas
import numpy as np
import pandas as pd
import pytest
from _atlas import Atlas, Settings, batch_sizes
from scipy import sparse

SETTINGS = Settings(cells=3_000, genes=70, batches=4, seed=3, molecules=300)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 cells of three types, 60 genes."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 3, 240)
    rates = np.exp(rng.normal(0, 1, (3, 60)))
    cells = ad.AnnData(
        sparse.csr_matrix(rng.poisson(rates[kinds]).astype(np.float32)),
        obs=pd.DataFrame({"cell_type": np.array(["a", "b", "c"])[kinds]}, index=[f"c{i}" for i in range(240)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(60)]),
    )
    path = tmp_path_factory.mktemp("template") / "cells.h5ad"
    cells.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def atlas(template: Path) -> Atlas:
    return Atlas(template, SETTINGS)


def counts(atlas: Atlas, block_cells: int = 4_096) -> np.ndarray:
    return sparse.vstack([block.x_ng for block in atlas.blocks(block_cells)]).toarray()


def test_counts_are_multinomial_around_profile_and_batch(atlas: Atlas) -> None:
    x_ng = counts(atlas)
    np.testing.assert_array_equal(x_ng.sum(axis=1), atlas.molecules_n)
    caught = atlas.profiles.toarray()[atlas.profile_n] * atlas.kept_bg[atlas.batch_n]
    expected_ng = atlas.molecules_n[:, None] * caught / caught.sum(axis=1, keepdims=True)
    variance_ng = expected_ng * (1 - expected_ng / atlas.molecules_n[:, None])
    types = atlas.obs["cell_type"].to_numpy().astype(str)
    for batch in range(4):
        for kind in "abc":
            rows = (atlas.batch_n == batch) & (types == kind)
            if rows.sum() < 20:
                continue
            error = (x_ng[rows].sum(axis=0) - expected_ng[rows].sum(axis=0)) / np.sqrt(variance_ng[rows].sum(axis=0))
            assert np.abs(error).max() < 5
            assert 0.7 < error.std() < 1.3


def test_only_the_marked_genes_differ_between_batches(atlas: Atlas) -> None:
    marked = atlas.var["batch_sensitive"].to_numpy()
    assert 0.1 < marked.mean() < 0.5
    assert np.ptp(atlas.kept_bg[:, ~marked]) == 0
    assert (np.ptp(atlas.kept_bg[:, marked], axis=0) > 0).all()


def test_batches_are_uneven_and_lack_types(template: Path) -> None:
    atlas = Atlas(template, Settings(cells=20_000, genes=60, batches=30))
    table = pd.crosstab(atlas.obs["batch"], atlas.obs["cell_type"])
    sizes = table.sum(axis=1)
    assert sizes.sum() == 20_000
    assert sizes.max() > 3 * sizes.min()
    assert (table == 0).to_numpy().any()
    assert atlas.obs["batch"].is_monotonic_increasing


@pytest.mark.parametrize(
    ("weights", "cells", "expected"),
    [
        ([5, 3, 2], 100, [50, 30, 20]),
        ([5, 3, 2.5], 101, [49, 28, 24]),  # 48, 28 and 24 by the weights
        ([900, 300, 1, 1, 1, 1], 12, [2, 2, 2, 2, 2, 2]),
        ([6, 5, 1, 1, 1, 1, 1, 1], 17, [2, 3, 2, 2, 2, 2, 2, 2]),
    ],
)
def test_every_batch_has_two_cells(weights: list[float], cells: int, expected: list[int]) -> None:
    assert batch_sizes(np.array(weights, float), cells).tolist() == expected


@pytest.mark.parametrize("settings", [{"cells": 79}, {"cells": 99, "batches": 0}, {"cells": 99, "genes": 0}])
def test_an_atlas_of_nothing(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"too few for 40 batches|must be 1 or more"):
        Settings(**settings)


def test_blocks_do_not_depend_on_their_size(atlas: Atlas) -> None:
    np.testing.assert_array_equal(counts(atlas, 700), counts(atlas))


def test_another_seed_gives_other_cells(template: Path, atlas: Atlas) -> None:
    other = Atlas(template, Settings(cells=3_000, genes=70, batches=4, seed=4, molecules=300))
    assert (counts(other) != counts(atlas)).any()


@pytest.mark.parametrize("suffix", [".zarr", ".h5ad", ".soma"])
def test_every_format_holds_the_same_cells(template: Path, atlas: Atlas, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"atlas{suffix}"
    size = ["--cells", "3000", "--genes", "70", "--batches", "4", "--seed", "3", "--molecules", "300"]
    assert make_atlas.main([*size, "--template", str(template), "-o", str(out)]) == 0
    if suffix == ".soma":
        soma_io = pytest.importorskip("tiledbsoma.io")
        import tiledbsoma

        with tiledbsoma.Experiment.open(str(out)) as experiment:
            read = soma_io.to_anndata(experiment, "RNA")
    else:
        read = (ad.read_zarr if suffix == ".zarr" else ad.read_h5ad)(out)
    np.testing.assert_array_equal(read.X.toarray(), counts(atlas))
    assert list(read.var_names) == list(atlas.var.index)
    assert list(read.obs["cell_type"].astype(str)) == list(atlas.obs["cell_type"].astype(str))
    np.testing.assert_array_equal(read.var["batch_sensitive"], atlas.var["batch_sensitive"])


def test_bad_usage(template: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there.zarr"
    there.mkdir()
    for arguments, complaint in (
        (["--cells", "3000", "-o", str(there)], "must be new"),
        (["--cells", "3000", "-o", str(tmp_path / "a.csv")], "must be new and end in"),
        (["--cells", "30", "-o", str(tmp_path / "a.zarr")], "too few for 40 batches"),
        (["--cells", "3000", "--template", "nowhere.h5ad", "-o", str(tmp_path / "a.zarr")], "there is no file"),
    ):
        given = arguments if "--template" in arguments else [*arguments, "--template", str(template)]
        assert make_atlas.main(given) == 2
        assert complaint in capsys.readouterr().err
