"""Neighbours and batches -> the batch-reweighted diffusion operator P in fixed-k form (METHOD section 4).

P is two (n, k) arrays, one row per cell: it is read by row and never rebuilt. It is a constant to the model:
it lives on disk as numbers, so no gradient can reach it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from schelix_scale.arrays import create_array
from schelix_scale.graph.knn import Neighbors
from schelix_scale.graph.vectors import cell_dtype, forget, row_blocks

TINY = 1e-8


@dataclass(frozen=True)
class Operator:
    """A row-stochastic (n, n) matrix with k entries in each row.

    Attributes
    ----------
    indices_nk
        (n, k) columns, int32 (int64 above 2**31 cells).
    weights_nk
        (n, k) float32, each row sums to 1.
    """

    indices_nk: np.ndarray
    weights_nk: np.ndarray

    @property
    def n_cells(self) -> int:
        """Number of cells, n."""
        return len(self.indices_nk)

    def block(self, rows: slice | np.ndarray, position_n: np.ndarray | None = None) -> sparse.csr_matrix:
        """Rows (m,) as an (m, n) CSR matrix, whose columns stand at ``position_n`` (n,) if that is given."""
        data, columns = np.asarray(self.weights_nk[rows]), np.asarray(self.indices_nk[rows])
        if position_n is not None:
            columns = position_n[columns]
        m, k = columns.shape
        return sparse.csr_matrix((data.ravel(), columns.ravel(), np.arange(0, m * k + 1, k)), shape=(m, self.n_cells))


def build_operator(
    neighbors: Neighbors, batch_n: np.ndarray, theta: float, kernel_neighbor: int, folder: Path | None = None
) -> Operator:
    """Weigh neighbours by a self-tuned kernel and by how rare their batch is among them.

    w_ij = exp(-d_ij^2 / (sigma_i sigma_j)) / share(b_j in the neighbourhood of i)^theta, rows normalised to 1,
    with sigma the distance to neighbour number ``kernel_neighbor`` (Zelnik-Manor & Perona 2004).

    Parameters
    ----------
    batch_n
        (n,) batch codes.
    theta
        0 ignores batches; 1 gives every batch in a neighbourhood the same mass, up to the kernel.
    folder
        Where the weights are written, as a memory map; in memory if None.
    """
    n, k = neighbors.indices_nk.shape
    sigma = np.maximum(neighbors.distances_nk[:, min(kernel_neighbor, k) - 1], TINY)
    weights = _weights_in(folder, n, k)
    for start, stop in row_blocks(n):
        columns = neighbors.indices_nk[start:stop]
        squared = neighbors.distances_nk[start:stop].astype(np.float64) ** 2
        kernel = np.exp(-squared / (sigma[start:stop, None].astype(np.float64) * sigma[columns]))
        if theta > 0:
            kernel /= _batch_share(batch_n[columns]) ** theta
        kernel = np.maximum(kernel, TINY)
        weights[start:stop] = kernel / kernel.sum(axis=1, keepdims=True)
        forget(weights, neighbors.indices_nk, neighbors.distances_nk)
    return Operator(neighbors.indices_nk.astype(cell_dtype(n), copy=False), weights)


def _weights_in(folder: Path | None, n: int, k: int) -> np.ndarray:
    return np.empty((n, k), np.float32) if folder is None else create_array(folder / "weights.npy", (n, k), np.float32)


def _batch_share(batch_mk: np.ndarray) -> np.ndarray:
    """Share of each neighbour's batch among the neighbours of its row, (m, k)."""
    columns_km = np.ascontiguousarray(np.transpose(batch_mk))
    count_km = np.zeros(columns_km.shape, np.int32)
    for column_m in columns_km:
        count_km += columns_km == column_m
    return np.asarray((count_km / len(columns_km)).T)


def blend(old: Operator, new: Operator, weight: float, folder: Path | None = None) -> Operator:
    """Average two operators: the k heaviest of (1 - weight) old + weight new, rows sum to 1.

    It is written to ``folder`` as memory maps; it is in memory if that is None.
    """
    n, k = new.indices_nk.shape
    kinds = {"indices": cell_dtype(n), "weights": np.dtype(np.float32)}
    if folder is None:
        indices, weights = (np.empty((n, k), kind) for kind in kinds.values())
    else:
        indices, weights = (create_array(folder / f"blended-{name}.npy", (n, k), kind) for name, kind in kinds.items())
    for start, stop in row_blocks(n):
        numbers = np.hstack([old.indices_nk[start:stop], new.indices_nk[start:stop]])
        mass = np.hstack([(1 - weight) * old.weights_nk[start:stop], weight * new.weights_nk[start:stop]])
        order = np.argsort(numbers, axis=1, kind="stable")
        numbers, mass = (np.take_along_axis(values, order, axis=1) for values in (numbers, mass))
        twice = numbers[:, 1:] == numbers[:, :-1]
        mass[:, 1:] += np.where(twice, mass[:, :-1], 0)
        mass[:, :-1][twice] = -1  # its mass is counted with the same number beside it
        top = np.sort(np.argsort(-mass, axis=1, kind="stable")[:, :k], axis=1)
        chosen = np.take_along_axis(mass, top, axis=1)
        indices[start:stop] = np.take_along_axis(numbers, top, axis=1)
        weights[start:stop] = chosen / chosen.sum(axis=1, keepdims=True)
        forget(indices, weights, old.indices_nk, old.weights_nk, new.indices_nk, new.weights_nk)
    return Operator(indices, weights)


def jaccard(a: Operator, b: Operator, rows: np.ndarray) -> float:
    """Mean Jaccard overlap of the neighbour sets of ``rows`` in two operators."""
    overlaps = []
    for row in rows:
        one, two = set(np.asarray(a.indices_nk[row]).tolist()), set(np.asarray(b.indices_nk[row]).tolist())
        overlaps.append(len(one & two) / len(one | two))
    return float(np.mean(overlaps))
