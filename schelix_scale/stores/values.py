"""What expression values are: counts, linear (not integral, not log) or log, decided batch by batch.

What comes in: a sample of cells. What goes out: a `ValueDecision`, whose reason is a sentence for the user's log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse

from schelix_scale.errors import DataError

ValueKind = Literal["counts", "linear", "log"]

# log1p of a million is 13.8 and log2 of it 20: no logarithm of a cell's expression is above.
_LOG_MAX = 20.0
# An explicit "log" is refused only for values that no logarithm reaches.
LOG_LIMIT = 50.0
_CONSTANT = 0.02


@dataclass(frozen=True)
class ValueDecision:
    """The kind of the values and why, as one sentence."""

    kind: ValueKind
    reason: str


def decide_values(
    x_ng: sparse.csr_matrix,
    codes: np.ndarray,
    names: Sequence[str],
    asked: Literal["auto", "counts", "linear", "log"] = "auto",
) -> ValueDecision:
    """Decide what the values of a sample are, per batch and then for all.

    A batch is ``counts`` when all values are integral. Else it is ``log`` when no value is above 20, unless none is
    above 1 (fractions) or the values themselves sum to the same for every cell; those and all others are ``linear``.
    That exp(x) - 1 or 2^x - 1 are integral, or sum to the same for every cell, goes into the reason. Batches of
    counts and of linear values together are ``linear``.

    Parameters
    ----------
    x_ng
        (m, g) sample of cells of all batches, finite and not negative.
    codes
        (m,) batch of each cell, into ``names``.
    names
        Names of the batches.
    asked
        The setting ``data.values``. Anything but auto is taken, unless the values contradict it.

    Raises
    ------
    DataError
        Some batches are log and others not, the asked kind contradicts the values, or there is no value at all.
    """
    if x_ng.nnz == 0:
        raise DataError(f"All values of the {x_ng.shape[0]} sampled cells are zero. Choose another layer (data.layer).")
    if asked != "auto":
        return _as_asked(x_ng, asked)
    found = {names[code]: _decide_batch(x_ng[codes == code]) for code in np.unique(codes)}
    decisions = {name: decision for name, decision in found.items() if decision is not None}
    kinds = {decision.kind for decision in decisions.values()}
    if "log" in kinds and len(kinds) > 1:
        raise _mixed(decisions)
    if len(kinds) == 1:
        kind = kinds.pop()
        reasons = {decision.reason for decision in decisions.values() if decision.reason}
        return ValueDecision(kind, f"{kind}: {_range(x_ng, kind)}{f' ({reasons.pop()})' if len(reasons) == 1 else ''}")
    linear = [name for name, decision in decisions.items() if decision.kind == "linear"]
    return ValueDecision(
        "linear",
        f"linear: values are not integral in {len(linear)} of {len(decisions)} batches ({_list(linear)}) and "
        f"counts in the others, at most {x_ng.max():,.6g}",
    )


def _decide_batch(x_ng: sparse.csr_matrix) -> ValueDecision | None:
    """Decide for one batch; None when it has no value. The reason says what is known beyond range and integrality."""
    data = x_ng.data
    if data.size == 0:
        return None
    if _integral(data):
        return ValueDecision("counts", "")
    if data.max() > _LOG_MAX:
        return ValueDecision("linear", "")
    if (total := _constant_sum(x_ng, data)) is not None:
        return ValueDecision("linear", f"row sums are all about {_round(total)}")
    if data.max() <= 1:
        return ValueDecision("linear", "no value is above 1: fractions")
    values = data.astype(np.float64)
    for name, linear in (("exp(x) - 1", np.expm1(values)), ("2^x - 1", np.exp2(values) - 1)):
        if _nearly_integral(linear):
            return ValueDecision("log", f"{name} is integral: a logarithm of counts that were not normalised")
        if (total := _constant_sum(x_ng, linear)) is not None:
            return ValueDecision("log", f"row sums of {name} are all about {_round(total)}")
    return ValueDecision("log", "")


def _as_asked(x_ng: sparse.csr_matrix, asked: Literal["counts", "linear", "log"]) -> ValueDecision:
    data = x_ng.data
    if asked == "counts" and not _integral(data):
        bad = data[data != np.rint(data)]
        raise DataError(
            f'values="counts" was asked, but {bad.size} of {data.size} sampled values are not integral (first: '
            f'{bad[0]:g}). Set values to "linear" (corrected counts) or "log", or data.layer to the raw counts.'
        )
    if asked == "log" and data.max() > LOG_LIMIT:
        raise DataError(
            f'values="log" was asked, but the largest sampled value is {data.max():,.6g}; logarithms of expression '
            f'stay below 20. Set values to "counts" or "linear", or leave it at "auto".'
        )
    return ValueDecision(asked, f"{asked}: as asked; {_range(x_ng, 'counts' if _integral(data) else 'linear')}")


def _range(x_ng: sparse.csr_matrix, kind: ValueKind) -> str:
    high = float(x_ng.max())
    if kind == "counts":
        return f"all values are integral and at most {high:,.0f}"
    return f"values are not integral and at most {high:,.{1 if high >= 1 else 4}f}"


def _mixed(decisions: dict[str, ValueDecision]) -> DataError:
    log = [name for name, decision in decisions.items() if decision.kind == "log"]
    rest = [name for name, decision in decisions.items() if decision.kind != "log"]
    return DataError(
        f"Batches hold different kinds of values: {len(log)} look log-transformed ({_list(log)}), {len(rest)} do not "
        f"({_list(rest)}). Bring them to one kind before joining, point data.layer to the raw counts, or say what they "
        f'are with data.values ("linear" or "log").'
    )


def _integral(data: np.ndarray) -> bool:
    return bool((data == np.rint(data)).all())


def _nearly_integral(values: np.ndarray) -> bool:
    """Whether back-transformed float32 logarithms are integral; large ones are not known well enough to tell."""
    known = values[values < 1000]
    return known.size > 0 and bool(((np.abs(known - np.rint(known)) < 0.01) & (known > 0.5)).all())


def _constant_sum(x_ng: sparse.csr_matrix, values: np.ndarray) -> float | None:
    """Return the median row sum of ``values`` (stored as in ``x_ng``) when all rows sum to about the same."""
    filled = np.diff(x_ng.indptr) > 0
    sums = np.add.reduceat(values.astype(np.float64), x_ng.indptr[:-1][filled])
    middle = float(np.median(sums))
    spread = float(np.quantile(np.abs(sums - middle), 0.95))
    return middle if sums.size >= 10 and spread <= _CONSTANT * middle else None


def _round(total: float) -> str:
    return f"{float(f'{total:.2g}'):,.10g}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:5])) + (f", ... {len(names) - 5} more" if len(names) > 5 else "")
