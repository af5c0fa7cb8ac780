"""Arrays in .npy and .npz files, read by one thread at a time as far as their headers go.

NumPy parses a header with `ast`, whose depth counter all threads share up to Python 3.11.7 (cpython gh-106905): two
headers at once may end in SystemError, "AST constructor recursion depth mismatch". Hence the lock, and hence nothing
else in the package calls ``np.load``. (What parses without it, such as a filter of TileDB-SOMA, can still meet it.)
"""

from __future__ import annotations

import os
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from schelix_scale.publish import disk_errors

_header = Lock()


def _start_anew() -> None:
    """Take another lock: a thread that is not here may hold the one that a fork has copied."""
    global _header
    _header = Lock()


os.register_at_fork(after_in_child=_start_anew)


def map_array(path: Path | str, mode: str = "r") -> np.memmap[Any, Any]:
    """Memory-map a .npy file, to read ("r") or to read and write ("r+").

    Raises
    ------
    ValueError
        It is no whole .npy file.
    """
    with _header:
        return np.lib.format.open_memmap(path, mode=mode)


def load_array(path: Path | str) -> np.ndarray:
    """Read a .npy file into memory; errors are those of `map_array`."""
    there = map_array(path)
    values = np.fromfile(path, there.dtype, there.size, offset=there.offset)
    return values.reshape(there.shape, order="C" if there.flags.c_contiguous else "F")


def load_arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Read the arrays of a .npz file that go by these names, or all of them."""
    with _header, np.load(path) as file:
        return {name: file[name] for name in names or file.files}


def create_array(path: Path, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.memmap[Any, Any]:
    """Return a writable .npy memory map whose disk space is already reserved.

    A sparse map on a full disk kills the process with SIGBUS; here a full disk is an error before the first write.
    """
    with disk_errors(path):
        np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
        if hasattr(os, "posix_fallocate"):
            descriptor = os.open(path, os.O_RDWR)
            try:
                os.posix_fallocate(descriptor, 0, os.fstat(descriptor).st_size)
            finally:
                os.close(descriptor)
        return map_array(path, "r+")
