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
HARDLY = 0.01  # of a label's usual votes, shared by all labels


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
        """Code a column by its text; missing values, empty text and "unknown" (any case) are not known.

        A whole number is written without decimals: a missing value elsewhere makes floats of integers.
        """
        import pandas as pd

        raw, found = pd.factorize(np.asarray(values, dtype=object))
        texts = [_text(value) for value in found]
        names = tuple(sorted({text for text in texts if text.casefold() not in MISSING}))
        place = {name: code for code, name in enumerate(names)}
        codes = np.array([*(place.get(text, NOT_LABELLED) for text in texts), NOT_LABELLED], dtype=np.int32)
        return cls(key, names, codes[raw])


def _text(value: object) -> str:
    whole = isinstance(value, float | np.floating) and float(value).is_integer()
    return str(int(value) if whole else value).strip()  # type: ignore[call-overload]


def vote(distances_mk: np.ndarray, code_mk: np.ndarray, n_labels: int) -> np.ndarray:
    """Share of each label among the nearest labelled neighbours, weighted by distance.

    The 15 nearest of those count, by exp(-(d / d_7)^2), with d_7 the distance of the seventh, or of the last if there
    are fewer.

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
    code = np.take_along_axis(code_mk, order, axis=1).astype(np.int64)
    distance = np.take_along_axis(distances_mk, order, axis=1).astype(np.float64)
    rows, labelled = np.arange(len(code)), code != NOT_LABELLED
    last = np.clip(labelled.sum(axis=1), 1, min(WIDTH, distance.shape[1])) - 1
    width = np.maximum(distance[rows, last], 1e-8)
    weight = np.exp(-((distance / width[:, None]) ** 2)) * labelled
    cells = rows[:, None] * (n_labels + 1) + np.where(labelled, code, n_labels)
    sums = np.bincount(cells.ravel(), weight.ravel(), len(code) * (n_labels + 1))
    shares = sums.reshape(len(code), n_labels + 1)[:, :n_labels]
    total = shares.sum(axis=1, keepdims=True)
    return np.asarray(np.where(total > 0, shares / np.maximum(total, TINY), 1.0 / max(n_labels, 1)))


def batch_weights(batch_n: np.ndarray, enough: int = 1) -> np.ndarray:
    """Weights of cells that give every batch of ``enough`` cells the same mass; they sum to 1.

    A batch of fewer cells has less, in proportion: no single cell may weigh as much as a large batch.
    """
    _, place, sizes = np.unique(batch_n, return_inverse=True, return_counts=True)
    mass = np.minimum(sizes, enough) / sizes
    return np.asarray(mass[place] / (mass * sizes).sum())


def effective_count(weight_s: np.ndarray) -> float:
    """How many cells of equal weight say as much as these: (sum w)^2 / sum w^2 (Kish 1965)."""
    return float(weight_s.sum() ** 2 / (weight_s**2).sum())


@dataclass(frozen=True)
class LabelCalibration:
    """What turns votes into probabilities and label sets.

    Attributes
    ----------
    temperature, floor
        p is proportional to (vote + floor)^(1 / temperature).
    scores_s, weight_s
        Ascending 1 - p(true label) of held-out cells, and their weights, which sum to 1.
    usual_ll
        (l, l) mean votes of held-out cells of each label, see `usual_votes`.
    """

    temperature: float
    floor: float
    scores_s: np.ndarray
    weight_s: np.ndarray
    usual_ll: np.ndarray

    @classmethod
    def fit(
        cls,
        votes_sl: np.ndarray,
        true_s: np.ndarray,
        weight_s: np.ndarray,
        batch_s: np.ndarray | None = None,
        else_ll: np.ndarray | None = None,
    ) -> LabelCalibration:
        """Fit on held-out cells: votes (s, l), true labels (s,), weights (s,) and, if there are several, batches (s,).

        ``else_ll`` are votes of a label's cells where hardly any was held out, see `usual_votes`.

        What is least is the mean of the batches' negative log likelihood and its standard deviation between batches,
        together: the next batch may be one of the harder ones.
        """
        from scipy.optimize import minimize

        weight_s = weight_s / weight_s.sum()
        rows = np.arange(len(true_s))
        place_s = np.zeros(len(true_s), np.int64) if batch_s is None else np.unique(batch_s, return_inverse=True)[1]
        mass_b = np.bincount(place_s, weight_s)
        bounds = [tuple(np.log(FLOORS)), tuple(np.log(TEMPERATURES))]

        def loss(parameters: np.ndarray) -> float:
            floor, temperature = np.exp(parameters)
            probabilities = sharpen(votes_sl, float(temperature), float(floor))
            surprise_s = -np.log(np.maximum(probabilities[rows, true_s], TINY))
            mean_b = np.bincount(place_s, weight_s * surprise_s) / mass_b
            mean = float(mass_b @ mean_b)
            return mean + float(np.sqrt(mass_b @ (mean_b - mean) ** 2))

        found = minimize(loss, np.log([0.02, 1.0]), method="Nelder-Mead", bounds=bounds, options={"maxiter": 200})
        floor, temperature = (float(value) for value in np.exp(found.x))
        scores = 1 - sharpen(votes_sl, temperature, floor)[rows, true_s]
        order = np.argsort(scores, kind="stable")
        usual = usual_votes(votes_sl, true_s, weight_s, else_ll)
        return cls(temperature, floor, scores[order], weight_s[order], usual)

    def probabilities(self, votes_ml: np.ndarray) -> np.ndarray:
        """Calibrated probabilities (m, l), rows sum to 1."""
        return sharpen(votes_ml, self.temperature, self.floor)

    def oddness(self, votes_ml: np.ndarray) -> np.ndarray:
        """By how much votes are unlike those that cells of any one label usually get, (m,) nats; below 0 if less mixed.

        The cross entropy of a cell's votes and a label's usual ones, less the entropy of these, for the label for which
        it is least. Cells of some types often have neighbours of another; between two that are hardly ever mixed are
        cells of a type that has no label. What any label's cells often have is not odd, so that a label whose cells lie
        among several others hides what is between these.
        """
        log_ll = np.log(self.usual_ll)
        return np.asarray(((self.usual_ll * log_ll).sum(axis=1) - votes_ml @ log_ll.T).min(axis=1))

    def threshold(self, coverage: float) -> float:
        """Least probability of the labels of a set, such that sets of held-out cells have the true one so often.

        The split conformal quantile (Vovk et al. 2005): that of ``coverage`` with a new cell of any score counted in,
        one of as many as the weights are worth. 0, so that every label is in every set, if these are too few for it.
        The coverage holds for cells that are like the held-out ones; cells of one batch are not independent, so that
        of a single new batch varies around it, the more the fewer batches were held out.
        """
        extra = 1.0 / (effective_count(self.weight_s) + 1)
        reached = np.cumsum(self.weight_s) * (1 - extra) >= coverage - 1e-12
        return float(1 - self.scores_s[np.argmax(reached)]) if reached.any() else 0.0

    def sets(self, probabilities_ml: np.ndarray, coverage: float) -> np.ndarray:
        """Return which labels are in each cell's set, (m, l) bool; the likeliest always is."""
        chosen = probabilities_ml >= self.threshold(coverage) - 1e-12
        chosen[np.arange(len(chosen)), probabilities_ml.argmax(axis=1)] = True
        return np.asarray(chosen)


def usual_votes(
    votes_sl: np.ndarray, true_s: np.ndarray, weight_s: np.ndarray, else_ll: np.ndarray | None = None
) -> np.ndarray:
    """Mean votes (l, l) of cells of each label, one cell more counted in, that has those of ``else_ll``.

    Without these it votes for its label alone. No label has a share of less than .01 / l: that two were not mixed in
    these cells does not say that they never are.
    """
    n_labels = votes_sl.shape[1]
    weight_s = weight_s / max(weight_s.sum(), TINY) * len(weight_s)
    sum_ll = np.eye(n_labels) if else_ll is None else else_ll.copy()
    np.add.at(sum_ll, true_s, votes_sl * weight_s[:, None])
    mean_ll = sum_ll / sum_ll.sum(axis=1, keepdims=True)
    return np.asarray((1 - HARDLY) * mean_ll + HARDLY / n_labels)


def sharpen(votes_ml: np.ndarray, temperature: float, floor: float) -> np.ndarray:
    """Return (vote + floor)^(1 / temperature), rows normalised to 1."""
    logits = np.log(votes_ml + floor) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    powers = np.exp(logits)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class NoveltyCalibration:
    """Novelty scores of held-out cells, of such as are not novel: ascending, with weights (sum 1)."""

    scores_s: np.ndarray
    weight_s: np.ndarray

    @classmethod
    def fit(cls, scores_s: np.ndarray, weight_s: np.ndarray) -> NoveltyCalibration:
        """Sort the scores."""
        order = np.argsort(scores_s, kind="stable")
        return cls(scores_s[order], weight_s[order] / weight_s.sum())

    @property
    def least(self) -> float:
        """The least p-value that these cells can tell."""
        return 1.0 / (effective_count(self.weight_s) + 1)

    def p_values(self, scores_m: np.ndarray, own_m: np.ndarray | float = 0.0) -> np.ndarray:
        """Conformal p-values (m,): how often a cell that is not novel scores as high, itself counted in.

        One a cell, not adjusted for how many cells are tested: of n cells that are not novel, n p are at or below p.
        ``own_m`` are the cells' weights if they are among the held-out ones, so that none is counted twice.
        """
        extra = self.least
        above = np.r_[np.cumsum(self.weight_s[::-1])[::-1], 0.0]
        place = np.searchsorted(self.scores_s, scores_m, side="left")
        return np.asarray(np.clip((above[place] - own_m) * (1 - extra) + extra, extra, 1.0))


def expected_calibration_error(confidence_m: np.ndarray, correct_m: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width bins, weighted by cells (Naeini et al. 2015)."""
    place = np.minimum((confidence_m * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    gap = np.abs(np.bincount(place, confidence_m, bins) - np.bincount(place, correct_m.astype(float), bins))
    return float(gap.sum() / max(count.sum(), 1))
