from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from schelix_scale.graph import diffusion
from schelix_scale.graph.diffusion import diffuse
from schelix_scale.graph.operator import Operator
from tests.graph.test_operator import dense, random_operator

N, D = 57, 4


@pytest.fixture
def operator() -> Operator:
    return random_operator(N, 5, 0)


@pytest.fixture
def features_nd() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(N, D)).astype(np.float32)


def recursion(operator: Operator, features_nd: np.ndarray, restart: float, hops: int) -> list[np.ndarray]:
    """F^(0), F^(1), ... with a dense P."""
    scales = [features_nd.astype(np.float64)]
    for _ in range(hops):
        scales.append((1 - restart) * dense(operator) @ scales[-1] + restart * scales[0])
    return scales


@pytest.mark.parametrize("restart", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("hops", [(0, 1, 3), (3, 0, 1), (2,), (0,), (1, 2, 3, 4)])
def test_equals_dense_recursion(
    operator: Operator, features_nd: np.ndarray, restart: float, hops: tuple[int, ...], tmp_path: Path
) -> None:
    diffuse(operator, features_nd, hops, restart, tmp_path / "f.npy")
    found = np.load(tmp_path / "f.npy")
    scales = recursion(operator, features_nd, restart, max(hops))
    expected = np.stack([scales[hop] for hop in sorted(hops)], axis=1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["f.npy"]


@pytest.mark.parametrize("block", [1, 10, 57, 100])
def test_blocks_of_any_size(
    operator: Operator, features_nd: np.ndarray, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(n_rows: int) -> Iterator[tuple[int, int]]:
        yield from ((start, min(start + block, n_rows)) for start in range(0, n_rows, block))

    monkeypatch.setattr(diffusion, "row_blocks", small)
    advanced: list[int] = []
    diffuse(operator, features_nd, (0, 1, 3), 0.3, tmp_path / "f.npy", advanced.append)
    expected = np.stack([recursion(operator, features_nd, 0.3, 3)[hop] for hop in (0, 1, 3)], axis=1)
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), expected, atol=1e-5)
    assert sum(advanced) == 3 * N
    assert len(advanced) == 3 * len(list(small(N)))


def test_more_cells_than_a_block(tmp_path: Path) -> None:
    """20,500 cells on a ring, so that the real blocks are crossed: one hop is the mean of both neighbours."""
    n = 20_500
    indices = np.column_stack([(np.arange(n) - 1) % n, (np.arange(n) + 1) % n]).astype(np.int32)
    ring = Operator(indices, np.full((n, 2), 0.5, np.float32))
    features_nd = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)
    diffuse(ring, features_nd, (0, 2), 0.3, tmp_path / "f.npy")

    def step(x: np.ndarray) -> np.ndarray:
        return 0.7 * (np.roll(x, 1, axis=0) + np.roll(x, -1, axis=0)) / 2 + 0.3 * features_nd

    found = np.load(tmp_path / "f.npy")
    np.testing.assert_array_equal(found[:, 0], features_nd)
    np.testing.assert_allclose(found[:, 1], step(step(features_nd)), atol=1e-5)


def test_read_only_maps_and_half_precision(operator: Operator, features_nd: np.ndarray, tmp_path: Path) -> None:
    half = features_nd.astype(np.float16)
    np.save(tmp_path / "x.npy", half)
    diffuse(operator, np.load(tmp_path / "x.npy", mmap_mode="r"), (0, 1, 3), 0.3, tmp_path / "f.npy")
    scales = recursion(operator, half, 0.3, 3)
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), np.stack([scales[t] for t in (0, 1, 3)], 1), atol=2e-3)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), half)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("hops", [(0, 1, 3), (2,), (1, 2)])
def test_rows_in_any_order(
    operator: Operator,
    features_nd: np.ndarray,
    hops: tuple[int, ...],
    workers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(diffusion, "row_blocks", lambda n: [(i, min(i + 9, n)) for i in range(0, n, 9)])
    order = np.random.default_rng(3).permutation(N).astype(np.int32)
    diffuse(operator, features_nd, hops, 0.3, tmp_path / "f.npy", workers=workers, order=order)
    expected = np.stack([recursion(operator, features_nd, 0.3, 3)[hop] for hop in hops], axis=1)
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), expected, atol=1e-5)


def test_a_stream_without_dimensions(operator: Operator, tmp_path: Path) -> None:
    diffuse(operator, np.zeros((N, 0), np.float32), (0, 1, 3), 0.3, tmp_path / "f.npy")
    assert np.load(tmp_path / "f.npy", mmap_mode="r").shape == (N, 3, 0)


def test_an_interrupted_diffusion_leaves_no_scratch(
    operator: Operator, features_nd: np.ndarray, tmp_path: Path
) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt("enough")

    with pytest.raises(KeyboardInterrupt, match="enough"):
        diffuse(operator, features_nd, (0, 3), 0.3, tmp_path / "f.npy", stop)
    assert {path.name for path in tmp_path.iterdir()} <= {"f.npy"}
