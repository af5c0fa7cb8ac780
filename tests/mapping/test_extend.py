from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from sklearn.neighbors import NearestNeighbors
from typer.testing import CliRunner

from schelix_scale import Reference, Run, extend
from schelix_scale.cli import app
from schelix_scale.continuing import continue_run
from schelix_scale.errors import ConfigError, RunError, TrainingError
from schelix_scale.extending import stages
from schelix_scale.progress import QuietReporter
from schelix_scale.recorded import RecordedStore
from schelix_scale.run import RunDirectory
from schelix_scale.training.warm import keep_weights
from tests.mapping.conftest import Atlas
from tests.run_tools import tree


@pytest.fixture(scope="module")
def query_file(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("query") / "new.h5ad"
    atlas.query.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def extended(atlas: Atlas, query_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("extended") / "run2"
    before = tree(atlas.run)
    run = extend(atlas.run, query_file, batch_key="batch", out=out, reporter=QuietReporter())
    assert tree(atlas.run) == before
    return run


def operator(run: Run) -> tuple[np.ndarray, np.ndarray, Path]:
    name = run.manifest["stages"]["graph"]["details"]["operator_id"]
    folder = run.path / "graph" / name
    return np.load(folder / "indices.npy"), np.load(folder / "weights.npy"), run.path / "diffused" / name


def test_the_new_version_is_a_run(extended: Run, atlas: Atlas) -> None:
    n, m = atlas.reference.n_obs, atlas.query.n_obs
    assert extended.verify() == []
    assert not (extended.path / "extension").exists()
    assert len(extended.embedding) == len(extended.cells) == n + m
    assert extended.cells["batch"].astype(str).tolist() == [*atlas.reference.obs["batch"], *atlas.query.obs["batch"]]
    assert extended.cells.index.tolist() == [*atlas.reference.obs_names, *atlas.query.obs_names]
    adata = extended.to_anndata()
    assert adata.obs["cell_type"].astype(str).tolist()[n:] == atlas.query.obs["cell_type"].tolist()
    summary, source = extended.manifest["summary"], extended.manifest["source"]
    assert (summary["version"], summary["cells"], summary["batches"]) == (2, n + m, 4)
    audit = extended.manifest["stages"]["graph"]["details"]["extensions"][-1]
    assert audit["low"] < audit["recall"] <= audit["high"]  # also where all were found
    assert [link["path"] for link in source["extends"]] == [str(atlas.run.resolve())]
    assert [part["cells"] for part in source["parts"]] == [n, m]


def test_rows_of_the_run_are_as_they_were(extended: Run, atlas: Atlas) -> None:
    old, n = Run.open(atlas.run), atlas.reference.n_obs
    np.testing.assert_array_equal(extended.embedding[:n], old.embedding)
    for new, kept in zip(operator(extended)[:2], operator(old)[:2], strict=True):
        np.testing.assert_array_equal(new[:n], kept)
    for name in ("anchor", "anchor_corrected", "variant"):
        new, kept = (np.load(run.path / "features" / f"{name}.npy") for run in (extended, old))
        np.testing.assert_array_equal(new[:n], kept)
    for name in ("anchor", "variant"):
        new, kept = (np.load(operator(run)[2] / f"{name}.npy") for run in (extended, old))
        np.testing.assert_array_equal(new[:n], kept)


def test_the_cells_are_read_once_for_all_stages(
    atlas: Atlas, query_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def count(directory: RunDirectory) -> RecordedStore:
        opened.append(directory.path)
        return RecordedStore(directory)

    monkeypatch.setattr(stages, "RecordedStore", count)
    extend(atlas.run, query_file, batch_key="batch", out=tmp_path / "run2", reporter=QuietReporter())
    assert opened == [tmp_path / "run2"]


def test_new_rows_are_those_of_a_dense_computation(extended: Run, atlas: Atlas) -> None:
    """scikit-learn's exact neighbours among all cells, and three dense steps of diffusion."""
    n = atlas.reference.n_obs
    indices, weights, diffused = operator(extended)
    anchor = np.load(extended.path / "features" / "anchor_corrected.npy")
    found = NearestNeighbors(n_neighbors=16, metric="cosine", algorithm="brute").fit(anchor).kneighbors(anchor[n:])
    np.testing.assert_array_equal(np.sort(found[1][:, 1:], axis=1), np.sort(indices[n:], axis=1))
    total, k = indices.shape
    dense = sparse.csr_matrix((weights.ravel(), indices.ravel(), np.arange(0, total * k + 1, k))).toarray()
    np.testing.assert_allclose(dense.sum(axis=1), 1, rtol=1e-5)
    current = anchor
    for _ in range(3):
        current = 0.7 * dense @ current + 0.3 * anchor
    np.testing.assert_allclose(np.load(diffused / "anchor.npy")[n:, -1], current[n:], atol=1e-4 * np.abs(anchor).max())


def test_new_cells_lie_among_their_types(extended: Run, atlas: Atlas) -> None:
    n, z = atlas.reference.n_obs, extended.embedding
    types = extended.cells["cell_type"].astype(str).to_numpy()
    near = NearestNeighbors(n_neighbors=11).fit(z).kneighbors(z[n:], return_distance=False)[:, 1:]
    assert (types[near] == types[n:, None]).mean() > 0.95  # those of the type that the run lacked, too


def test_later_stages_take_it_for_done(extended: Run) -> None:
    reporter = QuietReporter()
    assert continue_run(extended.path, "train", then=["embed"], reporter=reporter) is not None
    done = [text.partition(":")[0] for text in reporter.messages if "done before" in text]
    assert done == ["features", "graph", "train", "embed"]


@pytest.mark.slow  # among the longest of the suite
def test_ten_extensions_in_a_row(atlas: Atlas, tmp_path: Path) -> None:
    run, query = atlas.run, atlas.query
    for version in range(10):
        part = query[version::10].copy()
        new = extend(run, part, batch_key="batch", out=tmp_path / f"v{version}", reporter=QuietReporter())
        assert new.manifest["summary"]["extension"]["recall"] > 0.99
        run = new.path
    last, n = Run.open(run), atlas.reference.n_obs
    assert last.verify() == []
    assert (last.manifest["summary"]["version"], len(last.embedding)) == (11, n + query.n_obs)
    assert len(last.manifest["source"]["extends"]) == 10
    np.testing.assert_array_equal(last.embedding[:n], Run.open(atlas.run).embedding)
    assert sorted(last.cells["batch"].astype(str).unique())[3:6] == ["b3", "b3 (version 10)", "b3 (version 11)"]
    types, z = last.cells["cell_type"].astype(str).to_numpy(), last.embedding
    near = NearestNeighbors(n_neighbors=6).fit(z).kneighbors(z[n:], return_distance=False)[:, 1:]
    assert (types[near] == types[n:, None]).mean() > 0.9
    audits = json.loads(next((run / "graph").glob("*/audit.json")).read_text())["extensions"]
    assert [audit["first_row"] for audit in audits] == [n + 20 * version for version in range(10)]
    mapped = Reference.open(run).map(atlas.known[:40].copy(), batch_key="batch", label_key="cell_type")
    assert (mapped.obs["schelix_cell_type"].to_numpy() == atlas.known.obs["cell_type"].to_numpy()[:40]).mean() > 0.85


KILLED = """
import os, signal, sys
from contextlib import contextmanager
from schelix_scale import extend
from schelix_scale.progress import QuietReporter, Reporter

class Killing(Reporter):
    @contextmanager
    def stage(self, name, total=None, unit="cells"):
        with QuietReporter().stage(name) as stage:
            yield stage
        if name == "extend graph":
            os.kill(os.getpid(), signal.SIGKILL)
    def say(self, message): pass
    def warn(self, message): pass

extend(sys.argv[1], sys.argv[2], batch_key="batch", out=sys.argv[3], reporter=Killing())
"""


def test_a_killed_extension_goes_on(extended: Run, atlas: Atlas, query_file: Path, tmp_path: Path) -> None:
    before, out = tree(atlas.run), tmp_path / "run2"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(atlas.run), str(query_file), str(out)], cwd=root, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert tree(atlas.run) == before
    with pytest.raises(RunError, match="is not finished"):
        Run.open(out)
    reporter = QuietReporter()
    again = extend(atlas.run, query_file, batch_key="batch", out=out, reporter=reporter)
    assert {"project: done before, skipped", "features: done before, skipped"} <= set(reporter.messages)
    assert again.verify() == []
    np.testing.assert_array_equal(again.embedding, extended.embedding)


@pytest.mark.slow  # among the longest of the suite
def test_a_training_goes_on_from_the_weights_of_the_run(extended: Run, atlas: Atlas, tmp_path: Path) -> None:
    out, before = tmp_path / "run2", tree(atlas.run)
    shutil.copytree(extended.path, out)
    few = {"train__align_steps": 1, "train__refine_steps": 1, "train__learning_rate": 1e-9}
    run = continue_run(out, "train", then=["embed"], warm=True, reporter=QuietReporter(), **few)
    assert run is not None
    assert run.verify() == []
    old, spread = extended.embedding, np.linalg.norm(extended.embedding, axis=1).mean()
    assert np.abs(run.embedding - old).max() < 1e-3 * spread  # hardly a step: as it was, new cells too
    anew = continue_run(out, "train", warm=True, reporter=QuietReporter(), train__align_steps=5)
    assert anew is None
    reporter, start = QuietReporter(), out / "start.pt"
    again = {"train__align_steps": 5}
    run = continue_run(out, "train", then=["embed"], warm=True, reporter=reporter, **again)  # as when embed was killed
    assert run is not None
    assert "train: done before, skipped" in reporter.messages
    assert run.verify() == []
    first = start.read_bytes()
    assert continue_run(out, "embed", reporter=QuietReporter()) is not None
    assert start.read_bytes() == first
    other = continue_run(out, "train", reporter=QuietReporter(), train__align_steps=1)  # from the beginning
    assert other is None
    assert not start.exists()
    assert tree(atlas.run) == before
    with pytest.raises(ConfigError, match="only a training"):
        continue_run(out, "embed", warm=True, reporter=QuietReporter())
    with pytest.raises(TrainingError, match="does not fit the model"):
        continue_run(out, "train", warm=True, reporter=QuietReporter(), train__width=16)


def test_a_run_that_was_trained_on_is_not_filled_with_what_the_old_model_makes(
    extended: Run, atlas: Atlas, query_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run2"
    shutil.copytree(extended.path, out)
    with RunDirectory.open(out, writable=True) as directory:
        keep_weights(directory, None)
    shutil.rmtree(out / "embedding.zarr")
    with pytest.raises(RunError, match=r"was trained on after it had been extended\. To finish it run `schelix embed"):
        extend(atlas.run, query_file, batch_key="batch", out=out, reporter=QuietReporter())
    (out / "manifest.json").unlink(missing_ok=True)
    with pytest.raises(RunError) as unfinished:
        Run.open(out)
    for says in (RunDirectory.open(out).verify()[0], str(unfinished.value)):
        assert f"is not finished: it has no manifest.json. Run `schelix embed {out}`, after `schelix train" in says
    assert continue_run(out, "embed", reporter=QuietReporter()) is not None  # no training had begun: the old weights
    np.testing.assert_allclose(Run.open(out).embedding, extended.embedding, atol=1e-5)
    before, after = (run.manifest["summary"] for run in (extended, Run.open(out)))
    for key in ("cells", "batches", "recall"):
        assert after["extension"][key] == before["extension"][key]
    assert after["version"] == 2
    again = CliRunner().invoke(app, ["extend", str(atlas.run), str(query_file), "-b", "batch", "-o", str(out)])
    assert again.exit_code == 0, again.output
    assert "version 2" in again.output


def test_one_cannot_go_on_without_a_training(atlas: Atlas, tmp_path: Path) -> None:
    shutil.copytree(atlas.run, tmp_path / "run")
    for lost in ("manifest.json", "stages/embed.json", "stages/train.json"):
        (tmp_path / "run" / lost).unlink()
    (unfinished,) = RunDirectory.open(tmp_path / "run").verify()
    assert f"or `schelix train {tmp_path / 'run'}` if it was made or changed stage by stage" in unfinished
    done = CliRunner().invoke(app, ["train", str(tmp_path / "run"), "--continue"])
    assert done.exit_code == 1
    assert "has no finished training to continue" in " ".join(done.output.split())
