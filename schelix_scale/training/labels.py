"""Labels that some cells have -> cells of their kind, towards which the others are pulled.

What is drawn belongs to a walk: a rank needs the walks of its own cells only.

A walk that is absorbed by the first labelled cell on its way finds each label as often as label propagation
(Zhu et al. 2003) gives it to the cell where the walk began.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from schelix_scale.stores.known_labels import UNKNOWN


@dataclass(frozen=True)
class Labels:
    """Known labels of cells, arranged for drawing cells of a label evenly over its batches.

    Attributes
    ----------
    label_n
        (n,) codes, -1 where the label is unknown.
    cells_u
        (u,) the labelled cells, ordered by label, then batch.
    start_v
        (v + 1,) where each of the v groups of one label and batch begins in ``cells_u``.
    group_l
        (l + 1,) which groups each of the l labels has.
    """

    label_n: np.ndarray
    cells_u: np.ndarray
    start_v: np.ndarray
    group_l: np.ndarray

    @classmethod
    def arrange(cls, label_n: np.ndarray, batch_n: np.ndarray) -> Labels:
        """Sort the labelled cells by label and batch."""
        known = np.flatnonzero(label_n != UNKNOWN)
        order = known[np.lexsort((batch_n[known], label_n[known]))]
        label, batch = label_n[order], batch_n[order]
        first = np.flatnonzero(np.r_[True, (np.diff(label) != 0) | (np.diff(batch) != 0)][: len(order)])
        group_l = np.searchsorted(label[first], np.arange(int(label_n.max(initial=UNKNOWN)) + 2))
        return cls(label_n, order, np.r_[first, len(order)], group_l)

    def draw(self, label_m: np.ndarray, draw_2m: np.ndarray) -> np.ndarray:
        """Return one cell of each label (m,): a batch that has the label, then a cell of it, both evenly.

        ``draw_2m`` (2, m) are numbers in [0, 1), of the batch and of the cell.
        """
        group = _between(self.group_l[label_m], self.group_l[label_m + 1], draw_2m[0])
        cells: np.ndarray = self.cells_u[_between(self.start_v[group], self.start_v[group + 1], draw_2m[1])]
        return cells

    def redirect(self, path_sm: np.ndarray, share: float, draw_3m: np.ndarray) -> np.ndarray:
        """Return where each walk (its cells one below the other, (s, m)) leads: its end, or a cell of a known label.

        A walk that meets a labelled cell, with probability ``share``, leads to a cell drawn from the label of the first
        one it meets. ``draw_3m`` (3, m) are numbers in [0, 1): of whether it does, and those of `draw`.
        """
        seen = self.label_n[path_sm]
        first = np.argmax(seen != UNKNOWN, axis=0)
        met = seen[first, np.arange(path_sm.shape[1])]
        chosen = np.flatnonzero((met != UNKNOWN) & (draw_3m[0] < share))
        ends: np.ndarray = path_sm[-1].copy()
        ends[chosen] = self.draw(met[chosen], draw_3m[1:, chosen])
        return ends


def _between(low_m: np.ndarray, high_m: np.ndarray, draw_m: np.ndarray) -> np.ndarray:
    """Return integers in [low, high), all as likely if the draws are even in [0, 1)."""
    found: np.ndarray = np.minimum(low_m + (draw_m * (high_m - low_m)).astype(np.int64), high_m - 1)
    return found
