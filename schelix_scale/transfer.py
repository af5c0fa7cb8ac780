"""Neighbours of cells in a reference -> labels with calibrated probabilities, label sets, and novelty p-values.

Everything that is calibrated is calibrated on held-out batches: cells of the reference that were mapped as if their
batch were new, each batch with the same weight, since what a user maps is a batch and not a cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNKNOWN = "unknown"
MISSING = frozenset({"", "nan", "na", "none", "<na>", "unknown"})
NOT_LABELLED = -1
VOTERS, WIDTH = 15, 7
FLOORS, TEMPERATURES = (1e-4, 0.3), (0.3, 5.0)
TINY = 1e-12


@dataclass(frozen=True)
class Labels:
    """Labels of one column of a reference.

    Attributes
    ----------
    key
        The obs column.
    names
        The l labels, sorted.
    code_n
        (n,) int32 codes, -1 where the label is not known.
    """

    key: str
    names: tuple[str, ...]
    code_n: np.ndarray

    @classmethod
    def of_column(cls, key: str, values: Sequence[object]) -> Labels:
        """Code a column; missing values, empty text and "unknown" (any case) are not known."""
        import pandas as pd

        raw, found = pd.factorize(np.asarray(values, dtype=object))
        texts = [str(value).strip() for value in found]
        names = tuple(sorted({text for text in texts if text.casefold() not in MISSING}))
        place = {name: code for code, name in enumerate(names)}
        codes = np.array([*(place.get(text, NOT_LABELLED) for text in texts), NOT_LABELLED], dtype=np.int32)
        return cls(key, names, codes[raw])


def vote(distances_mk: np.ndarray, code_mk: np.ndarray, n_labels: int) -> np.ndarray:
    """Share of each label among the nearest labelled neighbours, weighted by distance.

    The 15 nearest count, by exp(-(d / d_7)^2), with d_7 the distance of the seventh.

    Parameters
    ----------
    distances_mk
        (m, k) distances, nearest first.
    code_mk
        (m, k) labels of the neighbours, -1 where they are not known.

    Returns
    -------
    (m, l) shares, rows sum to 1; uniform for a cell without any labelled neighbour.
    """
    order = np.argsort(code_mk == NOT_LABELLED, axis=1, kind="stable")[:, :VOTERS]  # labelled ones first
    code = np.take_along_axis(code_mk, order, axis=1)
    distance = np.take_along_axis(distances_mk, order, axis=1).astype(np.float64)
    width = np.maximum(distance[:, min(WIDTH, distance.shape[1]) - 1], 1e-8)
    weight = np.exp(-((distance / width[:, None]) ** 2)) * (code != NOT_LABELLED)
    shares = np.zeros((len(code), n_labels))
    rows = np.arange(len(code))
    for column in range(code.shape[1]):
        np.add.at(shares, (rows, code[:, column]), weight[:, column])  # code -1 adds 0
    total = shares.sum(axis=1, keepdims=True)
    return np.asarray(np.where(total > 0, shares / np.maximum(total, TINY), 1.0 / max(n_labels, 1)))


def batch_weights(batch_n: np.ndarray) -> np.ndarray:
    """Weights of cells that give every batch the same mass; they sum to 1."""
    _, place, sizes = np.unique(batch_n, return_inverse=True, return_counts=True)
    return np.asarray(1.0 / (sizes[place] * len(sizes)))


@dataclass(frozen=True)
class LabelCalibration:
    """What turns votes into probabilities and label sets.

    Attributes
    ----------
    temperature, floor
        p is proportional to (vote + floor)^(1 / temperature).
    scores_s, weight_s
        Ascending 1 - p(true label) of held-out cells, and their weights, which sum to 1.
    """

    temperature: float
    floor: float
    scores_s: np.ndarray
    weight_s: np.ndarray

    @classmethod
    def fit(cls, votes_sl: np.ndarray, true_s: np.ndarray, weight_s: np.ndarray) -> LabelCalibration:
        """Fit on held-out cells: votes (s, l), true labels (s,) and weights (s,), by weighted log likelihood."""
        from scipy.optimize import minimize

        weight_s = weight_s / weight_s.sum()
        rows = np.arange(len(true_s))
        bounds = [tuple(np.log(FLOORS)), tuple(np.log(TEMPERATURES))]

        def loss(parameters: np.ndarray) -> float:
            floor, temperature = np.exp(parameters)
            probabilities = sharpen(votes_sl, float(temperature), float(floor))
            return float(-(weight_s * np.log(np.maximum(probabilities[rows, true_s], TINY))).sum())

        found = minimize(loss, np.log([0.02, 1.0]), method="Nelder-Mead", bounds=bounds, options={"maxiter": 200})
        floor, temperature = (float(value) for value in np.exp(found.x))
        scores = 1 - sharpen(votes_sl, temperature, floor)[rows, true_s]
        order = np.argsort(scores, kind="stable")
        return cls(temperature, floor, scores[order], weight_s[order])

    def probabilities(self, votes_ml: np.ndarray) -> np.ndarray:
        """Calibrated probabilities (m, l), rows sum to 1."""
        return sharpen(votes_ml, self.temperature, self.floor)

    def threshold(self, coverage: float) -> float:
        """Least probability of the labels of a set, such that sets of held-out cells have the true one so often.

        The split conformal quantile (Vovk et al. 2005): that of ``coverage`` with a new cell of any score counted in.
        """
        extra = 1.0 / (len(self.scores_s) + 1)
        reached = np.cumsum(self.weight_s) * (1 - extra) >= coverage
        return float(1 - self.scores_s[np.argmax(reached)]) if reached.any() else 0.0

    def sets(self, probabilities_ml: np.ndarray, coverage: float) -> np.ndarray:
        """Return which labels are in each cell's set, (m, l) bool; the likeliest always is."""
        chosen = probabilities_ml >= self.threshold(coverage) - 1e-12
        chosen[np.arange(len(chosen)), probabilities_ml.argmax(axis=1)] = True
        return np.asarray(chosen)


def sharpen(votes_ml: np.ndarray, temperature: float, floor: float) -> np.ndarray:
    """Return (vote + floor)^(1 / temperature), rows normalised to 1."""
    logits = np.log(votes_ml + floor) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    powers = np.exp(logits)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class NoveltyCalibration:
    """Novelty scores of held-out cells whose type the rest of the reference has: ascending, with weights (sum 1)."""

    scores_s: np.ndarray
    weight_s: np.ndarray

    @classmethod
    def fit(cls, scores_s: np.ndarray, weight_s: np.ndarray) -> NoveltyCalibration:
        """Sort the scores."""
        order = np.argsort(scores_s, kind="stable")
        return cls(scores_s[order], weight_s[order] / weight_s.sum())

    def p_values(self, scores_m: np.ndarray) -> np.ndarray:
        """Conformal p-values (m,): how often a cell that is not novel scores as high, itself counted in."""
        extra = 1.0 / (len(self.scores_s) + 1)
        above = np.r_[np.cumsum(self.weight_s[::-1])[::-1], 0.0]
        place = np.searchsorted(self.scores_s, scores_m, side="left")
        return np.asarray(np.minimum(1.0, above[place] * (1 - extra) + extra))


def expected_calibration_error(confidence_m: np.ndarray, correct_m: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by cells (Naeini et al. 2015)."""
    place = np.minimum((confidence_m * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    gap = np.abs(np.bincount(place, confidence_m, bins) - np.bincount(place, correct_m.astype(float), bins))
    return float(gap.sum() / max(count.sum(), 1))
