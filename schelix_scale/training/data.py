"""Cached features on disk -> torch minibatches of cells and of their positives. No gradient can reach them.

Hop 0 of a step's own cells may come from their expression instead, and then move with learned loadings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from schelix_scale.errors import ConfigError
from schelix_scale.graph.operator import Operator
from schelix_scale.graph.vectors import row_blocks, taken
from schelix_scale.model.loadings import Loadings, Values
from schelix_scale.training.expression import Expressed

RESIDENT_SHARE = 0.6  # of the free memory of a GPU that features may take


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

    def part(self, span: slice) -> Cells:
        """Return a view of some of the cells, which have no expression."""
        assert self.values is None
        return Cells(self.anchor[span], self.variant[span], self.batch[span])

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
    resident
        The same and the batch codes on the device of the model, if they are kept there.
    """

    operator_id: str
    operator: Operator
    anchor_nta: np.ndarray
    variant_ntv: np.ndarray
    batch_n: np.ndarray
    resident: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def n_cells(self) -> int:
        """Number of cells, n."""
        return len(self.batch_n)

    def cells(
        self, rows: np.ndarray, device: torch.device, expressed: Expressed | None = None, hops: slice = slice(None)
    ) -> Cells:
        """Bring some hops of rows (m,) to the device; hop 0, the first one, as ``expressed`` if given."""
        if self.resident is not None:
            chosen = to_device(rows, device)
            anchor, variant, batch = (array[chosen] for array in self.resident)
            anchor, variant = anchor[:, hops], variant[:, hops]
        else:
            parts = _hops(self.anchor_nta, rows, hops), _hops(self.variant_ntv, rows, hops), self._batch(rows)
            anchor, variant, batch = (to_device(part, device) for part in parts)
        if expressed is None:
            return Cells(anchor, variant, batch)
        anchor[:, 0], variant[:, 0] = to_device(expressed.anchor, device), to_device(expressed.variant, device)
        if expressed.anchor_values is None:
            return Cells(anchor, variant, batch)
        of_variants = expressed.variant_values
        values = (
            _to_values(expressed.anchor_values, device),
            None if of_variants is None else _to_values(of_variants, device),
        )
        return Cells(anchor, variant, batch, values)

    def _batch(self, rows: np.ndarray) -> np.ndarray:
        return taken(self.batch_n, rows).astype(np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes that the features of all cells take on a device."""
        return self.anchor_nta.nbytes + self.variant_ntv.nbytes + 8 * self.n_cells

    def on(self, device: torch.device, where: str) -> CachedFeatures:
        """Keep the features on the device of the model: ``where`` is auto (a GPU on which they fit), cuda or cpu (no).

        Raises
        ------
        ConfigError
            They shall be on a GPU, but the model is not.
        """
        if where == "cuda" and device.type != "cuda":
            raise ConfigError(f'train.cache_device = "cuda": the model is on {device}. Use auto, or a GPU.')
        if where == "cpu" or device.type != "cuda":
            return self
        if where == "auto" and self.nbytes > RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
            return self
        return self.kept_on(device)

    def kept_on(self, device: torch.device) -> CachedFeatures:
        """Return the features with a copy on a device, made in blocks."""
        resident = tuple(_copied(array, device) for array in (self.anchor_nta, self.variant_ntv, self.batch_n))
        anchor, variant, batch = resident
        return replace(self, resident=(anchor, variant, batch.long()))

    def scales(self) -> tuple[float, float]:
        """RMS norm of the last hop of the Anchor and of the Variant stream (1 for an empty one)."""
        return _rms_norm(self.anchor_nta), _rms_norm(self.variant_ntv)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device; to a GPU from pinned memory, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _hops(features_ntd: np.ndarray, rows: np.ndarray, hops: slice) -> np.ndarray:
    """Return some hops of rows (m,), all of which a row has side by side."""
    n, t, d = features_ntd.shape
    return taken(features_ntd.reshape(n * t, d), rows[:, None] * t + np.arange(t)[hops])


def _copied(array: np.ndarray, device: torch.device) -> Tensor:
    blocks = (np.array(array[start:stop]) for start, stop in row_blocks(len(array)))
    target = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype, device=device)
    for block, (start, stop) in zip(blocks, row_blocks(len(array)), strict=True):
        target[start:stop] = torch.from_numpy(block)
    return target


def _to_values(x_nh: sparse.csr_matrix, device: torch.device) -> Values:
    parts = x_nh.data, x_nh.indices.astype(np.int64), x_nh.indptr[:-1].astype(np.int64)
    return Values(*(to_device(part, device) for part in parts))


def _rms_norm(features_ntd: np.ndarray) -> float:
    total = 0.0
    for start, stop in row_blocks(len(features_ntd)):
        total += float(np.square(features_ntd[start:stop, -1], dtype=np.float64).sum())
    return float(np.sqrt(total / len(features_ntd))) or 1.0
