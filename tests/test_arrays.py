"""Arrays in files: what was written is read, also by several threads at once."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from schelix_scale.arrays import create_array, load_array, load_arrays, map_array

PACKAGE = Path(__file__).parents[1] / "schelix_scale"


@pytest.mark.parametrize(
    "values",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.zeros((0, 5), np.int64),
        np.array(3.5),
        np.array(["T cell", "B"]),
    ],
    ids=["c", "fortran", "empty", "scalar", "text"],
)
def test_what_was_written_is_read(tmp_path: Path, values: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", values)
    for read in (load_array, map_array):
        found = read(tmp_path / "x.npy")
        assert (found.dtype, found.shape, found.flags.f_contiguous) == (
            values.dtype,
            values.shape,
            values.flags.f_contiguous,
        )
        np.testing.assert_array_equal(found, values)
    assert not isinstance(load_array(tmp_path / "x.npy"), np.memmap)


def test_named_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", rows=np.arange(4), scores=np.ones(2))
    assert list(load_arrays(tmp_path / "x.npz")) == ["rows", "scores"]
    assert load_arrays(tmp_path / "x.npz", "rows")["rows"].tolist() == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="cells"):
        load_arrays(tmp_path / "x.npz", "cells")


@pytest.mark.parametrize("read", [load_array, map_array])
def test_half_a_file_is_refused(tmp_path: Path, read: object) -> None:
    np.save(tmp_path / "x.npy", np.arange(1000))
    whole = (tmp_path / "x.npy").read_bytes()
    for length in (0, 20, len(whole) - 8):
        (tmp_path / "x.npy").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"EOF|mmap length"):
            read(tmp_path / "x.npy")


@pytest.fixture
def interrupted() -> Iterator[None]:
    """Let other threads in wherever Python collects garbage, as in the middle of a header, and collect often."""

    def let_in(phase: str, info: dict[str, int]) -> None:
        time.sleep(0)

    usual = gc.get_threshold()
    gc.callbacks.append(let_in)
    gc.set_threshold(5)
    yield
    gc.callbacks.remove(let_in)
    gc.set_threshold(*usual)


@pytest.mark.usefixtures("interrupted")
def test_threads_read_at_once(tmp_path: Path) -> None:
    create_array(tmp_path / "x.npy", (50, 10), np.float32)[:] = 7
    np.savez(tmp_path / "x.npz", x=np.full((50, 10), 7, np.float32))

    def read(depth: int) -> float:
        if depth:
            return read(depth - 1)  # the counter that threads share starts at the depth of the call
        arrays = map_array(tmp_path / "x.npy"), load_array(tmp_path / "x.npy"), load_arrays(tmp_path / "x.npz")["x"]
        return float(sum(array.sum() for array in arrays))

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda i: read(3 * (i % 4)), range(1000))) == {3 * 3500.0}


def test_all_headers_are_read_here() -> None:
    readers = ("np.load(", "format.open_memmap(", "read_array_header")
    found = {
        path.name for path in PACKAGE.rglob("*.py") if any(reader in path.read_text("utf-8") for reader in readers)
    }
    assert found == {"arrays.py"}
