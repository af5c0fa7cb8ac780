"""Runs with labels of some cells: what they improve, what they leave alone, what is refused."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from schelix_scale import integrate
from schelix_scale.config_io import load_config
from schelix_scale.errors import ConfigError, DataError
from schelix_scale.inspection import inspect_source
from schelix_scale.progress import QuietReporter
from schelix_scale.run import Run
from tests.small_runs import SMALL
from tests.synthetic import make_cells

SETTINGS = {**SMALL, "train.refine_steps": 60, "train.learning_rate": 0.005}


@pytest.fixture(scope="module")
def adata() -> anndata.AnnData:
    """Cells of two types, each of two kinds that lie apart, in three batches; the type of a third of them is known."""
    cells = make_cells(n_types=4, n_batches=3, per_group=40, seed=3)
    made = anndata.AnnData(cells.counts_ng.astype(np.float32))
    made.obs["batch"] = cells.batch_n.astype(str)
    made.obs["type"] = [f"t{code // 2}" for code in cells.type_n]
    known = np.random.default_rng(1).random(made.n_obs) < 0.33
    made.obs["part"] = np.where(known, made.obs["type"], "Unknown")
    return made


def run(source: anndata.AnnData, out: Path, reporter: QuietReporter | None = None, **settings: object) -> Run:
    reporter = reporter or QuietReporter()
    return integrate(source, batch_key="batch", out=out, reporter=reporter, **{**SETTINGS, **settings})


def test_labels_of_some_improve_the_others(adata: anndata.AnnData, tmp_path: Path) -> None:
    """Of the cells whose label was not told, by scikit-learn's silhouette of their true types."""
    reporter = QuietReporter()
    without = run(adata, tmp_path / "without").embedding
    told = run(adata, tmp_path / "with", reporter, label_key="part")
    others = (adata.obs["part"] == "Unknown").to_numpy()
    types = adata.obs["type"][others]
    assert silhouette_score(told.embedding[others], types) > silhouette_score(without[others], types) + 0.05
    known = int((~others).sum())
    assert f"labels of {known} of {adata.n_obs} cells are known (2 types)" in reporter.messages
    assert told.manifest["summary"]["choices"]["labelled_cells"] == known
    again = run(adata, tmp_path / "again", label_key="part").embedding
    np.testing.assert_array_equal(again, told.embedding)


@pytest.mark.slow
def test_without_label_key_no_label_matters(adata: anndata.AnnData, tmp_path: Path) -> None:
    shuffled = adata.copy()
    shuffled.obs["part"] = np.random.default_rng(0).permutation(adata.obs["part"])
    embeddings = [run(cells, tmp_path / str(i)).embedding for i, cells in enumerate((adata, shuffled))]
    np.testing.assert_array_equal(*embeddings)


@pytest.mark.slow  # among the longest of the suite
def test_changed_labels_are_used_and_carried(adata: anndata.AnnData, tmp_path: Path) -> None:
    first = run(adata, tmp_path / "run", label_key="part").embedding
    changed = adata.copy()
    changed.obs["part"] = np.where(adata.obs["part"] == "Unknown", adata.obs["type"], "unknown")
    second = run(changed, tmp_path / "run", label_key="part")
    assert not np.array_equal(second.embedding, first)
    assert second.to_anndata().obs["part"].tolist() == changed.obs["part"].tolist()


@pytest.mark.slow  # among the longest of the suite
def test_changed_obs_of_the_same_cells_is_carried(adata: anndata.AnnData, tmp_path: Path) -> None:
    first = run(adata, tmp_path / "run").embedding[:]
    changed = adata.copy()
    changed.obs["note"] = [f"note {i % 3}" for i in range(changed.n_obs)]
    second = run(changed, tmp_path / "run")
    np.testing.assert_array_equal(second.embedding[:], first)
    assert second.to_anndata().obs["note"].tolist() == changed.obs["note"].tolist()


@pytest.mark.parametrize(
    "settings", [{"strength": 0.0}, {"train.enabled": False}, {"train.pull": 0.0}, {"train.label_share": 0.0}]
)
def test_labels_that_could_play_no_part(adata: anndata.AnnData, tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"data\.label_key: labels play their part in training"):
        run(adata, tmp_path / "run", label_key="part", **settings)
    assert not (tmp_path / "run").exists()


def test_two_label_keys(adata: anndata.AnnData, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"label_key is 'part' and data\.label_key 'type'. Give one"):
        run(adata, tmp_path / "run", label_key="part", **{"data.label_key": "type"})


def test_inspect_finds_what_integrate_would_refuse(adata: anndata.AnnData, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no obs column 'kind'") as refused:
        run(adata, tmp_path / "run", label_key="kind")
    found = inspect_source(adata, "batch", load_config(overrides=["data.label_key=kind"]))
    assert str(refused.value) in found.problems
