"""Runs whose training reads expression from the source: what is the same, what is learned, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest

from schelix_scale.config_io import load_config
from schelix_scale.errors import ConfigError
from schelix_scale.pipeline import integrate
from schelix_scale.progress import QuietReporter
from schelix_scale.run import Run

from .counting import CountingStore
from .small_runs import SMALL, make_adata, within_and_between

STREAM = {"train.input": "stream"}
LEARNED = {**STREAM, "train.loadings": "learned"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "cells.h5ad"
    make_adata().write_h5ad(path)
    return path


def run(source: object, out: Path, reporter: QuietReporter | None = None, **settings: object) -> Run:
    given = {"reporter": reporter or QuietReporter(), "embed.streams": True, **SMALL, **settings}
    return integrate(source, batch_key="batch", out=out, **given)


@pytest.fixture(scope="module")
def streamed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(source, tmp_path_factory.mktemp("runs") / "run", **STREAM)


def test_only_training_is_another(source: Path, streamed: Run, tmp_path: Path) -> None:
    """Everything before it is the same to the bit, and the backbone too; the embedding is near that of the cache."""
    cached = run(source, tmp_path / "cache")
    records = cached.manifest["stages"], streamed.manifest["stages"]
    differ = [name for name in records[0] if records[0][name]["fingerprint"] != records[1][name]["fingerprint"]]
    assert differ == ["train", "embed"]
    one, other = cached.to_anndata().obsm, streamed.to_anndata().obsm
    np.testing.assert_array_equal(one["X_schelix_backbone"], other["X_schelix_backbone"])
    assert not np.array_equal(one["X_schelix"], other["X_schelix"])
    types = make_adata().obs["cell_type"].cat.codes.to_numpy()
    kept = [within_and_between(obsm["X_schelix"], types) for obsm in (one, other)]
    assert kept[1] > 0.95 * kept[0]
    assert streamed.verify() == []


def test_same_settings_same_embedding(source: Path, streamed: Run, tmp_path: Path) -> None:
    np.testing.assert_array_equal(run(source, tmp_path / "run", **STREAM).embedding, streamed.embedding)


@pytest.mark.slow
def test_learned_loadings_through_to_the_embedding(source: Path, streamed: Run, tmp_path: Path) -> None:
    """Cells are read once more to be embedded, and only then: frozen loadings embed from the cache."""
    longer = {"train.learning_rate": 0.01, "train.refine_steps": 60}
    learned = run(source, tmp_path / "learned", **LEARNED, **longer)
    frozen = run(source, tmp_path / "frozen", **STREAM, **longer)
    obsm = [result.to_anndata().obsm for result in (learned, frozen)]
    np.testing.assert_array_equal(obsm[0]["X_schelix_backbone"], obsm[1]["X_schelix_backbone"])
    assert np.abs(obsm[0]["X_schelix_variant"] - obsm[1]["X_schelix_variant"]).max() > 1e-3
    reads = {}
    for name in ("learned", "frozen"):
        path = tmp_path / name
        shutil.rmtree(path / "embedding.zarr")
        counting = CountingStore(make_store(source))
        settings = LEARNED if name == "learned" else STREAM
        reporter = QuietReporter()
        again = run(counting, path, reporter, **settings, **longer)
        np.testing.assert_array_equal(again.embedding, obsm[name == "frozen"]["X_schelix"])
        reads[name] = counting.reads
    assert set(reads["learned"]) == {1}
    assert not reads["frozen"].any()


def make_store(path: Path) -> object:
    from schelix_scale.stores import open_store

    return open_store(path)


@pytest.mark.parametrize("settings", [STREAM, LEARNED])
@pytest.mark.parametrize("changed", [{"strength": 0.5}, {"strength": 0}, {"label_key": "cell_type"}])
def test_with_other_settings(
    source: Path, tmp_path: Path, settings: dict[str, object], changed: dict[str, object]
) -> None:
    result = run(source, tmp_path / "run", **settings, **changed)
    assert np.isfinite(result.embedding).all()
    assert result.verify() == []


@pytest.mark.parametrize("settings", [STREAM, LEARNED])
def test_single_stream(tmp_path: Path, settings: dict[str, object]) -> None:
    result = run(make_adata(batch_strength=0.0), tmp_path / "run", **settings)
    assert result.manifest["summary"]["single_stream"]
    assert set(result.to_anndata().obsm) == {"X_schelix", "X_schelix_backbone", "X_schelix_anchor"}


def test_genes_that_some_files_lack(tmp_path: Path) -> None:
    """What was measured is known to the first layers too."""
    adata = make_adata()
    paths = []
    for number in range(3):
        rows = adata.obs["batch"] == f"donor{number}"
        genes = np.delete(np.arange(adata.n_vars), [7 + number, 70 + number])
        paths.append(tmp_path / f"{number}.h5ad")
        adata[rows][:, genes].copy().write_h5ad(paths[-1])
    result = run(paths, tmp_path / "run", **LEARNED, **{"data.genes_join": "union"})
    assert np.isfinite(result.embedding).all()


def test_cells_stored_by_genes_are_warned_of(tmp_path: Path) -> None:
    adata = make_adata()
    adata.X = adata.X.tocsc()
    adata.write_h5ad(tmp_path / "csc.h5ad")
    reporter = QuietReporter()
    run(tmp_path / "csc.h5ad", tmp_path / "run", reporter, **STREAM)
    assert any(m.startswith("warning: ") and "is stored by genes" in m for m in reporter.messages)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.loadings": "learned"}, r"train.*needs expression to learn from; set train\.input"),
        ({**STREAM, "graph.hops": [1, 3]}, r"reads hop 0 of the features, which graph\.hops leaves out"),
        ({**LEARNED, "graph.hops": [0]}, "would move the backbone"),
        ({"train.input": "disk"}, r"train\.input"),
    ],
)
def test_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, settings)


def test_the_backbone_alone_can_be_streamed(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "run", **STREAM, **{"graph.hops": [0]})
    assert isinstance(result.to_anndata(), anndata.AnnData)
