"""The guards, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from _guards import guard_files, jaccard, kept_neighbors, neighbors, private_purity


def line(*positions: float) -> np.ndarray:
    return np.array(positions, dtype=float)[:, None]


def test_jaccard_is_what_is_shared_of_what_is_in_either() -> None:
    found = jaccard(np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3]]), np.array([[3, 2, 4], [3, 1, 2], [7, 8, 9]]))
    assert found.tolist() == [0.5, 1.0, 0.0]


def test_neighbors_are_the_nearest_others() -> None:
    near = neighbors(line(0, 1, 3, 7), 2)
    assert [set(row) for row in near.tolist()] == [{1, 2}, {0, 2}, {0, 1}, {1, 2}]
    assert set(neighbors(line(0, 1, 3, 7), 1, np.array([3]))[0].tolist()) == {2}


def test_a_cell_is_no_neighbor_of_itself_among_copies() -> None:
    near = neighbors(np.zeros((6, 2)), 2)
    assert near.shape == (6, 2)
    assert all(i not in row for i, row in enumerate(near.tolist()))


def groups(sizes: dict[tuple[str, str], int]) -> tuple[np.ndarray, np.ndarray]:
    pairs = [pair for pair, size in sizes.items() for _ in range(size)]
    return np.array([label for label, _ in pairs]), np.array([batch for _, batch in pairs])


def test_moving_a_batch_or_a_type_as_a_whole_keeps_its_neighborhoods() -> None:
    labels_n, batches_n = groups({("B", "1"): 40, ("B", "2"): 25, ("T", "1"): 16})
    before_nd = np.random.default_rng(0).normal(size=(81, 3))
    after_nd = before_nd + 9.0 * (batches_n == "2")[:, None] - 5.0 * (labels_n == "T")[:, None]
    assert kept_neighbors(after_nd, before_nd, labels_n, batches_n) == 1.0


def test_kept_neighbors_of_a_group_whose_order_changed() -> None:
    # 16 cells have 5 neighbours each. Before, cells 0-7 and 8-15 are two clusters; after, the even and the odd cells.
    # The small squares make all distances different
    before = np.arange(16.0) + 1e-6 * np.arange(16) ** 2 + 100.0 * (np.arange(16) >= 8)
    after = np.arange(16.0) + 1e-6 * np.arange(16) ** 2 + 100.0 * (np.arange(16) % 2)

    def nearest(position: np.ndarray, i: int) -> set[int]:
        others = sorted((abs(position[i] - position[j]), j) for j in range(16) if j != i)
        return {j for _, j in others[:5]}

    sets = [(nearest(before, i), nearest(after, i)) for i in range(16)]
    expected = np.mean([len(a & b) / len(a | b) for a, b in sets])
    labels_n, batches_n = groups({("B", "1"): 16, ("B", "2"): 15})
    tail = np.zeros(15)  # 15 cells are too few to be looked at
    found = kept_neighbors(line(*after, *tail), line(*before, *tail), labels_n, batches_n)
    assert found == pytest.approx(expected)
    assert 0 < expected < 0.5


def test_without_groups_of_16_cells_there_is_no_number() -> None:
    labels_n, batches_n = groups({("B", "1"): 15, ("B", "2"): 9})
    z_nd = np.random.default_rng(0).normal(size=(24, 2))
    assert kept_neighbors(z_nd, z_nd, labels_n, batches_n) is None


def test_private_types_that_stay_apart_and_that_mix() -> None:
    # type P (10 cells) is in batch 1 alone, so 9 neighbours count; Q is in both batches; R (9 cells) is too small
    labels_n, batches_n = groups({("P", "1"): 10, ("Q", "1"): 5, ("Q", "2"): 5, ("R", "2"): 9})
    spread = 0.01 * np.arange(29)
    apart = np.repeat([0.0, 1_000.0, 2_000.0], [10, 10, 9]) + spread
    assert private_purity(line(*apart), labels_n, batches_n) == 1.0
    # two clusters of 5 P and 5 Q: of the 9 nearest cells of each P, 4 are P
    mixed = np.repeat([0.0, 1_000.0, 0.0, 1_000.0, 2_000.0], [5, 5, 5, 5, 9]) + spread
    assert private_purity(line(*mixed), labels_n, batches_n) == pytest.approx(4 / 9)


def test_fifteen_neighbors_of_large_private_types_and_the_mean_over_types() -> None:
    # of 20 P, each has 19 others near: 15 of 15. S: 12 cells, 6 of them among P, whose 11 nearest are 5 S and 6 others
    labels_n, batches_n = groups({("P", "1"): 20, ("S", "2"): 12, ("Q", "1"): 6, ("Q", "2"): 60})
    z = np.concatenate([np.zeros(20), np.full(6, 500.0), np.full(6, 900.0), np.full(6, 500.0), np.full(60, 900.0)])
    # around 500 are 12 cells, 6 S: the 11 nearest are 5 S; around 900 the 6 S sit together, then come Q
    z += np.concatenate([0.01 * np.arange(20), 0.01 * np.arange(12), 0.01 * np.arange(6), 1 + 0.01 * np.arange(60)])
    found = private_purity(line(*z), labels_n, batches_n)
    assert found == pytest.approx((1.0 + 5 / 11) / 2)


@pytest.mark.parametrize("sizes", [{("P", "1"): 20, ("Q", "1"): 20}, {("P", "1"): 20, ("P", "2"): 20}])
def test_without_private_types_or_with_one_batch_there_is_no_number(sizes: dict[tuple[str, str], int]) -> None:
    assert private_purity(np.random.default_rng(0).normal(size=(40, 2)), *groups(sizes)) is None


def test_files_are_read(tmp_path: Path) -> None:
    labels_n, batches_n = groups({("P", "1"): 20, ("Q", "1"): 16, ("Q", "2"): 16})
    obs = pd.DataFrame({"lab": batches_n, "kind": labels_n}, index=[f"c{i}" for i in range(52)])
    anndata.AnnData(np.ones((52, 1), np.float32), obs=obs).write_h5ad(tmp_path / "a.h5ad")
    z_nd = np.random.default_rng(0).normal(size=(52, 2)) + 50.0 * (labels_n == "P")[:, None]
    np.save(tmp_path / "z.npy", z_nd)
    file = str(tmp_path / "z.npy")
    found = guard_files(str(tmp_path / "a.h5ad"), "lab", "kind", file, [file])
    assert found == [{"kept_neighbors": 1.0, "private_purity": 1.0}]
