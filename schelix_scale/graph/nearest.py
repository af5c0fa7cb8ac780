"""Queries and candidates -> the nearest candidates, by matrix products over blocks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

FLOOD = 16  # times k hits a query: so many have ties, and are ranked whole
FLOOR_COLUMNS = 1024


def nearest(scores_qc: np.ndarray, k: int, floor_q: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns of the k highest scores of each row, highest first, and those scores, both (q, k).

    Parameters
    ----------
    scores_qc
        (q, c) scores, c >= k; what must not be chosen is -inf, and leaves k others.
    floor_q
        (q,) scores that at least k of the row's scores reach, as far as they are known: ranking is quicker with them.
    """
    rows, width = scores_qc.shape
    if floor_q is None:
        head = scores_qc[:, : max(k, min(width, FLOOR_COLUMNS))]
        floor_q = np.partition(head, head.shape[1] - k, axis=1)[:, head.shape[1] - k]
        floor_q = np.where(np.isfinite(floor_q), floor_q, -np.finfo(np.float32).max)
    hits = np.flatnonzero(scores_qc >= floor_q[:, None])
    row_h, column_h = np.divmod(hits, width)
    too_few = bool((np.bincount(row_h, minlength=rows) < k).any())  # a floor that not k scores reach after all
    if too_few or len(hits) > FLOOD * k * rows:
        columns = np.argpartition(-scores_qc, k - 1, axis=1)[:, :k]
        values = np.take_along_axis(scores_qc, columns, axis=1)
        order = np.lexsort((columns, -values), axis=1)
        return np.take_along_axis(columns, order, axis=1), np.take_along_axis(values, order, axis=1)
    value_h = scores_qc.ravel()[hits]
    order = np.argsort(4.0 * row_h - value_h)  # by row, then by score: cosines are at most 1
    chosen = order[np.searchsorted(row_h, np.arange(rows))[:, None] + np.arange(k)]
    return column_h[chosen], value_h[chosen]


def nearest_in_blocks(
    unit_md: np.ndarray, blocks: Iterable[tuple[int, np.ndarray]], k: int, own_rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k nearest of all rows to queries (m, d), by brute force: row numbers and cosine distances, (m, k).

    Parameters
    ----------
    blocks
        First row number and rows of norm 1, block after block; the first one has more than k rows.
    own_rows
        (m,) the queries' own row numbers, which are left out.
    """
    best = np.empty((len(unit_md), 0), np.int64)
    values = np.empty((len(unit_md), 0), np.float32)
    for start, unit in blocks:
        scores = unit_md @ unit.T
        if own_rows is not None:
            inside = np.flatnonzero((own_rows >= start) & (own_rows < start + len(unit)))
            scores[inside, own_rows[inside] - start] = -np.inf
        scores = np.hstack([values, scores])
        floor = values[:, -1] if values.shape[1] == k else None
        known = best.shape[1]
        columns, values = nearest(scores, min(k, scores.shape[1] - (own_rows is not None)), floor)
        old = np.take_along_axis(best, np.minimum(columns, known - 1), axis=1) if known else columns
        best = np.where(columns < known, old, start + columns - known)
    return best, np.maximum(1 - values, 0)


def distinct(numbers: np.ndarray) -> np.ndarray:
    """Return the different numbers, sorted; quicker than `numpy.unique`, which goes through a hash table."""
    ordered = np.sort(numbers, axis=None)
    keep = np.ones(len(ordered), bool)
    keep[1:] = ordered[1:] != ordered[:-1]
    return np.asarray(ordered[keep])
