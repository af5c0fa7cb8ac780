"""Queries and candidates -> the nearest candidates, by matrix products over blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

from schelix_scale.errors import GraphError
from schelix_scale.graph.vectors import taken

FLOOD = 16  # times k hits a query: so many have ties, and are ranked whole
FLOOR_COLUMNS = 1024
GROUPS = 4  # times k groups of scores, the maxima of which tell what k scores reach
HELD = 4  # times k hits a query are held before the best are chosen
BLOCK_CANDIDATES = 2_048  # scored at once: with a list of queries, about what the second cache level holds
RANKED_VALUES = 2_000_000  # scores that are ranked whole at once


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
    reach = scores_qc >= floor_q[:, None]
    hits_q = np.count_nonzero(reach, axis=1)
    too_few = bool((hits_q < k).any())  # a floor that not k scores reach after all
    if too_few or hits_q.sum() > FLOOD * k * rows:
        step = max(1, RANKED_VALUES // width)
        parts = [_ranked_whole(scores_qc[start : start + step], k) for start in range(0, rows, step)]
        return np.concatenate([columns for columns, _ in parts]), np.concatenate([values for _, values in parts])
    hits = np.flatnonzero(reach)
    row_h, column_h = np.divmod(hits, width)
    value_h = scores_qc.ravel()[hits]
    order = np.argsort(4.0 * row_h - value_h)  # by row, then by score: cosines are at most 1
    chosen = order[np.searchsorted(row_h, np.arange(rows))[:, None] + np.arange(k)]
    return column_h[chosen], value_h[chosen]


def _ranked_whole(scores_qc: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    columns = np.argpartition(-scores_qc, k - 1, axis=1)[:, :k]
    values = np.take_along_axis(scores_qc, columns, axis=1)
    order = np.lexsort((columns, -values), axis=1)
    return np.take_along_axis(columns, order, axis=1), np.take_along_axis(values, order, axis=1)


def nearest_among(
    unit_qd: np.ndarray,
    vectors_nd: np.ndarray,
    candidates: np.ndarray,
    k: int,
    start: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k candidates of highest score of each query, highest first, and the scores, both (q, k).

    Memory does not grow with the number of candidates: they are scored in blocks.

    Parameters
    ----------
    unit_qd
        (q, d) queries of norm 1.
    vectors_nd
        (n, d) rows of norm 1.
    candidates
        (c,) different rows, more than k of them.
    start
        The queries are rows ``start`` and following, and are not their own candidates.

    Returns
    -------
    Columns, which are places in ``candidates``, and scores.
    """
    unit_qd = np.asarray(unit_qd)
    rows, width = len(unit_qd), max(BLOCK_CANDIDATES, 2 * k)
    hits = Hits.none(rows, k)
    for first in range(0, len(candidates), width):
        part = candidates[first : first + width]
        scores = taken(vectors_nd, part) @ unit_qd.T  # this way round is a third quicker than the other
        if start is not None:
            own = np.flatnonzero((part >= start) & (part < start + rows))
            scores[own, part[own] - start] = -np.inf
        if first == 0:
            limit_q = _reached(scores, k)
        places = np.flatnonzero(scores >= limit_q)
        column_h, row_h = np.divmod(places, rows)
        hits = hits.and_more(row_h, first + column_h, scores.ravel()[places])
        if first == 0 or len(hits.value_h) > HELD * k * rows:
            hits = hits.best()
            limit_q = hits.limit(limit_q)
    hits = hits.best()
    if len(hits.value_h) < k * rows:
        raise GraphError("features that are not finite have no neighbours: check their source.")
    return hits.column_h.reshape(rows, k), hits.value_h.reshape(rows, k)


def _reached(scores_cq: np.ndarray, k: int) -> np.ndarray:
    """Return scores (q,) that at least k of each column's (c >= k) reach, and not many more: quick to find.

    These are the k-th highest among the maxima of at least k groups. What must not be chosen is -inf, and has no part.
    """
    n_groups = max(k, min(len(scores_cq), GROUPS * k))
    of_group = scores_cq[: len(scores_cq) // n_groups * n_groups].reshape(-1, n_groups, scores_cq.shape[1]).max(axis=0)
    reached = np.partition(of_group.T.copy(), n_groups - k, axis=1)[:, n_groups - k]
    return np.maximum(reached, -np.finfo(np.float32).max)


@dataclass(frozen=True)
class Hits:
    """Candidates that may be among the k nearest of a query.

    Attributes
    ----------
    rows, k
        Number of queries, and of neighbours wanted.
    row_h, column_h, value_h
        (h,) query, candidate and score of each; those of `best` by query, then highest score first.
    """

    rows: int
    k: int
    row_h: np.ndarray
    column_h: np.ndarray
    value_h: np.ndarray

    @classmethod
    def none(cls, rows: int, k: int) -> Self:
        """Nothing found yet."""
        return cls(rows, k, np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))

    def and_more(self, row_h: np.ndarray, column_h: np.ndarray, value_h: np.ndarray) -> Hits:
        """Add what another block has."""
        pairs = ((self.row_h, row_h), (self.column_h, column_h), (self.value_h, value_h))
        return Hits(self.rows, self.k, *(np.concatenate(pair) for pair in pairs))

    def best(self) -> Hits:
        """Keep the k highest scores of each query."""
        order = np.argsort(4.0 * self.row_h - self.value_h)  # by query, then by score: cosines are at most 1
        row_h = self.row_h[order]
        kept = np.arange(len(row_h)) - np.searchsorted(row_h, np.arange(self.rows))[row_h] < self.k
        return Hits(self.rows, self.k, row_h[kept], self.column_h[order][kept], self.value_h[order][kept])

    def limit(self, limit_q: np.ndarray) -> np.ndarray:
        """Return the score that a further candidate must reach; `best` hits only. Ties go to the earlier one."""
        last = np.searchsorted(self.row_h, np.arange(self.rows), side="right") - 1
        full = np.bincount(self.row_h, minlength=self.rows) == self.k
        found = np.nextafter(self.value_h[last], np.float32(np.inf))
        return np.where(full, np.maximum(found, limit_q), limit_q)


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
