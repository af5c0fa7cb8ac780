"""P-values against held-out cells that are voted to be the same, against counting them."""

from __future__ import annotations

import numpy as np
import pytest

from schelix_scale.mapping.by_label import ByLabel, voted
from schelix_scale.transfer import Labels


def test_p_values_against_counting() -> None:
    rng = np.random.default_rng(1)
    p_s, code_s = rng.uniform(0.005, 1, 300).round(2), rng.choice(3, 300, p=[0.7, 0.25, 0.05])  # some are the same
    found = ByLabel.fit(p_s, np.full(300, 1 / 300), code_s[None])
    p, code = np.array([0.004, 0.2, 0.01, 0.5, 0.03, 0.03]), np.array([0, 0, 1, 2, -1, 3])
    expected = []
    for one, label in zip(p, code, strict=True):
        count = int((code_s == label).sum())
        own = ((p_s[code_s == label] <= one).sum() + 1) / (count + 1)
        expected.append((500 * one + count * own) / (500 + count) if count else one)
    np.testing.assert_allclose(found.p_values(p, code[None]), expected)
    other = ByLabel.fit(p_s, np.full(300, 1 / 300), np.stack([code_s, code_s * 0]))
    all_same = (500 * p + 300 * np.array([((p_s <= one).sum() + 1) / 301 for one in p])) / 800
    highest = np.maximum(expected, all_same)
    assert (highest != expected).any()
    assert (highest != all_same).any()
    np.testing.assert_allclose(other.p_values(p, np.stack([code, code * 0])), highest)
    counts = np.bincount(code_s)
    assert found.least(1e-4) == pytest.approx(max((500e-4 + n * (1 / (n + 1))) / (500 + n) for n in counts))
    assert ByLabel.fit(p_s, p_s, code_s[None][:0]).least(0.003) == 0.003
    np.testing.assert_array_equal(ByLabel.fit(p_s, p_s, code_s[None][:0]).p_values(p, code[None][:0]), p)


def test_a_label_whose_cells_look_novel_has_its_own_p_values() -> None:
    """Of all labels together 1 in 100 is below .01: nearly all of one label, which has a tenth of the cells."""
    rng = np.random.default_rng(2)

    def cells(n: int) -> tuple[np.ndarray, np.ndarray]:
        code = rng.choice(2, n, p=[0.9, 0.1])
        score = rng.normal(size=n) + 2.0 * code
        return score, code

    score, code = cells(8_000)
    new, new_code = cells(20_000)

    def p_values(of: np.ndarray) -> np.ndarray:
        return 1 - np.searchsorted(np.sort(score), of, side="left") / len(score)

    found = ByLabel.fit(p_values(score), np.full(8_000, 1 / 8_000), code[None])
    p = found.p_values(p_values(new), new_code[None])
    before = [(p_values(new)[new_code == label] <= 0.01).mean() for label in (0, 1)]
    after = [(p[new_code == label] <= 0.01).mean() for label in (0, 1)]
    assert before[1] > 0.05
    assert after[1] < 0.6 * before[1]
    assert after[0] > 2 * before[0]
    assert (p <= 0.01).mean() < 0.012


def test_weights_count() -> None:
    """Cells of large batches have less each: those of one of 300 as much as those of one of 100."""
    p_s = np.r_[np.full(300, 0.001), np.full(100, 0.9)]
    found = ByLabel.fit(p_s, np.r_[np.full(300, 1 / 600), np.full(100, 1 / 200)], np.zeros((1, 400), int))
    count = 1 / (300 / 600**2 + 100 / 200**2)
    own = (count * 0.5 + 1) / (count + 1)
    assert found.p_values(np.array([0.02]), np.zeros((1, 1), int))[0] == pytest.approx(
        (500 * 0.02 + count * own) / (500 + count)
    )


def test_cells_are_voted_to_be_what_most_of_their_neighbours_are() -> None:
    columns = [Labels("a", ("x", "y"), np.array([0, 0, 1, -1, -1])), Labels("b", ("z",), np.array([-1, -1, 0, 0, -1]))]
    near = np.array([[0, 1, 2], [2, 3, 4], [4, 4, 4]])
    found = voted(columns, near, np.full((3, 3), 0.1))
    np.testing.assert_array_equal(found, [[0, 1, -1], [0, 0, -1]])
    assert voted([], near, np.full((3, 3), 0.1)).shape == (0, 3)
