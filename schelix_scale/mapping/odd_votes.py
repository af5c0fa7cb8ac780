"""Votes of neighbours -> how novel a cell is: those of a type without a label lie between types that have one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from schelix_scale.transfer import NOT_LABELLED, LabelCalibration, batch_weights, usual_votes

ENOUGH = 100  # cells from which on a batch has its full weight


def odd_votes(fit: LabelCalibration, votes_ml: np.ndarray, code_mk: np.ndarray) -> np.ndarray:
    """Return how odd votes are, (m,), see `LabelCalibration.oddness`.

    0 of a cell none of whose neighbours has a label (code -1): nothing is said of it.
    """
    return np.where((code_mk != NOT_LABELLED).any(axis=1), fit.oddness(votes_ml), 0.0)


def odd_elsewhere(
    fit: LabelCalibration,
    votes_sl: np.ndarray,
    code_sk: np.ndarray,
    true_s: np.ndarray,
    batch_s: np.ndarray,
    chosen: np.ndarray,
) -> np.ndarray:
    """Return how odd votes of held-out cells are, (s,), by what is usual in other batches than their own.

    A new batch has no part in what is usual, either.

    Parameters
    ----------
    votes_sl, code_sk
        (s, l) votes of the cells, and (s, k) labels of their neighbours.
    true_s, batch_s
        Their own labels, and batches.
    chosen
        Numbers of the cells that tell what is usual.
    """
    odd_s = np.zeros(len(batch_s))
    for batch in np.unique(batch_s):
        others = chosen[batch_s[chosen] != batch]
        usual = usual_votes(votes_sl[others], true_s[others], batch_weights(batch_s[others], ENOUGH))
        mine = batch_s == batch
        odd_s[mine] = odd_votes(replace(fit, usual_ll=usual), votes_sl[mine], code_sk[mine])
    return odd_s


def oddest(said: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Return the highest of what several label columns say of so many cells, (m,); 0 without any."""
    return np.max(said, axis=0) if said else np.zeros(count)
