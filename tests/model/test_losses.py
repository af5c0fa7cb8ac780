from __future__ import annotations

import numpy as np
import pytest
import torch

from schelix_scale.model.losses import contrast, pull_together


def by_hand(query: np.ndarray, target: np.ndarray, query_batch: list[int], target_batch: list[int], t: float) -> float:
    """InfoNCE of one cell after another; a negative of the cell's own batch stands in the sum twice."""
    losses = []
    for i, q in enumerate(query):
        similar = [q @ v / np.linalg.norm(q) / np.linalg.norm(v) for v in target]
        total = 0.0
        for j, similarity in enumerate(similar):
            times = 2 if j != i and query_batch[i] == target_batch[j] else 1
            total += times * np.exp(similarity / t)
        losses.append(-np.log(np.exp(similar[i] / t) / total))
    return float(np.mean(losses))


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_contrast_equals_softmax_by_hand(temperature: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    query, target = rng.normal(size=(2, 11, 5)) * 3
    own, other = rng.integers(0, 3, (2, 11))
    found = contrast(*(torch.from_numpy(values) for values in (query, target, own, other)), temperature)
    assert float(found) == pytest.approx(by_hand(query, target, own.tolist(), other.tolist(), temperature), rel=1e-9)


def test_contrast_of_perfect_and_of_worst_pairs() -> None:
    far = torch.eye(6)
    batches = torch.arange(6)
    perfect = float(contrast(far, far, batches, batches, 0.05))
    assert perfect < 1e-6
    assert float(contrast(far, far.roll(1, 0), batches, batches, 0.05)) > 10
    assert float(contrast(torch.ones(6, 6), torch.ones(6, 6), batches, batches, 0.2)) == pytest.approx(np.log(6))


def test_own_batch_negatives_weigh_twice() -> None:
    """Six equal cells: five negatives of the own batch count as ten."""
    same = torch.zeros(6, dtype=torch.int64)
    assert float(contrast(torch.ones(6, 4), torch.ones(6, 4), same, same, 0.2)) == pytest.approx(np.log(11))


def test_contrast_leaves_its_inputs_alone() -> None:
    query, target, batch = torch.randn(5, 3), torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    before = [value.clone() for value in (query, target, batch)]
    contrast(query, target, batch, batch, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(before, (query, target, batch), strict=True))


@pytest.mark.parametrize("pull", [0.0, 0.3, 0.7])
def test_pull_together_is_the_weighted_mean_of_squared_distances(pull: float) -> None:
    rng = np.random.default_rng(0)
    fused, backbone, far = rng.normal(size=(3, 9, 4))
    expected = 0.0
    for z, near, away in zip(fused, backbone, far, strict=True):
        expected += ((1 - pull) * np.sum((z - near) ** 2) + pull * np.sum((z - away) ** 2)) / 9
    found = pull_together(*(torch.from_numpy(values) for values in (fused, backbone, far)), pull)
    assert float(found) == pytest.approx(expected)


def test_pull_together_is_least_between_the_two() -> None:
    """The best latent is (1 - pull) B + pull B_far: found by descent, not by the formula of the loss."""
    backbone, far = torch.tensor([[0.0, 2.0]]), torch.tensor([[4.0, 0.0]])
    fused = torch.zeros(1, 2, requires_grad=True)
    optimizer = torch.optim.SGD([fused], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        torch.autograd.backward(pull_together(fused, backbone, far, 0.75))
        optimizer.step()
    np.testing.assert_allclose(fused.detach().numpy(), [[3.0, 0.5]], atol=1e-4)


@pytest.mark.parametrize("block", [4, 100])
def test_shares_and_blocks_of_queries_add_up(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Queries split over ranks, against the targets of all, and computed a few at a time."""
    monkeypatch.setattr("schelix_scale.model.losses.BLOCK", block)
    rng = np.random.default_rng(4)
    query, target = rng.normal(size=(2, 11, 5)) * 3
    own, other = rng.integers(0, 3, (2, 11))
    parts = [
        contrast(*(torch.from_numpy(v) for v in (query[a:b], target, own[a:b], other)), 0.2, a)
        for a, b in ((0, 6), (6, 6), (6, 11))
    ]
    expected = by_hand(query, target, own.tolist(), other.tolist(), 0.2)
    assert float(torch.stack(parts).sum()) == pytest.approx(expected, rel=1e-9)
    fused, backbone, far = (torch.from_numpy(rng.normal(size=(11, 4))) for _ in range(3))
    pulls = [pull_together(fused[a:b], backbone[a:b], far[a:b], 0.7, 11) for a, b in ((0, 6), (6, 6), (6, 11))]
    assert float(torch.stack(pulls).sum()) == pytest.approx(float(pull_together(fused, backbone, far, 0.7)), rel=1e-12)
