"""Row blocks out of one stored matrix (CSR, CSC or dense) of an h5ad file or zarr directory.

What comes in: an open h5py or zarr element and sorted positions. What goes out: CSR float32.
Memory: the rows asked for, plus one piece of at most `PIECE` stored values (plus one row, column or chunk).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import sparse

from schelix_scale.errors import StoreError
from schelix_scale.stores._rows import ranges, select_genes, spans, stack, to_float32

PIECE = 8_000_000
BRIDGE = 16_384


@dataclass(frozen=True)
class MatrixInfo:
    """What a stored matrix is: (n, g), its encoding and the number of stored values."""

    encoding: Literal["csr", "csc", "dense"]
    n: int
    g: int
    stored: int


def describe(element: Any, what: str) -> MatrixInfo:
    """Return the `MatrixInfo` of an open element; ``what`` names it in messages ("FILE: layer X").

    Raises
    ------
    StoreError
        It is not a two-dimensional matrix of numbers in an encoding that is read here.
    """
    remedy = "Re-write it with a current anndata: anndata.read_h5ad(path).write_h5ad(new_path)."
    if hasattr(element, "shape"):
        if len(element.shape) != 2:
            raise StoreError(f"{what} has shape {tuple(element.shape)}; cells by genes needs two dimensions.")
        values, (n, g), encoding = element, element.shape, "dense"
        stored = n * g
    else:
        encoding = str(element.attrs.get("encoding-type", "unknown")).removesuffix("_matrix")
        missing = [key for key in ("data", "indices", "indptr") if key not in element]
        if encoding not in ("csr", "csc") or missing:
            raise StoreError(f"{what} has encoding {encoding!r}; csr_matrix, csc_matrix and dense are read. {remedy}")
        values, (n, g) = element["data"], element.attrs["shape"]
        stored = int(values.shape[0])
        _check_lengths(element, int(n if encoding == "csr" else g), what)
    if np.dtype(values.dtype).kind not in "biuf":
        raise StoreError(f"{what} holds values of type {values.dtype}; only numbers can be integrated.")
    return MatrixInfo(encoding, int(n), int(g), int(stored))  # type: ignore[arg-type]


def read_rows(
    element: Any, info: MatrixInfo, rows: np.ndarray, genes: np.ndarray | None, what: str
) -> sparse.csr_matrix:
    """Read (m,) checked positions in the asked order as a canonical CSR float32 matrix."""
    unique, inverse = np.unique(rows, return_inverse=True)
    if info.encoding == "csc":
        x_ng = _columns(element, info, unique, genes, what)
    else:
        pieces = _csr_pieces(element, info, unique, what) if info.encoding == "csr" else _dense(element, unique, what)
        x_ng = stack([select_genes(x, genes) for x in pieces], info.g if genes is None else genes.size)
    in_order = unique.size == rows.size and np.array_equal(unique, rows)
    return x_ng if in_order else x_ng[inverse]


def _csr_pieces(element: Any, info: MatrixInfo, rows: np.ndarray, what: str) -> Iterator[sparse.csr_matrix]:
    for _, data, indices, lengths in _major_pieces(element, rows, info.g, what):
        indptr = np.r_[0, np.cumsum(lengths)]
        yield sparse.csr_matrix((data, indices, indptr), shape=(lengths.size, info.g))


def _columns(
    element: Any, info: MatrixInfo, rows: np.ndarray, genes: np.ndarray | None, what: str
) -> sparse.csr_matrix:
    """Scan the needed columns of a CSC matrix and keep the entries of ``rows`` (sorted, unique)."""
    columns, back = (np.arange(info.g), None) if genes is None else np.unique(genes, return_inverse=True)
    local = np.full(info.n, -1, np.int32)
    local[rows] = np.arange(rows.size, dtype=np.int32)
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for part, data, indices, lengths in _major_pieces(element, columns, info.n, what):
        row = local[indices]
        keep = row >= 0
        column = np.repeat(np.arange(part.start, part.stop, dtype=np.int32), lengths)
        kept.append((data[keep], row[keep], column[keep]))
    shape = (rows.size, columns.size)
    if not kept:
        return select_genes(sparse.csr_matrix(shape, dtype=np.float32), back)
    data, row, column = (np.concatenate(part) for part in zip(*kept, strict=True))
    return select_genes(sparse.csr_matrix((data, (row, column)), shape=shape), back)


def _dense(array: Any, rows: np.ndarray, what: str) -> Iterator[sparse.csr_matrix]:
    g = max(int(array.shape[1]), 1)
    chunk = _chunk(array)
    for part in spans(rows, rows + 1, max(BRIDGE // g, chunk), max(PIECE // g, chunk, 1)):
        first, last = int(rows[part.start]), int(rows[part.stop - 1]) + 1
        block = _slice(array, first, last, what)
        yield sparse.csr_matrix(to_float32(block[rows[part] - first]))


def _major_pieces(
    element: Any, positions: np.ndarray, n_minor: int, what: str
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (which positions, data float32, indices, lengths) of rows of a CSR or columns of a CSC matrix."""
    starts, stops = _extents(element["indptr"], positions, what)
    stored = int(element["data"].shape[0])
    if (starts > stops).any() or (stops[:-1] > starts[1:]).any() or (starts < 0).any() or (stops > stored).any():
        raise StoreError(f"{what} is damaged: indptr does not fit its {stored} stored values. Write the file again.")
    chunk = max(_chunk(element["data"]), _chunk(element["indices"]))
    for part in spans(starts, stops, max(BRIDGE, chunk), max(PIECE, chunk)):
        first, last = int(starts[part.start]), int(stops[part.stop - 1])
        lengths = stops[part] - starts[part]
        data = _slice(element["data"], first, last, what)
        indices = _slice(element["indices"], first, last, what)
        if lengths.sum() < last - first:
            wanted = ranges(starts[part] - first, lengths)
            data, indices = data[wanted], indices[wanted]
        if indices.size and not (indices.min() >= 0 and indices.max() < n_minor):
            raise StoreError(f"{what} is damaged: stored indices are outside 0..{n_minor - 1}. Write the file again.")
        yield part, to_float32(data), indices, lengths


def _extents(indptr: Any, positions: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Read ``indptr[p]`` and ``indptr[p + 1]`` of sorted positions, without reading all of it."""
    bounds = np.empty((2, positions.size), np.int64)
    chunk = _chunk(indptr)
    for part in spans(positions, positions + 2, max(BRIDGE, chunk), max(PIECE, chunk)):
        first = int(positions[part.start])
        values = _slice(indptr, first, int(positions[part.stop - 1]) + 2, what)
        bounds[0, part] = values[positions[part] - first]
        bounds[1, part] = values[positions[part] - first + 1]
    return bounds[0], bounds[1]


def _check_lengths(element: Any, major: int, what: str) -> None:
    lengths = {key: int(element[key].shape[0]) for key in ("data", "indices", "indptr")}
    if lengths["indptr"] != major + 1 or lengths["data"] != lengths["indices"]:
        raise StoreError(
            f"{what} is damaged: {lengths['data']} values, {lengths['indices']} indices and {lengths['indptr']} "
            f"pointers do not fit together (expected {major + 1} pointers). Write the file again."
        )


def _chunk(array: Any) -> int:
    return int(array.chunks[0]) if array.chunks else 1


def _slice(array: Any, first: int, last: int, what: str) -> np.ndarray:
    try:
        return np.asarray(array[first:last])
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(
            f"{what} cannot be read at {first}:{last}: {error}. The file is damaged; copy or write it again."
        ) from error
