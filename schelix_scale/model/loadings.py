"""Values of genes -> how far learned loadings move a cell from where the sketch's loadings put it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag


class Values(NamedTuple):
    """Values of the h genes of a stream in m cells, as rows of a CSR matrix.

    Attributes
    ----------
    data, indices
        (nnz,) float32 values and int64 genes.
    starts
        (m,) int64 where each cell's values start.
    """

    data: Tensor
    indices: Tensor
    starts: Tensor


class Loadings(nn.Module):
    """The first layers of the streams where they are learned: the sketch's loadings and a change to them.

    Only the change is a parameter, 0 at first: untrained, inputs are those of frozen loadings, and weight decay draws
    towards the sketch's loadings. Offsets and the correction's displacement stay as they were fitted.

    Parameters
    ----------
    anchor, variant
        (h, d) of the streams' loadings; (0, 0) where there is no Variant stream.
    """

    def __init__(self, anchor: tuple[int, int], variant: tuple[int, int]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(anchor))
        self.variant = nn.Parameter(torch.zeros(variant))

    def forward(self, anchor: Values, variant: Values | None) -> tuple[Tensor, Tensor]:
        """Return what to add to hop 0 of the Anchors (m, a) and of the Variants (m, v)."""
        moved = _product(anchor, self.anchor)
        return moved, _product(variant, self.variant) if variant is not None else moved[:, :0]


def _product(values: Values, weight_hd: Tensor) -> Tensor:
    """CSR times dense, (m, d), with a gradient for the dense one."""
    return embedding_bag(values.indices, weight_hd, values.starts, mode="sum", per_sample_weights=values.data)
