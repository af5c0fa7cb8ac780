"""A finished run: what its user reads, and what verify finds."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from schelix_scale.config import Config
from schelix_scale.errors import RunError
from schelix_scale.run import Run, RunDirectory
from tests.run_tools import SOURCE


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    import anndata

    root = tmp_path / "atlas"
    cells = pd.DataFrame({"batch": ["a", "b", "a"]}, index=["c0", "c1", "c2"])
    z_nd = np.array([[0, 1], [2, 3], [4, 5]], dtype=np.float64)
    with RunDirectory.claim(root, Config(seed=2), SOURCE) as run:
        run.begin("genes")
        with run.publish("genes.parquet") as path:
            pd.DataFrame({"role": ["anchor", "variant"]}, index=["g0", "g1"]).to_parquet(path)
        with run.publish("cells.parquet") as path:
            cells.to_parquet(path)
        run.finish("genes", run.fingerprint("genes", 1, {}), ["genes.parquet", "cells.parquet"], 0.1)
        run.begin("embed")
        with (
            run.publish("embedding.zarr") as path,
            anndata.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False),
        ):
            anndata.AnnData(obs=cells, obsm={"X_schelix": z_nd}).write_zarr(path)
        run.finish("embed", run.fingerprint("embed", 1, {}, ["genes"]), ["embedding.zarr"], 0.1)
        run.finish_run({"n_cells": 3, "recall": np.float64(0.98765432), "stratified": {"x": 1}})
    return root


def test_a_finished_run_is_read_by_row(finished: Path) -> None:
    run = Run.open(finished)
    assert (run.path, run.config.seed, run.verify()) == (finished, 2, [])
    assert run.genes["role"].to_dict() == {"g0": "anchor", "g1": "variant"}
    assert run.cells["batch"].to_dict() == {"c0": "a", "c1": "b", "c2": "a"}
    assert run.embedding.dtype == np.float32
    np.testing.assert_array_equal(run.embedding, [[0, 1], [2, 3], [4, 5]])
    adata = run.to_anndata()
    assert list(adata.obs_names) == ["c0", "c1", "c2"]
    np.testing.assert_array_equal(adata.obsm["X_schelix"], run.embedding)
    assert repr(run).startswith(f"Run('{finished}': n_cells=3, recall=0.9877, finished 2")


def test_the_manifest_says_what_made_the_run(finished: Path) -> None:
    manifest = Run.open(finished).manifest
    assert manifest["libraries"]["numpy"] == np.__version__
    assert manifest["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (manifest["source"], manifest["config"]["seed"], manifest["format"]) == (SOURCE, 2, 1)
    assert list(manifest["stages"]) == ["genes", "embed"]
    assert {name for name, found in manifest["libraries"].items() if found is None} == set()


def test_verify_finds_one_flipped_bit(finished: Path) -> None:
    chunk = max(
        (path for path in (finished / "embedding.zarr" / "obsm").rglob("*") if path.is_file()),
        key=lambda p: p.stat().st_size,
    )
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    (problem,) = Run.open(finished).verify()
    assert "embedding.zarr (made by stage embed) has another checksum" in problem
    assert "Delete it. Run the same `schelix integrate` command again to rebuild it." in problem


def test_verify_finds_cut_lost_and_unfinished(finished: Path) -> None:
    size = (finished / "genes.parquet").stat().st_size
    os.truncate(finished / "genes.parquet", size - 1)
    shutil.rmtree(finished / "embedding.zarr")
    problems = RunDirectory.open(finished).verify()
    assert [re.split("Delete|Run the", problem)[0].strip() for problem in sorted(problems)] == [
        f"{finished}/embedding.zarr (made by stage embed) is missing.",
        f"{finished}/genes.parquet (made by stage genes) has {size - 1} bytes in 1 files instead of {size} in 1.",
    ]
    (finished / "manifest.json").unlink()
    assert "is not finished: it has no manifest.json" in RunDirectory.open(finished).verify()[0]


@pytest.mark.parametrize("damage", ["{", "[]", '{"stages": 3}', '{"stages": {"../x": {}}}', "{}"])
def test_verify_survives_a_damaged_manifest(finished: Path, damage: str) -> None:
    (finished / "manifest.json").write_text(damage)
    assert RunDirectory.open(finished).verify() != []


def test_verify_compares_records_with_the_manifest(finished: Path) -> None:
    record = finished / "stages" / "embed.json"
    record.write_text(record.read_text().replace('"seconds": 0.1', '"seconds": 0.3'))
    (problem,) = Run.open(finished).verify()
    assert "embed.json differs from the manifest" in problem
    record.unlink()
    (problem,) = Run.open(finished).verify()
    assert "has no finished stage 'embed'" in problem


def test_what_verify_tells_to_delete_is_rebuilt(finished: Path) -> None:
    kept = (finished / "genes.parquet").read_bytes()
    (finished / "genes.parquet").unlink()
    with pytest.raises(RunError, match=r"has lost genes\.parquet"):
        _ = Run.open(finished).genes
    with RunDirectory.claim(finished, Config(seed=2), SOURCE) as run:
        assert not run.is_done("genes", run.fingerprint("genes", 1, {}))
        embed = run.fingerprint("embed", 1, {}, ["genes"])
        assert run.is_done("embed", embed)
        cells = (finished / "cells.parquet").read_bytes()
        for genes, same in ((b"rebuilt", False), (kept, True)):
            run.begin("genes")
            for name, content in (("genes.parquet", genes), ("cells.parquet", cells)):
                with run.publish(name) as path:
                    path.write_bytes(content)
            run.finish("genes", run.fingerprint("genes", 1, {}), ["genes.parquet", "cells.parquet"], 0.1)
            assert run.is_done("embed", run.fingerprint("embed", 1, {}, ["genes"])) == same
