"""P-values of novelty, and what cells are voted to be -> p-values against held-out cells that are voted to be the same.

Some labels are of cells that look novel more often than others: few cells of the reference, or many kinds of them,
have them. A new cell that is voted to be of another is not to be compared with these alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from schelix_scale.transfer import NOT_LABELLED, Labels, effective_count, vote

ALL_COUNT = 500.0  # held-out cells of all labels together count as so many of the same label


@dataclass(frozen=True)
class ByLabel:
    """P-values of held-out cells, and what each is voted to be.

    Attributes
    ----------
    p_s, weight_s
        (s,) p-values, ascending, and the cells' weights.
    code_cs
        (c, s) of each label column: the label that most of a cell's votes are for, -1 if there is none.
    """

    p_s: np.ndarray
    weight_s: np.ndarray
    code_cs: np.ndarray

    @classmethod
    def fit(cls, p_s: np.ndarray, weight_s: np.ndarray, code_cs: np.ndarray) -> ByLabel:
        """Sort the cells."""
        order = np.argsort(p_s, kind="stable")
        return cls(p_s[order], weight_s[order], code_cs[:, order])

    def p_values(self, p_m: np.ndarray, code_cm: np.ndarray) -> np.ndarray:
        """P-values (m,): how often a cell that is not novel, and is voted to be the same, has as small a one.

        Mondrian conformal p-values (Vovk et al. 2005, section 4.5), by what a cell is voted to be, each with the cell
        itself counted in; the weighted mean of these, by how many cells there are of a label, and of ``p_m``, which
        counts as 500 cells. Of several label columns, the highest. Of a cell without votes, ``p_m``.
        """
        if not len(self.code_cs):
            return p_m
        of_columns = [self._of_column(*both, p_m) for both in zip(self.code_cs, code_cm, strict=True)]
        return np.asarray(np.max(of_columns, axis=0))

    def least(self, p: float) -> float:
        """Return the least p-value that cells of every label can have, if ``p`` is that of all cells together."""
        found = [p]
        for code_s in self.code_cs:
            code = np.unique(code_s)
            found += self._of_column(code_s, code, np.full(len(code), p)).tolist()
        return max(found)

    def _of_column(self, code_s: np.ndarray, code_m: np.ndarray, p_m: np.ndarray) -> np.ndarray:
        out = p_m.astype(np.float64)
        for code in np.unique(code_m[code_m != NOT_LABELLED]):
            same, mine = code_s == code, code_m == code
            if not same.any():
                continue
            count = effective_count(self.weight_s[same])
            share = np.r_[0.0, np.cumsum(self.weight_s[same])] / self.weight_s[same].sum()
            as_small = share[np.searchsorted(self.p_s[same], p_m[mine], side="right")]
            own = (count * as_small + 1) / (count + 1)
            out[mine] = (ALL_COUNT * p_m[mine] + count * own) / (ALL_COUNT + count)
        return np.minimum(out, 1.0)


def voted(labels: Sequence[Labels], indices_mk: np.ndarray, distances_mk: np.ndarray) -> np.ndarray:
    """Return the label that most votes of each cell's neighbours are for, (c, m) int32; -1 where none has a label."""
    out = np.full((len(labels), len(indices_mk)), NOT_LABELLED, np.int32)
    for place, column in enumerate(labels):
        near = column.code_n[indices_mk]
        top = vote(distances_mk, near, len(column.names)).argmax(axis=1)
        out[place] = np.where((near != NOT_LABELLED).any(axis=1), top, NOT_LABELLED)
    return out
