"""Random walks along an operator for some of a step's cells -> where they lead.

The numbers that a walk draws belong to its cell, so that a rank which walks from its share of the cells gets there
where one process would: `Operator.path` of all cells, restricted to the share.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from schelix_scale.graph.operator import Operator

if TYPE_CHECKING:
    from collections.abc import Callable

TOGETHER = 32


def walk(operator: Operator, rows: np.ndarray, draw_sm: np.ndarray) -> np.ndarray:
    """Follow a walk of s steps from each of ``rows`` (m,); return the cells on its way, (s + 1, m) int64.

    Parameters
    ----------
    draw_sm
        (s, m) numbers in [0, 1): where the next cell lies in the cumulative weights of the one before.
    """
    path_sm = np.empty((len(draw_sm) + 1, len(rows)), np.int64)
    path_sm[0] = rows
    _compiled()(np.asarray(operator.indices_nk), np.asarray(operator.weights_nk), draw_sm, path_sm)
    return path_sm


@cache
def _compiled() -> Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]:
    """Compile the walk, or load it as compiled before; it runs without the interpreter's lock, beside the model."""
    import numba

    compiled: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]
    compiled = numba.njit(cache=True, nogil=True)(_follow)
    return compiled


def _follow(indices_nk: np.ndarray, weights_nk: np.ndarray, draw_sm: np.ndarray, path_sm: np.ndarray) -> float:
    k, n_walks = indices_nk.shape[1], draw_sm.shape[1]
    cumulative = np.empty(k)
    touched = 0.0  # returned, so that touching is not optimised away
    for step in range(draw_sm.shape[0]):
        for first in range(0, n_walks, TOGETHER):
            last = min(first + TOGETHER, n_walks)
            for walk in range(first, last):  # rows lie anywhere: ask the memory for many before waiting for one
                here = path_sm[step, walk]
                touched += weights_nk[here, 0] + weights_nk[here, k // 2] + weights_nk[here, k - 1]
            for walk in range(first, last):
                here, total, passed = path_sm[step, walk], 0.0, 0
                for column in range(k):
                    total += weights_nk[here, column]
                    cumulative[column] = total
                limit = draw_sm[step, walk] * total
                for column in range(k - 1):
                    passed += cumulative[column] <= limit
                path_sm[step + 1, walk] = passed
            for walk in range(first, last):  # of a row's indices one is needed, which lies in one line of the memory
                touched += indices_nk[path_sm[step, walk], path_sm[step + 1, walk]]
            for walk in range(first, last):
                path_sm[step + 1, walk] = indices_nk[path_sm[step, walk], path_sm[step + 1, walk]]
    return touched
