"""Cached features on disk -> torch minibatches of cells and of their positives. No gradient can reach them.

Hop 0 of a step's own cells may come from their expression instead, and then move with learned loadings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from schelix_scale.graph.operator import Operator, row_blocks
from schelix_scale.model.loadings import Loadings, Values
from schelix_scale.training.expression import Expressed


@dataclass(frozen=True)
class Cells:
    """Model inputs of a batch of m cells.

    Attributes
    ----------
    anchor, variant
        (m, T, a) and (m, T, v) diffused features.
    batch
        (m,) batch codes.
    values
        Of the genes of both streams, for learned loadings; None where these are frozen.
    """

    anchor: Tensor
    variant: Tensor
    batch: Tensor
    values: tuple[Values, Values | None] | None = None

    def through(self, loadings: Loadings | None) -> Cells:
        """Return the cells with hop 0 moved by learned loadings, with their gradient; as they are if frozen."""
        if loadings is None or self.values is None:
            return self
        moves = loadings(*self.values)
        anchor, variant = (
            torch.cat([hops[:, :1] + move[:, None], hops[:, 1:]], dim=1)
            for hops, move in zip((self.anchor, self.variant), moves, strict=True)
        )
        return replace(self, anchor=anchor, variant=variant)


@dataclass(frozen=True)
class CachedFeatures:
    """One version of the stop-gradient cache: diffused features and the operator that made them.

    Attributes
    ----------
    operator_id
        Names the version.
    anchor_nta, variant_ntv
        (n, T, a) and (n, T, v) memory maps, hops ascending; v is 0 in a single-stream run.
    """

    operator_id: str
    operator: Operator
    anchor_nta: np.ndarray
    variant_ntv: np.ndarray
    batch_n: np.ndarray

    @property
    def n_cells(self) -> int:
        """Number of cells, n."""
        return len(self.batch_n)

    def cells(self, rows: np.ndarray, device: torch.device, expressed: Expressed | None = None) -> Cells:
        """Copy rows (m,) from the memory maps to the device; hop 0, the first one, as ``expressed`` if given."""
        hops = [np.ascontiguousarray(self.anchor_nta[rows]), np.ascontiguousarray(self.variant_ntv[rows])]
        values = None
        if expressed is not None:
            hops[0][:, 0], hops[1][:, 0] = expressed.anchor, expressed.variant
            if expressed.anchor_values is not None:
                of_variants = expressed.variant_values
                values = (
                    _to_values(expressed.anchor_values, device),
                    None if of_variants is None else _to_values(of_variants, device),
                )
        anchor, variant = (torch.from_numpy(array).to(device) for array in hops)
        return Cells(anchor, variant, torch.from_numpy(self.batch_n[rows].astype(np.int64)).to(device), values)

    def scales(self) -> tuple[float, float]:
        """RMS norm of the last hop of the Anchor and of the Variant stream (1 for an empty one)."""
        return _rms_norm(self.anchor_nta), _rms_norm(self.variant_ntv)


def _to_values(x_nh: sparse.csr_matrix, device: torch.device) -> Values:
    parts = x_nh.data, x_nh.indices.astype(np.int64), x_nh.indptr[:-1].astype(np.int64)
    return Values(*(torch.from_numpy(part).to(device) for part in parts))


def _rms_norm(features_ntd: np.ndarray) -> float:
    total = 0.0
    for start, stop in row_blocks(len(features_ntd)):
        total += float(np.square(features_ntd[start:stop, -1], dtype=np.float64).sum())
    return float(np.sqrt(total / len(features_ntd))) or 1.0
