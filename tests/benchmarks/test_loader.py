"""`loader.py`: all loaders deal the same cells of the same copies, each once, and what was found is told."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import loader
import numpy as np
import pytest
from _loader_data import copies
from _loader_tasks import deal

from schelix_scale.stores import open_store

from .data import made_up

CELLS, GENES, FIRST = 240, 60, 200


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "cells.h5ad"
    made_up(path, CELLS, GENES)
    return path


@pytest.fixture(scope="module")
def paths(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return copies(source, FIRST, tmp_path_factory.mktemp("copies"))


def truth(source: Path) -> np.ndarray:
    return np.asarray(anndata.read_h5ad(source).X)[:FIRST]


def test_copies_hold_the_first_cells(source: Path, paths: dict[str, Path]) -> None:
    assert list(paths) == ["zarr", "h5ad", "soma"]
    for path in paths.values():
        store = open_store(path)
        assert store.n_cells == FIRST
        np.testing.assert_array_equal(store.read(np.arange(FIRST)).toarray(), truth(source))


def test_what_a_killed_run_left_is_written_anew_and_no_column_is_needed(source: Path, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(source)[:30].copy()
    del cells.obs["batch"]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for suffix in ("zarr", "soma"):
        (tmp_path / "copies" / f".partial-cells-20.{suffix}").mkdir(parents=True)
        (tmp_path / "copies" / f".partial-cells-20.{suffix}" / "half").write_text("half")
    (tmp_path / "copies" / ".partial-cells-20.h5ad").write_text("half")
    paths = copies(tmp_path / "cells.h5ad", 20, tmp_path / "copies")
    assert sorted(path.name for path in (tmp_path / "copies").iterdir()) == sorted(path.name for path in paths.values())
    for path in paths.values():
        store = open_store(path)
        assert list(store.cell_names) == list(cells.obs_names[:20])
        np.testing.assert_array_equal(store.read(np.arange(20)).toarray(), truth(source)[:20])


def test_copies_are_kept(source: Path, paths: dict[str, Path]) -> None:
    before = {kind: path.stat().st_mtime_ns for kind, path in paths.items()}
    assert copies(source, FIRST, paths["zarr"].parent) == paths
    assert {kind: path.stat().st_mtime_ns for kind, path in paths.items()} == before


@pytest.mark.parametrize("kind", ["zarr", "h5ad", "soma"])
def test_all_loaders_deal_every_cell_once(source: Path, paths: dict[str, Path], kind: str) -> None:
    pytest.importorskip("scdataset")
    pytest.importorskip("tiledbsoma_ml")
    stored = int((truth(source) != 0).sum())
    for one in loader.contenders(32, 16, 64):
        if one.kind == kind and not one.settings.get("workers"):
            found = deal(one.loader, str(paths[kind]), 32, None, one.settings)
            assert (found["cells"], found["values"]) == (FIRST, stored), one.label
            first = deal(one.loader, str(paths[kind]), 32, 2, one.settings)
            assert first["cells"] == 64, one.label


def test_wrong_usage(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loader.main(["nowhere.zarr"]) == 2
    assert "make_atlas.py" in capsys.readouterr().err
    assert loader.main([str(source), "--formats", "loom"]) == 2


@pytest.mark.slow
def test_measures_and_writes_a_table(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scdataset")
    out = tmp_path / "loader.json"
    options = ["--cells", str(FIRST), "--batch", "32", "--rounds", "1", "--formats", "h5ad", "-o", str(out)]
    assert loader.main([str(source), *options]) == 0
    row = json.loads(out.read_text())
    assert (row["cells"], row["genes"], row["page_cache"]) == (FIRST, GENES, "warm")
    assert [one["loader"] for one in row["loaders"]] == ["schelix", "scDataset", "scDataset", "scDataset"]
    for one in row["loaders"]:
        assert [found["cells"] for found in one["rounds"]] == [FIRST]
        assert one["peak_mb"] > 50
    assert {"commit", "machine", "versions", "date"} <= set(row)
    assert "| h5ad | schelix |" in capsys.readouterr().out
