"""The run directory: what is resumed, refused, recorded and done again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schelix_scale.config import Config
from schelix_scale.config_io import load_config
from schelix_scale.errors import RunError
from schelix_scale.run import Run, RunDirectory
from tests.run_tools import SOURCE, child, fill, tree


def test_claim_writes_settings_and_source_first(tmp_path: Path) -> None:
    with RunDirectory.claim(tmp_path / "new" / "run", load_config(overrides=["graph.k=17"]), SOURCE) as run:
        header = json.loads((run.path / "run.json").read_text())
    assert sorted(header) == ["config", "format", "schelix_version", "source"]
    assert (header["format"], header["config"]["graph"]["k"], header["source"]) == (1, 17, SOURCE)
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "run.json"]


def test_the_same_run_is_resumed_whatever_the_memory(tmp_path: Path) -> None:
    with RunDirectory.claim(tmp_path / "run", Config(), SOURCE) as run:
        done = fill(run)
    moved = {**SOURCE, "uri": "elsewhere/cells.h5ad"}
    with RunDirectory.claim(tmp_path / "run", Config(max_memory="3GB"), moved) as again:
        assert again.is_done("genes", done)
        assert (again.source, again.config.max_memory) == (moved, "3GB")


def test_a_finished_run_says_where_its_cells_are_now(tmp_path: Path) -> None:
    with RunDirectory.claim(tmp_path, Config(), SOURCE) as run:
        fill(run)
        run.finish_run({"cells": 3})
    before = Run.open(tmp_path).manifest
    moved = {**SOURCE, "uri": "elsewhere/cells.h5ad", "files": (Path("a"),)}
    with RunDirectory.claim(tmp_path, Config(), moved):
        pass
    after = Run.open(tmp_path).manifest
    assert after == {**before, "source": {**SOURCE, "uri": "elsewhere/cells.h5ad", "files": ["a"]}}
    assert Run.open(tmp_path).verify() == []


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    with RunDirectory.claim(tmp_path, load_config(overrides=["graph.k=30"]), SOURCE) as run:
        fill(run)
    before = tree(tmp_path)
    message = r"\(graph\.k: 30 -> 15; seed: 0 -> 4\)|\(seed: 0 -> 4; graph\.k: 30 -> 15\).*-o.*--overwrite"
    with pytest.raises(RunError, match=message):
        RunDirectory.claim(tmp_path, load_config(overrides=["graph.k=15", "seed=4"]), SOURCE)
    other = {"fingerprint": "def", "parts": ["a", "b"]}  # say nothing to a reader
    for source, told in (({"layer": "raw"}, r"source\.layer: X -> raw"), ({}, "source: other cells or batches.*")):
        with pytest.raises(RunError, match=rf"other settings or cells \({told}\)\. Choose"):
            RunDirectory.claim(tmp_path, load_config(overrides=["graph.k=30"]), {**SOURCE, **other, **source})
    assert tree(tmp_path) == before


def test_a_run_without_a_finished_stage_takes_other_settings(tmp_path: Path) -> None:
    RunDirectory.claim(tmp_path, Config(seed=1), SOURCE).close()
    (tmp_path / "notes.txt").write_text("of the user")
    other = {**SOURCE, "fingerprint": "def"}
    RunDirectory.claim(tmp_path, Config(seed=2), other).close()
    run = RunDirectory.open(tmp_path)
    assert (run.config.seed, run.source) == (2, other)
    assert (tmp_path / "notes.txt").exists()
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(RunError, match="other settings"):
        RunDirectory.claim(tmp_path, Config(seed=3), SOURCE)


def test_the_home_directory_may_be_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    RunDirectory.claim("~/out", Config(), SOURCE).close()
    assert RunDirectory.open("~/out").path == tmp_path / "home" / "out"
    assert not (tmp_path / "~").exists()
    with pytest.raises(RunError, match="~nobody-of-this-name/out names a home directory that is not known"):
        RunDirectory.claim("~nobody-of-this-name/out", Config(), SOURCE)


def test_overwrite_replaces_a_run_of_ours(tmp_path: Path) -> None:
    with RunDirectory.claim(tmp_path, Config(), SOURCE) as run:
        fill(run)
        run.finish_run({})
    with RunDirectory.claim(tmp_path, Config(seed=1), SOURCE, overwrite=True) as run:
        assert run.config.seed == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_ours_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("also")
    before = tree(tmp_path)
    with pytest.raises(RunError, match=r"thesis is not a run .* it has chapter\.tex\. Choose another output"):
        RunDirectory.claim(tmp_path / "thesis", Config(), SOURCE, overwrite=overwrite)
    with pytest.raises(RunError, match=r"below cannot be written .*Choose another output directory"):
        RunDirectory.claim(tmp_path / "file" / "below", Config(), SOURCE, overwrite=overwrite)
    with pytest.raises(RunError, match="file is a file, not a directory"):
        RunDirectory.claim(tmp_path / "file", Config(), SOURCE, overwrite=overwrite)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"project": "of another program"}', "\x00"])
def test_a_run_json_that_is_not_ours_is_refused(tmp_path: Path, content: str, overwrite: bool) -> None:
    (tmp_path / "run.json").write_text(content)
    (tmp_path / "data.bin").write_text("keep")
    with pytest.raises(RunError, match=r"run\.json is damaged or not from schelix .*nothing here was changed"):
        RunDirectory.claim(tmp_path, Config(), SOURCE, overwrite=overwrite)
    assert (tmp_path / "data.bin").read_text() == "keep"
    with pytest.raises(RunError, match=r"run\.json is damaged or not from schelix"):
        RunDirectory.open(tmp_path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    RunDirectory.claim(tmp_path, Config(), SOURCE).close()
    header = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**header, "format": 2}))
    with pytest.raises(RunError, match="has format 2, this version of schelix reads 1"):
        RunDirectory.claim(tmp_path, Config(), SOURCE)
    (tmp_path / "run.json").write_text(json.dumps({**header, "config": {"warp": 9}}))
    with pytest.raises(RunError, match=r"(?s)unknown to .*warp.*Install that version"):
        RunDirectory.open(tmp_path)


def test_open_wants_a_run_and_a_finished_one_if_asked(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nowhere is not a run: it has no run\.json"):
        RunDirectory.open(tmp_path / "nowhere")
    RunDirectory.claim(tmp_path, Config(seed=5), SOURCE).close()
    run = RunDirectory.open(tmp_path)
    assert (run.config, run.source) == (Config(seed=5), SOURCE)
    with pytest.raises(RunError, match="open for reading"):
        run.begin("genes")
    with pytest.raises(RunError, match=r"is not finished: it has no manifest\.json"):
        RunDirectory.open(tmp_path, finished=True)


def test_two_processes_do_not_fill_the_same_run(tmp_path: Path) -> None:
    code = "RunDirectory.claim(sys.argv[1], Config(), SOURCE)"
    with RunDirectory.claim(tmp_path, Config(), SOURCE):
        second = child(code, tmp_path)
        assert f"RunError: another process is filling the run {tmp_path} (process {os.getpid()} on" in second.stderr
        with pytest.raises(RunError, match="another process is filling the run"):
            RunDirectory.open(tmp_path, writable=True)
        RunDirectory.open(tmp_path)  # reading needs no lock
    assert child(code, tmp_path).returncode == 0


def test_a_refused_claim_keeps_no_lock(tmp_path: Path) -> None:
    with RunDirectory.claim(tmp_path, Config(), SOURCE) as run:
        fill(run)
    with pytest.raises(RunError, match="other settings"):
        RunDirectory.claim(tmp_path, Config(seed=1), SOURCE)
    RunDirectory.claim(tmp_path, Config(), SOURCE).close()


@pytest.fixture
def run(tmp_path: Path) -> Any:
    with RunDirectory.claim(tmp_path / "run", Config(), SOURCE) as run:
        yield run


def test_fingerprints_depend_on_everything_that_is_named(run: RunDirectory) -> None:
    fill(run, "genes")
    base = run.fingerprint("graph", 1, {"k": 30, "theta": 1.0}, ["genes"])
    assert base == run.fingerprint("graph", 1, {"theta": np.float64(1.0), "k": np.int32(30)}, ["genes"])
    others = [
        run.fingerprint("graphs", 1, {"k": 30, "theta": 1.0}, ["genes"]),
        run.fingerprint("graph", 2, {"k": 30, "theta": 1.0}, ["genes"]),
        run.fingerprint("graph", 1, {"k": 31, "theta": 1.0}, ["genes"]),
        run.fingerprint("graph", 1, {"k": 30, "theta": 1.0}, []),
    ]
    fill(run, "genes", b"other genes")
    others.append(run.fingerprint("graph", 1, {"k": 30, "theta": 1.0}, ["genes"]))
    assert len({base, *others}) == 6
    with pytest.raises(RunError, match="has no finished stage 'features'"):
        run.fingerprint("graph", 1, {}, ["features"])
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        run.fingerprint("graph", 1, {"f": object()})


def test_a_stage_follows_what_its_predecessors_made(run: RunDirectory) -> None:
    def after_genes(*contents: tuple[str, bytes]) -> str:
        for name, content in contents:
            with run.publish(name) as path:
                path.write_bytes(content)
        run.finish("genes", "same inputs", [name for name, _ in contents], 0.0)
        return run.fingerprint("graph", 1, {}, ["genes"])

    first = after_genes(("a.bin", b"1"), ("b.bin", b"2"))
    assert after_genes(("b.bin", b"2"), ("a.bin", b"1")) == first
    assert after_genes(("a.bin", b"3"), ("b.bin", b"2")) != first
    sha = hashlib.sha256(b"1").hexdigest()
    expected = f'["graph",1,{{}},[["same inputs",[["a.bin","{sha}"]]]]]'
    assert after_genes(("a.bin", b"1")) == hashlib.sha256(expected.encode()).hexdigest()


def test_fingerprint_is_the_sha256_of_canonical_json(run: RunDirectory) -> None:
    expected = hashlib.sha256(b'["graph",3,{"a":[1,2],"b":"x"},[]]').hexdigest()
    assert run.fingerprint("graph", 3, {"b": "x", "a": (1, 2)}) == expected


def test_a_finished_stage_is_done_with_its_fingerprint_only(run: RunDirectory) -> None:
    done = fill(run)
    assert run.is_done("genes", done)
    assert not run.is_done("genes", "another")
    assert not run.is_done("graph", done)
    record = run.record("genes")
    expected = ("genes.bin", 10, 1, hashlib.sha256(b"0123456789").hexdigest())
    artifact = record.artifacts[0]
    assert (artifact.path, artifact.bytes, artifact.files, artifact.sha256) == expected
    assert (record.stage, record.fingerprint, record.seconds, record.details) == ("genes", done, 1.5, {"n": 10})


def test_a_stage_whose_artifact_is_lost_or_cut_is_not_done(run: RunDirectory) -> None:
    done = fill(run)
    os.truncate(run.path / "genes.bin", 9)
    assert not run.is_done("genes", done)
    (run.path / "genes.bin").unlink()
    assert not run.is_done("genes", done)


def test_a_damaged_record_is_not_done(run: RunDirectory) -> None:
    done = fill(run)
    (run.path / "stages" / "genes.json").write_text('{"stage": "genes"}')
    assert not run.is_done("genes", done)
    with pytest.raises(RunError, match=r"genes\.json is not a stage record .*Delete it"):
        run.record("genes")


def test_begin_makes_the_run_unfinished_and_sweeps(run: RunDirectory) -> None:
    done = fill(run)
    run.finish_run({})
    (run.path / "features").mkdir()
    (run.path / "features" / "anchor.partial.npy").write_bytes(b"left")
    (run.path / "embedding.partial.zarr" / "obsm").mkdir(parents=True)
    (run.path / "embedding.zarr").mkdir()
    (run.path / "embedding.zarr.old.partial").mkdir()
    (run.path / "partial.txt").write_text("not a leftover")
    run.begin("graph")
    names = {path.relative_to(run.path).as_posix() for path in run.path.rglob("*")}
    assert names == {
        ".lock",
        "run.json",
        "stages",
        "stages/genes.json",
        "features",
        "genes.bin",
        "partial.txt",
        "embedding.zarr",
    }
    assert run.is_done("genes", done)


def test_invalidate_forgets_a_stage(run: RunDirectory) -> None:
    done = fill(run)
    run.finish_run({})
    run.invalidate("genes")
    assert not run.is_done("genes", done)
    with pytest.raises(RunError, match="is not finished"):
        Run.open(run.path)


def test_finish_needs_the_artifacts(run: RunDirectory) -> None:
    with pytest.raises(RunError, match="stage genes made no nothing"):
        run.finish("genes", "f", ["nothing.npy"], 1.0)
    with pytest.raises(ValueError, match="is not inside the run"):
        run.finish("genes", "f", ["../x"], 1.0)
    with pytest.raises(ValueError, match="is not inside the run"):
        run.publish("/tmp/x")
    with pytest.raises(ValueError, match="cannot name a stage"):
        run.begin("../genes")
