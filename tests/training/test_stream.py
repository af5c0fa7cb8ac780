"""Training on expression read from the store: the same as on the cache while the first layers are frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

from schelix_scale.config import FeaturesConfig
from schelix_scale.errors import StoreError
from schelix_scale.features.streams import Streams, fit_streams
from schelix_scale.genes.normalize import log_normalize
from schelix_scale.model.loadings import Loadings, Values
from schelix_scale.model.streams import DualStream
from schelix_scale.stores.anndata import AnnDataStore
from schelix_scale.training.data import CachedFeatures
from schelix_scale.training.expression import Expression
from schelix_scale.training.loader import Shuffle
from schelix_scale.training.loop import Training, build_model, split_rows, train
from schelix_scale.training.refresh import encode
from tests.counting import CountingStore
from tests.features.test_streams import split
from tests.synthetic import Synthetic, make_cells
from tests.training.tools import CONFIG, Cache, Counting, Interrupted, diffused, logged, neighbours, same_weights

SHUFFLE = Shuffle(16, 96)
SMALL = CONFIG.model_copy(update={"refresh": False})
CPU = torch.device("cpu")


class Stage:
    """Cells on disk, what the sketch gave (all cells are in it), and the cache made of its features."""

    def __init__(self, folder: Path, strength: float = 1.0, single_stream: bool = False) -> None:
        self.cells: Synthetic = make_cells(n_types=3, n_batches=3, per_group=27, n_genes=90, seed=2)
        path = folder / "cells.h5ad"
        anndata.AnnData(sparse.csr_matrix(self.cells.counts_ng.astype(np.float32))).write_h5ad(path)
        self.store = AnnDataStore(path)
        batch_n = self.cells.batch_n
        features = FeaturesConfig(anchor_dims=6, variant_dims=5)
        self.streams: Streams = fit_streams(
            self.cells.log_csr, batch_n, 3, split(self.cells, single_stream), features, 0, 1, strength
        )
        found = self.streams.encode(self.cells.log_csr, batch_n)
        operator = neighbours(found.anchor_corrected)
        hops = (diffused(operator, found.anchor_corrected), diffused(operator, found.variant))
        self.features = CachedFeatures("first", operator, *hops, batch_n)

    def expression(self, learned: bool = False, store: CountingStore | None = None) -> Expression:
        return Expression(store or self.store, "counts", self.streams, self.features.batch_n, None, SHUFFLE, learned)

    def training(self, folder: Path, expression: Expression | None, **changed: object) -> Training:
        cache = Cache(self.features)
        keep: Callable[[CachedFeatures, DualStream], CachedFeatures] = lambda features, _: features  # noqa: E731
        config = SMALL.model_copy(update=changed)
        return Training(config, 0, CPU, folder, "abc", keep, cache.reopen, None, expression, SHUFFLE)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


def losses(folder: Path) -> list[tuple[object, object, float]]:
    entries = [entry for entry in logged(folder) if entry["event"] == "evaluate"]
    return [(entry["phase"], entry["step"], float(str(entry["validation_loss"]))) for entry in entries]


def compare(one: DualStream, other: DualStream, tolerance: float = 1e-5) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("strength", "single_stream"), [(1.0, False), (0.5, False), (1.0, True)])
def test_stream_and_cache_give_the_same(tmp_path: Path, strength: float, single_stream: bool) -> None:
    """Same order of cells: losses and weights are the same, whichever way hop 0 is read."""
    stage = Stage(tmp_path, strength, single_stream)
    start = build_model(stage.features, SMALL, 0)
    cached, _ = train(stage.training(tmp_path / "cache", None), stage.features, Counting())
    spoiled = [hops.copy() for hops in (stage.features.anchor_nta, stage.features.variant_ntv)]
    rows_read = CountingStore(stage.store)
    streamed, _ = train(
        stage.training(tmp_path / "stream", stage.expression(store=rows_read)), stage.features, Counting()
    )
    compare(cached, streamed)
    assert not same_weights(cached, start)
    found, expected = losses(tmp_path / "stream"), losses(tmp_path / "cache")
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    np.testing.assert_allclose([entry[2] for entry in found], [entry[2] for entry in expected], rtol=1e-5)
    for before, after in zip(spoiled, (stage.features.anchor_nta, stage.features.variant_ntv), strict=True):
        np.testing.assert_array_equal(before, after)
    rows_train, rows_valid = split_rows(stage.features.n_cells, 0)
    assert set(rows_read.reads[rows_valid]) == {1}, "held-out cells are read once"
    assert rows_read.reads[rows_train].min() >= 1
    assert rows_read.largest <= SHUFFLE.buffer


def test_hop_0_is_read_from_the_store(stage: Stage, tmp_path: Path) -> None:
    """With hop 0 of the cache shifted for own cells, only training on the cache sees it."""
    rows = np.array([5, 3, 200])
    features = replace(stage.features, anchor_nta=stage.features.anchor_nta + np.array([7, 0, 0])[:, None])
    expressed = stage.expression().read(rows)
    cells = features.cells(rows, CPU, expressed)
    np.testing.assert_allclose(cells.anchor.numpy(), stage.features.anchor_nta[rows], atol=1e-4)
    np.testing.assert_allclose(cells.variant.numpy(), stage.features.variant_ntv[rows], atol=1e-4)
    assert cells.values is None


def test_each_row_once_an_epoch(stage: Stage) -> None:
    rows = np.flatnonzero(np.arange(stage.store.n_cells) % 5)
    training = stage.training(Path("none"), stage.expression())
    plan = training.plan(len(rows), 40, 1)
    epoch = list(stage.expression().steps(rows, 40, (0, 1), plan.steps_per_epoch, 2 * plan.steps_per_epoch))
    assert sorted(np.concatenate([found for found, _ in epoch])) == rows.tolist()
    for step, (found, expressed) in enumerate(epoch, plan.steps_per_epoch):
        np.testing.assert_array_equal(found, rows[plan.rows(step)])
        np.testing.assert_allclose(expressed.anchor, stage.features.anchor_nta[found, 0], atol=1e-4)


def test_learned_loadings_learn(stage: Stage, tmp_path: Path) -> None:
    """The change starts at 0 and both streams' loadings change, less than what follows them."""
    expression = stage.expression(learned=True)
    start = build_model(stage.features, SMALL, 0, expression)
    assert same_weights_but_loadings(start, build_model(stage.features, SMALL, 0))
    assert start.loadings is not None
    assert not start.loadings.anchor.any()
    assert not start.loadings.variant.any()
    training = stage.training(tmp_path, expression, loadings="learned", learning_rate=0.01, refine_steps=90)
    model, _ = train(training, stage.features, Counting())
    assert model.loadings is not None
    for change, projection in (
        (model.loadings.anchor, stage.streams.anchor),
        (model.loadings.variant, stage.streams.variant),
    ):
        assert projection is not None
        assert change.shape == projection.loadings_hd.shape
        assert 1e-5 < float(change.detach().abs().max()) < 0.1


def test_align_learns_the_loadings_of_the_variants(stage: Stage, tmp_path: Path) -> None:
    """Anchors, which Align does not move, keep theirs through the one step of Refine's warm-up."""
    changed = {"loadings": "learned", "learning_rate": 0.01, "align_steps": 40, "refine_steps": 1}
    training = stage.training(tmp_path, stage.expression(learned=True), **changed)
    model, _ = train(training, stage.features, Counting())
    assert model.loadings is not None
    assert float(model.loadings.variant.detach().abs().max()) > 2e-3
    assert float(model.loadings.anchor.detach().abs().max()) < 1.1e-3


def same_weights_but_loadings(one: DualStream, other: DualStream) -> bool:
    a, b = ({k: v for k, v in m.state_dict().items() if "loadings" not in k} for m in (one, other))
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_learned_loadings_are_the_sum_of_start_and_change(stage: Stage) -> None:
    """Encoded latents equal those of a dense computation with changed loadings, offset and displacement as fitted."""
    expression, rng = stage.expression(learned=True), np.random.default_rng(1)
    model = build_model(stage.features, SMALL, 0, expression).eval()
    assert model.loadings is not None
    assert stage.streams.variant is not None
    with torch.no_grad():
        model.anchor_encoder[-1].weight.mul_(30)
    hops = [stage.features.anchor_nta.copy(), stage.features.variant_ntv.copy()]
    log_ng = log_normalize(sparse.csr_matrix(stage.cells.counts_ng), "counts").toarray()
    for change, part, hop in zip(
        (model.loadings.anchor, model.loadings.variant),
        (stage.streams.anchor, stage.streams.variant),
        hops,
        strict=True,
    ):
        moved = rng.normal(size=change.shape) * 0.02
        with torch.no_grad():
            change.copy_(torch.from_numpy(moved))
        hop[:, 0] += np.minimum(log_ng[:, part.genes], part.cap) @ moved
    with torch.no_grad():
        expected = model(*(torch.from_numpy(hop[10:150]) for hop in hops))
        without = model(
            *(torch.from_numpy(hop[10:150]) for hop in (stage.features.anchor_nta, stage.features.variant_ntv))
        )
    found = encode(model, stage.features, 10, 150, CPU, expression)
    for name in ("anchor", "variant", "fused"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-3)
        assert (getattr(without, name) - getattr(expected, name)).abs().max() > 0.01
    torch.testing.assert_close(found.backbone, without.backbone)


def test_gradients_of_the_first_layer_are_those_of_a_dense_product() -> None:
    rng = np.random.default_rng(0)
    dense = rng.poisson(0.5, (9, 7)).astype(np.float32)
    dense[3] = 0
    x = sparse.csr_matrix(dense)
    values = Values(*(torch.from_numpy(part) for part in (x.data, x.indices.astype(int), x.indptr[:-1].astype(int))))
    layer, goal = Loadings((7, 4), (0, 0)), torch.from_numpy(rng.normal(size=(9, 4)).astype(np.float32))
    moved, none = layer(values, None)
    torch.autograd.backward(((moved - goal) ** 2).sum())
    assert none.shape == (9, 0)
    assert layer.anchor.grad is not None
    np.testing.assert_allclose(layer.anchor.grad.numpy(), dense.T @ (-2 * goal.numpy()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("stops", [(1,), (8,), (13, 9), (24,), (31,)])
def test_interrupted_and_resumed(stage: Stage, tmp_path: Path, learned: bool, stops: tuple[int, ...]) -> None:
    changed = {"input": "stream", "loadings": "learned" if learned else "frozen"}
    expected, _ = train(
        stage.training(tmp_path / "whole", stage.expression(learned), **changed), stage.features, Counting()
    )
    training = stage.training(tmp_path / "cut", stage.expression(learned), **changed)
    for stop in stops:

        def interrupt(step: int, stop: int = stop) -> None:
            if step == stop:
                raise Interrupted("killed")

        with pytest.raises(Interrupted, match="killed"):
            train(training, stage.features, Counting(interrupt))
    model, _ = train(training, stage.features, Counting())
    compare(expected, model)
    assert losses(tmp_path / "cut")[-1][2] == pytest.approx(losses(tmp_path / "whole")[-1][2], rel=1e-5)


def test_a_store_that_fails_stops_the_training(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    (tmp_path / "cells.h5ad").unlink()
    with pytest.raises(StoreError, match=r"cells\.h5ad"):
        train(stage.training(tmp_path / "run", stage.expression()), stage.features, Counting())
