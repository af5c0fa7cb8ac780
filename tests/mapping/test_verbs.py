"""`schelix map` and `schelix extend` as they are called from a shell."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import tiledbsoma.io
from typer.testing import CliRunner

from schelix_scale import extend, map_cells
from schelix_scale.cli import app
from schelix_scale.errors import DataError, RunError
from schelix_scale.mapping.mapped import Mapped
from schelix_scale.progress import QuietReporter
from tests.mapping.conftest import Atlas


@pytest.fixture(scope="module")
def query_file(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("query") / "new.h5ad"
    atlas.query.write_h5ad(path)
    return path


def test_the_verbs(atlas: Atlas, query_file: Path, tmp_path: Path) -> None:
    run, new, cli = str(atlas.run), str(query_file), CliRunner()
    options = ["--batch-key", "batch", "--label-key", "cell_type", "-s", "coverage=0.8", "-o", str(tmp_path / "m")]
    mapped = cli.invoke(app, ["map", run, new, *options])
    assert mapped.exit_code == 0, mapped.output
    assert "200 cells in 1 batch:" in mapped.output
    assert "type0 " in mapped.output
    obs = anndata.read_zarr(tmp_path / "m" / "mapped.zarr").obs
    assert {"schelix_cell_type", "schelix_cell_type_probability", "schelix_cell_type_set"} <= set(obs)
    for verb in (["train"], ["graph"], ["embed"], ["export"]):
        last = [str(tmp_path / "out.h5ad")] if verb == ["export"] else []
        refused = cli.invoke(app, [*verb, str(tmp_path / "m"), *last])
        assert refused.exit_code == 1
        assert "holds cells mapped onto" in " ".join(refused.output.split())
    more = cli.invoke(app, ["extend", run, new, "-b", "batch", "-o", str(tmp_path / "v2"), "--quiet"])
    assert (more.exit_code, more.output) == (0, "")
    assert cli.invoke(app, ["verify", str(tmp_path / "v2")]).exit_code == 0
    with pytest.raises(DataError, match="an extension needs 2"):
        extend(run, atlas.query[:1].copy(), out=tmp_path / "v3", reporter=QuietReporter())
    with pytest.raises(RunError, match="never changed"):
        extend(run, new, out=run, reporter=QuietReporter())


def test_which_batches_have_novel_cells(atlas: Atlas, tmp_path: Path) -> None:
    known = atlas.reference[atlas.reference.obs["batch"] == "b0"][::2].copy()
    known.obs_names = [f"known-{name}" for name in known.obs_names]
    anndata.concat([known, atlas.query]).write_h5ad(tmp_path / "both.h5ad")
    asked = ["map", str(atlas.run), str(tmp_path / "both.h5ad"), "-b", "batch", "-o", str(tmp_path / "m")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    obs = anndata.read_zarr(tmp_path / "m" / "mapped.zarr").obs
    novel = obs["schelix_novelty_p"] <= 0.01
    by_batch = novel.groupby(obs["batch"].astype(str)).mean()
    assert by_batch["b3"] > 0.1
    assert by_batch["b0"] < 0.01
    summary = Mapped.open(tmp_path / "m").manifest["summary"]
    assert summary["novel_by_batch"] == pytest.approx(by_batch.to_dict(), abs=1e-6)
    line = f"{novel.mean():.1%} of the cells (about 1.0% where nothing is new); most in b3 {by_batch['b3']:.1%}"
    assert f"novel {line} " in " ".join(done.output.split())


def test_part_of_an_experiment(atlas: Atlas, query_file: Path, tmp_path: Path) -> None:
    both = anndata.concat([atlas.reference[:30], atlas.query])
    tiledbsoma.io.from_anndata(str(tmp_path / "all.soma"), both, "RNA", X_layer_name="data")
    part, cli = ["--batch-key", "batch", "--obs-filter", "batch == 'b3'"], CliRunner()
    run, soma, out = str(atlas.run), str(tmp_path / "all.soma"), str(tmp_path / "m")
    done = cli.invoke(app, ["map", run, soma, *part, "--layer", "data", "-o", out])
    assert done.exit_code == 0, done.output
    whole = cli.invoke(app, ["map", run, str(query_file), "-b", "batch", "-o", str(tmp_path / "whole")])
    assert whole.exit_code == 0, whole.output
    found, expected = (anndata.read_zarr(tmp_path / name / "mapped.zarr") for name in ("m", "whole"))
    np.testing.assert_array_equal(found.obsm["X_schelix"], expected.obsm["X_schelix"])
    pd.testing.assert_series_equal(found.obs["schelix_novelty_p"], expected.obs["schelix_novelty_p"], check_index=False)
    more = cli.invoke(app, ["extend", run, soma, *part, "--layer", "data", "-q", "-o", str(tmp_path / "v2")])
    assert (more.exit_code, more.output) == (0, "")
    assert len(pd.read_parquet(tmp_path / "v2" / "cells.parquet")) == atlas.reference.n_obs + atlas.query.n_obs
    refused = cli.invoke(app, ["map", run, str(query_file), "--obs-filter", "batch == 'b3'", "-o", str(tmp_path / "n")])
    assert refused.exit_code == 1
    assert "is no SOMA experiment" in " ".join(refused.output.split())
    quiet = QuietReporter()
    again = map_cells(run, soma, batch_key="batch", layer="data", obs_filter="batch == 'b3'", reporter=quiet)
    np.testing.assert_array_equal(again.embedding, expected.obsm["X_schelix"])
