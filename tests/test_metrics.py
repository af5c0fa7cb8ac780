from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brentq
from scipy.stats import entropy
from sklearn.neighbors import NearestNeighbors

from schelix_scale.errors import DataError
from schelix_scale.metrics import batch_mixing, label_conservation


def blobs(n: int = 300, groups: int = 3, spread: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % groups
    return rng.normal(size=(n, 4)) * spread + 5 * np.eye(groups, 4)[labels], labels


def test_batches_at_random_mix_and_separate_ones_do_not() -> None:
    z_nd, groups = blobs()
    batches = np.random.default_rng(1).integers(0, 3, len(z_nd))
    assert batch_mixing(z_nd, batches) > 0.8
    assert batch_mixing(z_nd, groups) == pytest.approx(0, abs=1e-6)


def test_mixing_is_the_weighted_inverse_simpson_index_of_its_definition() -> None:
    rng = np.random.default_rng(2)
    z_nd, batches = rng.normal(size=(300, 5)), rng.choice(4, 300, p=[0.4, 0.3, 0.2, 0.1])
    distances, neighbours = NearestNeighbors(n_neighbors=89).fit(z_nd).kneighbors()
    ilisi = []
    for distance, neighbour in zip(distances, neighbours, strict=True):
        # exp(-beta * distance), with beta such that the entropy of the weights is log(30)
        beta = brentq(lambda beta, d=distance: entropy(np.exp(-beta * d)) - np.log(30), 0.01, 50)
        weights = np.exp(-beta * distance)
        shares = np.bincount(batches[neighbour], weights, minlength=4) / weights.sum()
        ilisi.append(1 / (shares**2).sum())
    assert batch_mixing(z_nd, batches) == pytest.approx((np.median(ilisi) - 1) / 3, abs=0.01)


@pytest.mark.parametrize("n", [4, 10, 50])
def test_mixing_of_few_cells_stays_in_range(n: int) -> None:
    z_nd = np.random.default_rng(0).normal(size=(n, 3))
    assert 0 <= batch_mixing(z_nd, np.arange(n) % 2) <= 1
    # every neighbour but the own kind is far away
    far = z_nd + 100 * (np.arange(n) % 2)[:, None]
    assert batch_mixing(far, np.arange(n) % 2) == pytest.approx(0, abs=1e-6)


def test_clear_labels_score_one_and_random_ones_do_not() -> None:
    z_nd, labels = blobs(spread=0.001)
    clear = label_conservation(z_nd, pd.Categorical(labels.astype(str)))
    assert clear == {"nmi": pytest.approx(1), "silhouette": pytest.approx(1, abs=1e-2)}
    random = label_conservation(z_nd, np.random.default_rng(3).permutation(labels))
    assert random["nmi"] < 0.1
    assert random["silhouette"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("score", "groups", "message"),
    [
        (batch_mixing, ["a"] * 6, "all 6 cells have the same batch"),
        (batch_mixing, ["a", "b"], "has 6 cells but there are 2 batch values"),
        (batch_mixing, ["a", "b", None, "a", "b", "a"], "batch is missing for 1 of 6 cells"),
        (label_conservation, [np.nan, 1.0, 2.0, 1.0, 2.0, 2.0], "label is missing for 1 of 6"),
        (label_conservation, list("abcdef"), "has a label of its own"),
        (label_conservation, ["a"] * 6, "the same label"),
    ],
)
def test_what_cannot_be_scored_is_an_error(score: object, groups: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(np.arange(12.0).reshape(6, 2), groups)


def test_three_cells_are_too_few() -> None:
    with pytest.raises(DataError, match="3 cells are too few"):
        batch_mixing(np.eye(3), ["a", "b", "a"])
