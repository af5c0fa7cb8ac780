"""Cached features on disk -> torch minibatches of cells and of their positives. No gradient can reach them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from schelix_scale.graph.operator import Operator, row_blocks


@dataclass(frozen=True)
class Cells:
    """Model inputs of a batch of m cells.

    Attributes
    ----------
    anchor, variant
        (m, T, a) and (m, T, v) diffused features.
    batch
        (m,) batch codes.
    """

    anchor: Tensor
    variant: Tensor
    batch: Tensor


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

    def cells(self, rows: np.ndarray, device: torch.device) -> Cells:
        """Copy rows (m,) from the memory maps to the device."""
        return Cells(
            torch.from_numpy(np.ascontiguousarray(self.anchor_nta[rows])).to(device),
            torch.from_numpy(np.ascontiguousarray(self.variant_ntv[rows])).to(device),
            torch.from_numpy(self.batch_n[rows].astype(np.int64)).to(device),
        )

    def scales(self) -> tuple[float, float]:
        """RMS norm of the last hop of the Anchor and of the Variant stream (1 for an empty one)."""
        return _rms_norm(self.anchor_nta), _rms_norm(self.variant_ntv)


def _rms_norm(features_ntd: np.ndarray) -> float:
    total = 0.0
    for start, stop in row_blocks(len(features_ntd)):
        total += float(np.square(features_ntd[start:stop, -1], dtype=np.float64).sum())
    return float(np.sqrt(total / len(features_ntd))) or 1.0
