"""Neighbours of query cells in the reference -> their rows of the operator, and their diffused features.

A query cell is a row of P whose columns are cells of the reference: F_q^(t+1) = (1 - r) P_q F^(t) + r F_q^(0). Rows of
the reference are those of its cache; the hops in between that the cache lacks are computed from it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from scipy import sparse

from schelix_scale.graph.operator import TINY, Operator, _batch_share
from schelix_scale.graph.vectors import row_blocks, unit_rows
from schelix_scale.scheduling import run_tasks


class Levels:
    """F^(t) of the reference's cells for every t below the last hop.

    Parameters
    ----------
    operator
        P of the reference.
    origin_nd
        (n, d) F^(0): corrected features.
    hops
        The hops of the cache, ascending.
    cached_ntd
        (n, T, d) the cached F^(t).
    restart
        r.
    """

    def __init__(
        self,
        operator: Operator,
        origin_nd: np.ndarray,
        hops: Sequence[int],
        cached_ntd: np.ndarray,
        restart: float,
    ) -> None:
        self._operator, self._origin, self._restart = operator, origin_nd, restart
        self._stored: dict[int, np.ndarray] = {hop: cached_ntd[:, place] for place, hop in enumerate(hops)}
        self._stored[0] = origin_nd
        self.last = max(hops)

    @property
    def dims(self) -> int:
        """Number of features, d."""
        return int(self._origin.shape[1])

    def materialize(self, threads: int = 1) -> None:
        """Compute the hops that are not stored for all cells: for queries that would touch most of them."""
        for hop in range(1, self.last):
            if hop not in self._stored:
                with tempfile.TemporaryFile() as file:  # on disk: it has no name, and goes with the last reader
                    level = np.memmap(file, np.float32, "w+", shape=self._origin.shape)

                def fill(span: tuple[int, int], hop: int = hop, level: np.ndarray = level) -> int:
                    level[slice(*span)] = self.rows(hop, np.arange(*span))
                    return span[1] - span[0]

                run_tasks(fill, list(row_blocks(len(level))), threads)
                self._stored[hop] = level

    def missing_hops(self) -> int:
        """Count the hops below the last that are not stored."""
        return sum(hop not in self._stored for hop in range(1, self.last))

    def rows(self, hop: int, rows: np.ndarray) -> np.ndarray:
        """F^(hop) of rows (m,), (m, d) float32."""
        if hop in self._stored:
            return np.asarray(self._stored[hop][rows], np.float32)
        operator = self._operator
        mixed = self._mixed(hop - 1, np.asarray(operator.indices_nk[rows]), np.asarray(operator.weights_nk[rows]))
        return ((1 - self._restart) * mixed + self._restart * np.asarray(self._origin[rows])).astype(np.float32)

    def diffuse(
        self,
        indices_mk: np.ndarray,
        weights_mk: np.ndarray,
        own_md: np.ndarray,
        hops: Sequence[int],
        kept_m: np.ndarray,
    ) -> np.ndarray:
        """Diffuse query cells, (m, T, d) float32.

        Parameters
        ----------
        indices_mk, weights_mk
            Rows of P_q, which sum to 1.
        own_md
            (m, d) F_q^(0).
        kept_m
            (m,) in [0, 1]: how much of a cell's neighbourhood is believed; the rest is the cell itself. 1 is the
            operator as the reference has it.
        """
        out = np.empty((len(own_md), len(hops), own_md.shape[1]), np.float32)
        share = (1 - self._restart) * kept_m[:, None].astype(np.float32)
        for place, hop in enumerate(hops):
            if hop == 0:
                out[:, place] = own_md
            else:
                mixed = self._mixed(hop - 1, indices_mk, weights_mk)
                out[:, place] = share * mixed + (1 - share) * own_md
        return out

    def _mixed(self, hop: int, indices_mk: np.ndarray, weights_mk: np.ndarray) -> np.ndarray:
        """Weighted sums of F^(hop) of neighbours, (m, d); of a hop whose rows lie together none is copied."""
        level = self._stored.get(hop)
        if level is None or not level.flags.c_contiguous or level.dtype != np.float32:
            return mix(indices_mk, weights_mk, partial(self.rows, hop))
        return np.asarray(_weights(indices_mk, weights_mk, len(level)) @ level)


def mix(indices_mk: np.ndarray, weights_mk: np.ndarray, rows: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Weighted sums of features of neighbours, (m, d); ``rows`` is asked once for each cell that is needed."""
    needed, place = np.unique(indices_mk, return_inverse=True)
    return np.asarray(_weights(place.reshape(indices_mk.shape), weights_mk, len(needed)) @ rows(needed))


def _weights(indices_mk: np.ndarray, weights_mk: np.ndarray, width: int) -> sparse.csr_matrix:
    """Weights of neighbours as a matrix (m, width)."""
    m, k = indices_mk.shape
    parts = weights_mk.ravel(), indices_mk.ravel(), np.arange(0, m * k + 1, k)
    return sparse.csr_matrix(parts, shape=(m, width))


class Widths:
    """Kernel widths of the reference's cells.

    Parameters
    ----------
    features_nd
        (n, d) corrected features.
    operator
        The operator that lists their neighbours, nearest first.
    kernel_neighbor
        See `kernel_widths`.
    """

    def __init__(self, features_nd: np.ndarray, operator: Operator, kernel_neighbor: int) -> None:
        self._parts = features_nd, operator, kernel_neighbor
        self._all: np.ndarray | None = None

    def materialize(self, threads: int = 1) -> None:
        """Compute those of all cells: for queries that would touch most of them, and more than once."""
        if self._all is not None:
            return
        found = np.empty(len(self._parts[0]), np.float32)

        def fill(span: tuple[int, int]) -> int:
            found[slice(*span)] = kernel_widths(*self._parts, np.arange(*span))
            return span[1] - span[0]

        run_tasks(fill, list(row_blocks(len(found))), threads)
        self._all = found

    def __call__(self, indices_mk: np.ndarray, chosen_n: np.ndarray | None = None) -> np.ndarray:
        """Return those of cells, in the shape of their row numbers; ``chosen_n`` as in `kernel_widths`."""
        if chosen_n is None and self._all is not None:
            return self._all.take(indices_mk)
        needed, place = np.unique(indices_mk, return_inverse=True)
        return np.asarray(kernel_widths(*self._parts, needed, chosen_n)[place].reshape(indices_mk.shape))


def kernel_widths(
    features_nd: np.ndarray,
    operator: Operator,
    kernel_neighbor: int,
    rows: np.ndarray,
    chosen_n: np.ndarray | None = None,
) -> np.ndarray:
    """Kernel widths of reference cells (m,): the distance to their neighbour of that number, nearest first.

    Among ``chosen_n`` (n,) bool, if given: the last of the neighbours in the operator where fewer of them are.
    """
    column = min(kernel_neighbor, operator.indices_nk.shape[1]) - 1
    others = np.asarray(operator.indices_nk[rows, column])
    if chosen_n is not None:
        near_mk = np.asarray(operator.indices_nk[rows])
        counted_mk = np.cumsum(chosen_n[near_mk], axis=1) > column
        last = np.where(counted_mk.any(axis=1), counted_mk.argmax(axis=1), near_mk.shape[1] - 1)
        others = near_mk[np.arange(len(rows)), last]
    cosine = np.einsum("md,md->m", unit_rows(features_nd[rows]), unit_rows(features_nd[others]))
    return np.asarray(np.maximum(1 - cosine, TINY))


def query_weights(
    distances_mk: np.ndarray, width_mk: np.ndarray, batch_mk: np.ndarray, theta: float, kernel_neighbor: int
) -> np.ndarray:
    """Rows of P for query cells, (m, k) float32, each sums to 1: the kernel and reweighting of `build_operator`.

    Parameters
    ----------
    distances_mk
        (m, k) cosine distances to the neighbours, nearest first.
    width_mk, batch_mk
        (m, k) kernel widths and batches of the neighbours.
    """
    own = np.maximum(distances_mk[:, min(kernel_neighbor, distances_mk.shape[1]) - 1], TINY).astype(np.float64)
    kernel = np.exp(-(distances_mk.astype(np.float64) ** 2) / (own[:, None] * width_mk))
    if theta > 0:
        kernel /= _batch_share(batch_mk) ** theta
    kernel = np.maximum(kernel, TINY)
    return np.asarray(kernel / kernel.sum(axis=1, keepdims=True), dtype=np.float32)
