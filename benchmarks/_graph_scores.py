"""Found neighbours -> recall against exact ones of sampled rows, by a computation that shares nothing with schelix."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from _graph_features import unit_rows

BLOCK = 8_192
TOLERANCE = 1e-6  # of a cosine: ties (copies of a cell) are not held against a search


@dataclass(frozen=True)
class Recall:
    """Mean share of the k exact neighbours that were found, its 95 % normal confidence interval, rows, and their sd."""

    recall: float
    low: float
    high: float
    rows: int
    sd: float


def sampled_rows(n: int, m: int, seed: int) -> np.ndarray:
    """Return the m rows that all contestants are judged on, sorted (all rows if there are no more)."""
    return np.sort(np.random.default_rng([seed, 3]).choice(n, min(n, m), replace=False))


def exact_limits(features_nd: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """Return the cosine between each of ``rows`` (m,) and its k-th nearest other row, exhaustively, in float64."""
    queries = unit_rows(np.asarray(features_nd[rows], np.float64))
    best = np.full((len(rows), k), -np.inf)
    for start in range(0, len(features_nd), BLOCK):
        block = unit_rows(np.asarray(features_nd[start : start + BLOCK], np.float64))
        cosines = queries @ block.T
        own = np.flatnonzero((rows >= start) & (rows < start + len(block)))
        cosines[own, rows[own] - start] = -np.inf
        best = np.partition(np.concatenate([best, cosines], axis=1), -k, axis=1)[:, -k:]
    return best[:, 0]


def others(found_mk: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """Return the first k found (m, k) that are not the row itself; -1, nothing found, stays."""
    keep = found_mk != rows[:, None]
    keep &= np.cumsum(keep, axis=1) <= k
    full = np.full((len(rows), k), -1, np.int64)
    full[np.nonzero(keep)[0], (np.cumsum(keep, axis=1) - 1)[keep]] = found_mk[keep]
    return full


def recall_of(features_nd: np.ndarray, rows: np.ndarray, limits: np.ndarray, found_mk: np.ndarray, k: int) -> Recall:
    """Score what was found for ``rows``: a neighbour counts if it is as near as the k-th exact one, and once only.

    Cosines are computed anew from row numbers.
    """
    found = others(found_mk, rows, k)
    ordered = np.argsort(found, axis=1, kind="stable")
    ranked = np.take_along_axis(found, ordered, axis=1)
    valid = ranked >= 0
    valid[:, 1:] &= ranked[:, 1:] != ranked[:, :-1]
    queries = unit_rows(np.asarray(features_nd[rows], np.float64))
    near = np.asarray(features_nd[np.maximum(ranked, 0).ravel()], np.float64)
    cosines = np.einsum("md,mkd->mk", queries, unit_rows(near).reshape(*ranked.shape, -1))
    hits = (valid & (cosines >= limits[:, None] - TOLERANCE)).mean(axis=1)
    mean, sd = float(hits.mean()), float(hits.std(ddof=1))
    half = 1.96 * sd / math.sqrt(len(rows))
    return Recall(mean, max(0.0, mean - half), min(1.0, mean + half), len(rows), sd)


def agreement(recall: Recall, audit: dict[str, Any]) -> dict[str, Any]:
    """Compare the recall with that of an audit on other rows: is their difference one that sampling explains (95 %)?

    Both sample the same rows, so both have the spread that the larger sample, ours, shows. Near recall 1 few rows miss
    anything, and a sample without them has too narrow an interval; ``inside`` says whether ours is in the audit's.
    """
    allowed = 1.96 * recall.sd * math.sqrt(1 / recall.rows + 1 / audit["cells"])
    difference = recall.recall - audit["recall"]
    inside = audit["low"] - TOLERANCE <= recall.recall <= audit["high"] + TOLERANCE
    agree = abs(difference) <= allowed + TOLERANCE
    return {"difference": difference, "allowed": allowed, "agree": bool(agree), "inside": bool(inside)}


def as_row(recall: Recall) -> dict[str, Any]:
    """Return the fields for JSON, rounded."""
    return {name: round(value, 6) for name, value in asdict(recall).items()}
