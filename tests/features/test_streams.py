"""Both streams together: what is fitted on a sketch encodes any cell by itself and survives being saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA

from schelix_scale.config import FeaturesConfig
from schelix_scale.features.streams import Streams, fit_streams
from schelix_scale.genes.partition import Partition
from tests.synthetic import Synthetic, make_cells

CONFIG = FeaturesConfig(anchor_dims=7, variant_dims=5, scale_power=1.0)


@pytest.fixture(scope="module")
def cells() -> Synthetic:
    return make_cells(n_types=4, n_batches=3, per_group=30, n_genes=90, seed=8)


def split(cells: Synthetic, single_stream: bool) -> Partition:
    """The planted roles; each tenth gene is not highly variable."""
    role = np.where(cells.sensitive_g & (not single_stream), "variant", "anchor").astype(object)
    role[::10] = "unused"
    return Partition(pd.DataFrame({"role": role}), 0.1, 1.0, single_stream, 1, 0.5)


@pytest.fixture(scope="module")
def streams(cells: Synthetic) -> Streams:
    return fit_streams(cells.log_csr, cells.batch_n, 3, split(cells, False), CONFIG, seed=0, threads=1)


def test_anchor_components_are_those_of_the_anchors(cells: Synthetic, streams: Streams) -> None:
    found = streams.encode(cells.log_csr, cells.batch_n)
    anchors = np.flatnonzero(~cells.sensitive_g & (np.arange(90) % 10 != 0))
    chosen = cells.log_ng[:, anchors]
    chosen = np.minimum(chosen, chosen.mean(axis=0) + 10 * chosen.std(axis=0))
    expected = PCA(7, svd_solver="full").fit_transform((chosen - chosen.mean(axis=0)) / chosen.std(axis=0))
    signs = np.sign((found.anchor * expected).sum(axis=0))
    np.testing.assert_allclose(found.anchor * signs, expected, atol=1e-3)
    assert streams.dims == (7, 5)
    assert (found.anchor.shape[1], found.anchor_corrected.shape[1], found.variant.shape[1]) == (7, 7, 5)


def test_variants_lose_their_batch_shift_too(cells: Synthetic, streams: Streams) -> None:
    """Mean distance of a batch's centre from its type's; the ridge leaves 1 - 1 / 1.2 of a shift, a sixth."""

    def displacement(z_nd: np.ndarray) -> float:
        away = [
            z_nd[(cells.type_n == kind) & (cells.batch_n == batch)].mean(axis=0)
            - z_nd[cells.type_n == kind].mean(axis=0)
            for kind in range(4)
            for batch in range(3)
        ]
        return float(np.linalg.norm(away, axis=1).mean())

    assert streams.variant is not None
    before = streams.variant.apply(cells.log_csr)
    after = streams.encode(cells.log_csr, cells.batch_n).variant
    assert displacement(before) > 3
    assert displacement(after) < 0.25 * displacement(before)


def test_blocks_are_encoded_alike(cells: Synthetic, streams: Streams) -> None:
    together = streams.encode(cells.log_csr, cells.batch_n)
    for rows in (np.arange(50), np.array([300, 7, 7]), np.array([11])):
        block = streams.encode(cells.log_csr[rows], cells.batch_n[rows])
        for name in ("anchor", "anchor_corrected", "variant"):
            np.testing.assert_allclose(getattr(block, name), getattr(together, name)[rows], atol=2e-4, err_msg=name)


@pytest.mark.parametrize("single_stream", [False, True])
def test_saved_and_loaded(cells: Synthetic, single_stream: bool, tmp_path: Path) -> None:
    fitted = fit_streams(cells.log_csr, cells.batch_n, 3, split(cells, single_stream), CONFIG, seed=0, threads=1)
    fitted.save(tmp_path / "streams.npz")
    loaded = Streams.load(tmp_path / "streams.npz")
    one, two = (streams.encode(cells.log_csr, cells.batch_n) for streams in (fitted, loaded))
    for name in ("anchor", "anchor_corrected", "variant"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
        assert getattr(one, name).dtype == np.float32
    if single_stream:
        assert fitted.dims == (7, 0)
        assert one.variant.shape == (len(cells.batch_n), 0)
        np.testing.assert_array_equal(one.anchor_corrected, one.anchor)
