"""The refresh with its cache on disk: a new version is the blend of old and new graph, or nothing changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from schelix_scale.config import GraphConfig, TrainConfig
from schelix_scale.graph.cache import OperatorCache
from schelix_scale.model.streams import DualStream
from schelix_scale.progress import QuietReporter
from schelix_scale.training.data import CachedFeatures
from schelix_scale.training.loop import Training, build_model, train
from schelix_scale.training.refresh import Refresh, open_features
from tests.graph.test_diffusion import recursion
from tests.graph.test_operator import dense
from tests.training.tools import CONFIG, Counting, Interrupted, N, same_weights, stream_inputs

GRAPH = GraphConfig(k=8, method="exact", theta=1.0, kernel_neighbor=7, restart=0.3, hops=(0, 1, 3), audit_cells=50)


def cache_in(root: Path) -> tuple[OperatorCache, CachedFeatures]:
    anchor, variant, batch_n = stream_inputs(0)
    streams = {"anchor": anchor.astype(np.float32), "variant": variant.astype(np.float32)}
    cache = OperatorCache(root, streams, batch_n, GRAPH, 1.0)
    if not cache.has("first"):
        neighbors, audit = cache.find(streams["anchor"], 0, 1)
        cache.publish("first", cache.operator(neighbors), audit)
    return cache, open_features(cache, "first")


def refresh_of(cache: OperatorCache, **changed: object) -> Refresh:
    settings = {"refresh": True, "refresh_blend": 0.5, "refresh_jaccard": 0.9, **changed}
    config = TrainConfig(**{**CONFIG.model_dump(), **settings})
    return Refresh(cache, config, "abc", 0, 1, torch.device("cpu"), QuietReporter())


def shuffling(features: CachedFeatures) -> DualStream:
    """A model whose Anchor latent is far from its backbone, so that its neighbours are others."""
    model = build_model(features, CONFIG.model_copy(update={"anchor_residual": 1.0}), 0)
    with torch.no_grad():
        model.anchor_encoder[-1].weight.mul_(1e3)
    return model


def test_new_version_is_blended_and_diffused(tmp_path: Path) -> None:
    cache, first = cache_in(tmp_path)
    model = shuffling(first)
    found = refresh_of(cache, refresh_blend=0.25)(first, model)
    assert found.operator_id != "first"
    cells = first.cells(np.arange(N), torch.device("cpu"))
    with torch.no_grad():
        latent = model(cells.anchor, cells.variant).anchor.numpy()
    neighbors, _ = cache.find(latent, 0, 1)
    average = 0.75 * dense(first.operator) + 0.25 * dense(cache.operator(neighbors))
    expected = np.zeros_like(average)
    for row, weights in enumerate(average):
        heaviest = np.argsort(-weights)[:8]
        expected[row, heaviest] = weights[heaviest] / weights[heaviest].sum()
    np.testing.assert_allclose(dense(found.operator), expected, atol=1e-5)
    for diffused, stream in ((found.anchor_nta, "anchor"), (found.variant_ntv, "variant")):
        scales = recursion(found.operator, cache.features[stream], 0.3, 3)
        np.testing.assert_allclose(diffused, np.stack([scales[t] for t in (0, 1, 3)], axis=1), atol=1e-4)
        assert not diffused.flags.writeable
    again = open_features(cache_in(tmp_path)[0], found.operator_id)
    np.testing.assert_array_equal(again.anchor_nta, found.anchor_nta)


def test_another_latent_is_another_version(tmp_path: Path) -> None:
    """Of the same training and parent; a search that was interrupted with one latent does not answer for another."""
    cache, first = cache_in(tmp_path)
    model = shuffling(first)
    one = refresh_of(cache)(first, model)
    with torch.no_grad():
        model.anchor_encoder[-1].weight.mul_(-1)
    two = refresh_of(cache)(first, model)
    assert len({"first", one.operator_id, two.operator_id}) == 3
    assert not np.array_equal(one.operator.indices_nk, two.operator.indices_nk)
    assert refresh_of(cache)(first, model).operator_id == two.operator_id
    assert {path.name for path in (tmp_path / "graph").iterdir()} == {"first", one.operator_id, two.operator_id}


@pytest.mark.parametrize("changed", [{"refresh": False}, {"refresh_jaccard": 0.0}])
def test_nothing_changes(tmp_path: Path, changed: dict[str, object]) -> None:
    """Switched off, or because any overlap of neighbours above 0 counts as the same graph."""
    cache, first = cache_in(tmp_path)
    before = {path.name for path in (tmp_path / "graph").iterdir()}
    assert refresh_of(cache, **changed)(first, build_model(first, CONFIG, 0)) is first
    assert {path.name for path in (tmp_path / "graph").iterdir()} == before


@pytest.mark.parametrize("lost", ["nothing", "diffused"])
def test_interrupted_after_the_refresh(tmp_path: Path, lost: str) -> None:
    """The version is there, or only its graph, and no checkpoint knows of it: the same model comes out."""

    def training(root: Path, stop: bool) -> tuple[Training, CachedFeatures, OperatorCache]:
        cache, first = cache_in(root)
        refresh = refresh_of(cache, refresh_jaccard=1.0)

        def interrupted(features: CachedFeatures, model: DualStream) -> CachedFeatures:
            found = refresh(features, model)
            if stop:
                raise Interrupted("killed")
            return found

        reopen = lambda name: open_features(cache, name)  # noqa: E731
        work = Training(CONFIG, 0, torch.device("cpu"), root / "checkpoints", "abc", interrupted, reopen)
        return work, first, cache

    work, first, _ = training(tmp_path / "whole", False)
    expected, features = train(work, first, Counting())
    assert features.operator_id != "first"
    work, first, cache = training(tmp_path / "cut", True)
    with pytest.raises(Interrupted, match="killed"):
        train(work, first, Counting())
    if lost == "diffused":
        for file in (tmp_path / "cut" / "diffused" / features.operator_id).iterdir():
            file.unlink()
        (tmp_path / "cut" / "diffused" / features.operator_id).rmdir()
        assert not cache.has(features.operator_id)
    work, first, _ = training(tmp_path / "cut", False)
    model, last = train(work, first, Counting())
    assert last.operator_id == features.operator_id
    assert same_weights(model, expected)
