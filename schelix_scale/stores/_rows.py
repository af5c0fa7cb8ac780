"""Helpers that every store shares: checking positions, canonical float32 CSR, fewest reads for scattered runs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import sparse


def check_positions(positions: np.ndarray, size: int, what: str, source: str) -> np.ndarray:
    """Return ``positions`` as (m,) int64, or raise what is wrong with them.

    Raises
    ------
    TypeError
        They are not one-dimensional integers.
    IndexError
        Some are outside 0..size-1; negative ones are not counted from the end.
    """
    array = np.asarray(positions)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(
            f"{what} positions must be one-dimensional integers, got {array.dtype} of shape {array.shape}; "
            f"turn a mask into positions with np.flatnonzero."
        )
    outside = (array < 0) | (array >= size)
    if outside.any():
        first = array[outside][:3].tolist()
        raise IndexError(
            f"{source}: {int(outside.sum())} of {array.size} asked {what} positions are outside 0..{size - 1} "
            f"(first: {first})."
        )
    return array.astype(np.int64, copy=False)


def to_float32(values: np.ndarray) -> np.ndarray:
    """Cast to float32; what overflows becomes inf, which `check_block` reports with its cell and gene."""
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float32, copy=False)


def canonical(x_ng: sparse.csr_matrix) -> sparse.csr_matrix:
    """Sort indices, sum duplicates and drop stored zeros, in place."""
    x_ng.sum_duplicates()
    if not x_ng.data.all():  # quicker to see than to look for them
        x_ng.eliminate_zeros()
    return x_ng


def select_genes(x_ng: sparse.csr_matrix, genes: np.ndarray | None) -> sparse.csr_matrix:
    """Return the asked genes (h,) in the asked order, canonical."""
    return canonical(x_ng if genes is None else x_ng[:, genes])


def stack(parts: list[sparse.csr_matrix], width: int) -> sparse.csr_matrix:
    """Stack row blocks of ``width`` genes; no blocks make a (0, width) matrix."""
    if not parts:
        return sparse.csr_matrix((0, width), dtype=np.float32)
    return parts[0] if len(parts) == 1 else sparse.csr_matrix(sparse.vstack(parts, format="csr"))


def spans(starts: np.ndarray, stops: np.ndarray, bridge: int, cap: int) -> Iterator[slice]:
    """Group sorted runs ``starts[i]:stops[i]`` of a file so that each group is one sequential read.

    Runs less than ``bridge`` elements apart are read together, gap included (one longer read costs less than
    two short ones, and a chunk is not decoded twice); a group is cut before a run that starts ``cap`` or more
    elements after the group, so that it spans at most ``cap`` elements plus one run.
    """
    if starts.size == 0:
        return
    breaks = np.r_[True, starts[1:] - stops[:-1] > bridge]
    origin = starts[breaks][np.cumsum(breaks) - 1]
    cut = (starts - origin) // cap
    breaks[1:] |= cut[1:] != cut[:-1]
    firsts = np.flatnonzero(breaks)
    for first, last in zip(firsts, np.r_[firsts[1:], starts.size], strict=True):
        yield slice(int(first), int(last))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the concatenation of ``arange(start, start + length)`` over all runs."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    positions: np.ndarray = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return positions
