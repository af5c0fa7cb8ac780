"""Votes of neighbours -> how novel a cell is: those of a type without a label lie between types that have one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from schelix_scale.graph.vectors import unit_rows
from schelix_scale.mapping.profiles import NEIGHBORS, Profiles
from schelix_scale.mapping.reference import Frozen
from schelix_scale.transfer import NOT_LABELLED, LabelCalibration, Labels, batch_weights, usual_votes, vote

ENOUGH = 100  # cells from which on a batch has its full weight
OF_LABEL = 200  # cells of a label, at most, whose votes in the reference are counted


def oddest_votes(
    labels: Sequence[Labels], fits: Sequence[LabelCalibration], indices_mk: np.ndarray, distances_mk: np.ndarray
) -> np.ndarray:
    """Return how odd votes of cells with these neighbours are, (m,): of the label column of which they are oddest."""

    def said() -> Iterable[np.ndarray]:
        for column, fit in zip(labels, fits, strict=True):  # one after the other: votes of all can be too many
            near = column.code_n[indices_mk]
            yield odd_votes(fit, vote(distances_mk, near, len(column.names)), near)

    return oddest(said(), len(indices_mk))


def odd_votes(fit: LabelCalibration, votes_ml: np.ndarray, code_mk: np.ndarray) -> np.ndarray:
    """Return how odd votes are, (m,), see `LabelCalibration.oddness`.

    Of a cell none of whose neighbours has a label (code -1) nothing is said: -inf.
    """
    return np.where((code_mk != NOT_LABELLED).any(axis=1), fit.oddness(votes_ml), -np.inf)


def often(
    labels: Sequence[Labels],
    profiles: Profiles,
    indices_mk: np.ndarray,
    distances_mk: np.ndarray,
    batch: int | None = None,
) -> np.ndarray:
    """Return how far the 30 neighbours of cells can all be of the label that most votes are for, (m,).

    1, or less where fewer of the profiles have it: expression of such a type is held beside that of others, and is not
    what is around it however well it is known. Of several columns the least counts.

    Parameters
    ----------
    indices_mk, distances_mk
        (m, k) neighbours in the reference.
    batch
        That whose cells are left out.
    """
    rows = profiles.rows if batch is None else profiles.rows[profiles.batch_p != batch]
    least = np.ones(len(indices_mk))
    for column in labels:
        code = column.code_n[rows]
        labelled = code != NOT_LABELLED
        if not labelled.any():
            continue
        count = np.bincount(code[labelled], minlength=len(column.names)) / labelled.mean()
        near = column.code_n[indices_mk]
        top = vote(distances_mk, near, len(column.names)).argmax(axis=1)
        voted = (near != NOT_LABELLED).any(axis=1)
        least = np.minimum(least, np.where(voted, count[top] / NEIGHBORS, 1.0))
    return least


def odd_elsewhere(
    fit: LabelCalibration,
    votes_sl: np.ndarray,
    code_sk: np.ndarray,
    true_s: np.ndarray,
    batch_s: np.ndarray,
    chosen: np.ndarray,
    else_ll: np.ndarray | None = None,
) -> np.ndarray:
    """Return how odd votes of held-out cells are, (s,), by what is usual for held-out cells of other batches.

    Cells of a new batch have no part in what is usual, either.

    Parameters
    ----------
    votes_sl, code_sk
        (s, l) votes of the cells, and (s, k) labels of their neighbours.
    true_s, batch_s
        Their own labels, and batches.
    chosen
        Numbers of the cells that tell what is usual.
    else_ll
        See `votes_within`.
    """
    odd_s = np.full(len(batch_s), -np.inf)
    for batch in np.unique(batch_s):
        others = chosen[batch_s[chosen] != batch]
        usual = usual_votes(votes_sl[others], true_s[others], batch_weights(batch_s[others], ENOUGH), else_ll)
        mine = batch_s == batch
        odd_s[mine] = odd_votes(replace(fit, usual_ll=usual), votes_sl[mine], code_sk[mine])
    return odd_s


def votes_within(frozen: Frozen, column: Labels) -> np.ndarray:
    """Return mean votes (l, l) of the reference's own cells of each label, of their neighbours in all batches.

    That is how cells of a label vote that one batch alone has, so that none can be held out. A label without a cell
    that has a labelled neighbour votes for itself.
    """
    rng, found_ll = np.random.default_rng([frozen.config.seed, 0x0DD]), np.eye(len(column.names))
    for label in range(len(column.names)):
        rows = np.flatnonzero(column.code_n == label)
        rows = np.sort(rng.choice(rows, min(OF_LABEL, len(rows)), replace=False))
        near = np.asarray(frozen.neighbor_operator.indices_nk[rows])
        rows, near = (part[(column.code_n[near] != NOT_LABELLED).any(axis=1)] for part in (rows, near))
        if not len(rows):
            continue
        own, theirs = unit_rows(frozen.anchor_na[rows]), unit_rows(frozen.anchor_na[near.ravel()])
        distance = 1 - np.einsum("md,mkd->mk", own, theirs.reshape(*near.shape, -1))
        found_ll[label] = vote(distance, column.code_n[near], len(column.names)).mean(axis=0)
    return found_ll


def oddest(said: Iterable[np.ndarray], count: int) -> np.ndarray:
    """Return the highest of what label columns say of so many cells, (m,); 0 where none says anything."""
    highest = np.full(count, -np.inf)
    for odd_m in said:
        np.maximum(highest, odd_m, out=highest)
    return np.where(np.isfinite(highest), highest, 0.0)
