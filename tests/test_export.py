from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

from schelix_scale.config import Config
from schelix_scale.errors import RunError
from schelix_scale.export import export_run
from schelix_scale.run import Run, RunDirectory
from schelix_scale.stores import open_store
from tests.stores.truth import make_truth, to_anndata, write_zarr

Z = np.random.default_rng(0).normal(size=(83, 5)).astype(np.float32)


def write(adata: ad.AnnData, path: Path, zarr_format: int = 3) -> Path:
    """Write an h5ad or a zarr of either format, without the warnings about future defaults."""
    if path.suffix == ".h5ad":
        adata.write_h5ad(path)
    else:
        with ad.settings.override(zarr_write_format=zarr_format, auto_shard_zarr_v3=False):
            adata.write_zarr(path)
    return path


def finished_run(path: Path, source: Path, layer: str = "X", names: pd.Index | None = None, **obsm: Any) -> Run:
    """Make a run of ``source`` whose embedding is Z, as the pipeline leaves it."""
    store = open_store(source, layer)
    description = {"uri": str(source.resolve()), "layer": layer, "fingerprint": store.fingerprint()}
    obs = store.obs().set_axis(store.cell_names if names is None else names, axis=0)
    with RunDirectory.claim(path, Config(), description) as run:
        run.begin("embed")
        with run.publish("embedding.zarr") as partial:
            write(ad.AnnData(obs=obs, obsm={"X_schelix": Z, **obsm}), partial)
        run.finish("embed", "0", ["embedding.zarr"], 1.0)
        run.finish_run({"cells": store.n_cells})
    return Run.open(path)


def cells(**more: Any) -> ad.AnnData:
    truth = make_truth()
    return to_anndata(truth, layers={"counts": sparse.csc_matrix(truth.x_ng)}, uns={"note": "kept"}, **more)


@pytest.fixture
def h5ad(tmp_path: Path) -> Path:
    return write(cells(obsm={"X_pca": np.ones((83, 2))}), tmp_path / "cells.h5ad")


def assert_exported(found: ad.AnnData, original: ad.AnnData) -> None:
    np.testing.assert_array_equal(found.obsm["X_schelix"], Z)
    np.testing.assert_array_equal(found.X.toarray(), original.X.toarray())
    pd.testing.assert_frame_equal(found.obs, original.obs)
    assert set(found.obsm) - {"X_schelix"} == set(original.obsm) - {"X_schelix"}
    assert dict(found.uns) == dict(original.uns)


def test_h5ad_copy_has_the_embedding_and_all_else(tmp_path: Path, h5ad: Path) -> None:
    before = h5ad.read_bytes()
    run = finished_run(tmp_path / "run", h5ad)
    out = export_run(run, tmp_path / "new" / "folder" / "out.h5ad")
    assert out == tmp_path / "new" / "folder" / "out.h5ad"
    assert_exported(ad.read_h5ad(out), ad.read_h5ad(h5ad))
    assert h5ad.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["out.h5ad"]


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("consolidated", [True, False])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_copy_keeps_the_zarr_format(tmp_path: Path, zarr_format: int, consolidated: bool) -> None:
    adata = cells()
    source = tmp_path / "cells.zarr"
    if consolidated:
        write(adata, source, zarr_format)
    else:
        write_zarr(adata, source, zarr_format)
        adata = ad.AnnData(adata.X, adata.obs, adata.var)  # write_zarr of the tests writes only these
    out = export_run(finished_run(tmp_path / "run", source), tmp_path / "out.zarr")
    assert_exported(ad.read_zarr(out), adata)
    array = zarr.open_array(str(out / "obsm" / "X_schelix"), mode="r")
    assert array.metadata.zarr_format == zarr_format
    root = zarr.open_group(str(out), mode="r")
    assert (root.metadata.consolidated_metadata is not None) == consolidated
    assert "X_schelix" in root["obsm"]


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_old_embeddings_of_the_source_are_replaced_and_streams_written(tmp_path: Path, suffix: str) -> None:
    old = {"X_schelix": np.zeros((83, 2)), "X_schelix_variant": np.zeros((83, 2)), "X_schelixir": np.ones((83, 1))}
    source = write(cells(obsm=old), tmp_path / f"cells.{suffix}")
    out = export_run(finished_run(tmp_path / "run", source, X_schelix_anchor=Z + 1), tmp_path / f"out.{suffix}")
    found = ad.io.read_h5ad(out) if suffix == "h5ad" else ad.io.read_zarr(out)
    assert set(found.obsm) == {"X_schelix", "X_schelix_anchor", "X_schelixir"}
    np.testing.assert_array_equal(found.obsm["X_schelix"], Z)
    np.testing.assert_array_equal(found.obsm["X_schelix_anchor"], Z + 1)


def test_a_run_of_a_layer_by_its_path(tmp_path: Path, h5ad: Path) -> None:
    finished_run(tmp_path / "run", h5ad, layer="counts")
    assert_exported(ad.read_h5ad(export_run(str(tmp_path / "run"), tmp_path / "out.h5ad")), ad.read_h5ad(h5ad))


def test_copies_of_read_only_sources_can_be_written(tmp_path: Path) -> None:
    source = write(cells(), tmp_path / "cells.zarr")
    run = finished_run(tmp_path / "run", source)
    for path in (*source.rglob("*"), source):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        out = export_run(run, tmp_path / "out.zarr")
    finally:
        for path in (source, *source.rglob("*")):
            path.chmod(0o755)
    assert all(path.stat().st_mode & 0o200 for path in out.rglob("*"))


def test_overwrite_replaces_an_earlier_export(tmp_path: Path, h5ad: Path) -> None:
    run = finished_run(tmp_path / "run", h5ad)
    target = tmp_path / "out.h5ad"
    target.write_text("old")
    with pytest.raises(RunError, match=r"out\.h5ad exists.*--overwrite"):
        export_run(run, target)
    assert target.read_text() == "old"
    export_run(run, target, overwrite=True)
    assert_exported(ad.read_h5ad(target), ad.read_h5ad(h5ad))


def test_targets_that_are_refused(tmp_path: Path, h5ad: Path) -> None:
    run = finished_run(tmp_path / "run", h5ad)
    link = tmp_path / "link.h5ad"
    link.symlink_to(h5ad)
    hard = tmp_path / "hard.h5ad"
    os.link(h5ad, hard)
    folder = tmp_path / "folder.h5ad"
    folder.mkdir()
    for target, message in [
        (h5ad, "is the file that the run read"),
        (link, "is the file that the run read"),
        (hard, "is the file that the run read"),
        (run.path / "out.h5ad", "is inside .*run, which is never changed"),
        (tmp_path, "holds the run or the file"),
        (tmp_path / "out.zarr", r"suffix '.zarr'.*Name it out\.h5ad"),
        (tmp_path / "out", r"suffix 'none'.*Name it out\.h5ad"),
        (folder, r"is a directory and not cells"),
    ]:
        with pytest.raises(RunError, match=message):
            export_run(run, target, overwrite=True)


def test_a_zarr_source_is_not_exported_to_h5ad_or_into_itself(tmp_path: Path) -> None:
    source = write(cells(), tmp_path / "cells.zarr")
    run = finished_run(tmp_path / "run", source)
    with pytest.raises(RunError, match=r"has the suffix '\.h5ad'.*Name it out\.zarr"):
        export_run(run, tmp_path / "out.h5ad")
    with pytest.raises(RunError, match=r"is inside .*cells\.zarr"):
        export_run(run, source / "out.zarr")
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="is a directory and not cells"):
        export_run(run, tmp_path / "mine.zarr", overwrite=True)


def test_a_source_that_has_changed_is_refused(tmp_path: Path, h5ad: Path) -> None:
    run = finished_run(tmp_path / "run", h5ad)
    cells()[::-1].copy().write_h5ad(h5ad)
    with pytest.raises(RunError, match=r"has changed since the run .* read it, or is another copy.*embedding\.zarr"):
        export_run(run, tmp_path / "out.h5ad")
    h5ad.write_bytes(b"no longer cells")
    with pytest.raises(RunError, match=r"has changed since the run .* read it: .*not an HDF5 file"):
        export_run(run, tmp_path / "out.h5ad")
    h5ad.unlink()
    with pytest.raises(RunError, match=r"cells\.h5ad, from which the run .*run read its cells, is gone. Put it back"):
        export_run(run, tmp_path / "out.h5ad")
    assert not (tmp_path / "out.h5ad").exists()


def test_cells_must_have_the_names_of_the_embedding(tmp_path: Path, h5ad: Path) -> None:
    names = open_store(h5ad).cell_names.to_numpy().copy()
    names[[3, 4]] = names[[4, 3]]
    run = finished_run(tmp_path / "run", h5ad, names=pd.Index(names))
    with pytest.raises(
        RunError, match=r"2 of 83 cells .* another name in the embedding \(first: row 3, cell3 and cell4"
    ):
        export_run(run, tmp_path / "out.h5ad")


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_cells_that_were_in_memory_are_exported_without_x(tmp_path: Path, h5ad: Path, suffix: str) -> None:
    run = finished_run(tmp_path / "run", h5ad, X_schelix_anchor=Z + 1)
    run.manifest["source"]["uri"] = open_store(cells()).source
    target = tmp_path / f"out.{suffix}"
    out = export_run(run, target)
    found = ad.read_h5ad(out) if suffix == "h5ad" else ad.read_zarr(out)
    assert found.X is None
    np.testing.assert_array_equal(found.obsm["X_schelix"], Z)
    np.testing.assert_array_equal(found.obsm["X_schelix_anchor"], Z + 1)
    pd.testing.assert_frame_equal(found.obs, ad.read_h5ad(h5ad).obs)
    assert json.loads(found.uns["schelix"]["source_facts"])["uri"] == "AnnData in memory"
    with pytest.raises(RunError, match=r"exists.*--overwrite"):
        export_run(run, target)
    export_run(run, target, overwrite=True)
    with pytest.raises(RunError, match=r"suffix '\.csv'.*written as out\.h5ad or \.zarr"):
        export_run(run, tmp_path / "out.csv")
    with pytest.raises(RunError, match="is inside the run, or holds it"):
        export_run(run, run.path / "out.h5ad")
    (tmp_path / "mine.zarr").mkdir()
    with pytest.raises(RunError, match="is a directory and not cells"):
        export_run(run, tmp_path / "mine.zarr", overwrite=True)


def test_a_lost_embedding_and_a_directory_that_is_no_run(tmp_path: Path, h5ad: Path) -> None:
    run = finished_run(tmp_path / "run", h5ad)
    (run.path / "embedding.zarr").rename(tmp_path / "elsewhere.zarr")
    with pytest.raises(RunError, match=r"has lost embedding\.zarr"):
        export_run(run, tmp_path / "out.h5ad")
    with pytest.raises(RunError, match="is not a run"):
        export_run(tmp_path, tmp_path / "out.h5ad")
