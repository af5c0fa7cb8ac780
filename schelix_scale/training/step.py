"""The cells of a step that are a rank's -> its part of the loss, such that gradients do not depend on the split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from schelix_scale.config import TrainConfig
from schelix_scale.model.losses import contrast, pull_together
from schelix_scale.model.streams import DualStream, Latent
from schelix_scale.training.data import Cells
from schelix_scale.training.dist import ALONE, Ranks

ALIGN, REFINE = "align", "refine"

Encode = Callable[[Tensor, Tensor], Latent]


@dataclass(frozen=True)
class StepCells:
    """What a rank computes in a step.

    Attributes
    ----------
    own
        Its m cells.
    other
        Where the walks from them lead, m cells.
    total
        Cells of the step on all ranks.
    """

    own: Cells
    other: Cells
    total: int


class StepLoss(nn.Module):
    """A rank's part of a phase's loss, times the number of ranks: `DistributedDataParallel` averages gradients.

    Parameters
    ----------
    model
        What is trained.
    phase
        ``align`` or ``refine``.
    """

    def __init__(self, model: DualStream, phase: str, config: TrainConfig, ranks: Ranks) -> None:
        super().__init__()
        self.model, self.phase, self.config, self.ranks = model, phase, config, ranks
        compiled = torch.compile(model) if config.compile else model
        self._compiled = (compiled,)  # a tuple, so that its parameters are not counted twice

    def forward(self, cells: StepCells) -> Tensor:
        """Return the loss."""
        own, other = cells.own.through(self.model.loadings), cells.other
        if self.phase == ALIGN:
            return align_loss(self._encode, own, other, self.config, self.ranks, cells.total)
        backbone = self.model.backbone(other.anchor)
        return refine_loss(self._encode, own, backbone, self.config, self.ranks, cells.total)

    def _encode(self, anchor_mta: Tensor, variant_mtv: Tensor) -> Latent:
        enabled = self.config.precision == "bfloat16"
        with torch.autocast(anchor_mta.device.type, torch.bfloat16, enabled=enabled):
            latent = self._compiled[0](anchor_mta, variant_mtv)
        return Latent(*(part.float() for part in latent))


def align_loss(
    encode: Encode, own: Cells, other: Cells, config: TrainConfig, ranks: Ranks = ALONE, total: int | None = None
) -> Tensor:
    """Align: each cell's Variant latent finds the Anchor latent of its positive, which gets no gradient.

    The Anchor latents of the positives of all ranks are gathered: all are negatives of each other's cells.
    """
    total = len(own.batch) if total is None else total
    latent = encode(own.anchor, own.variant)
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.alignment == "symmetric"):
        target = ranks.gather(encode(other.anchor, other.variant).anchor, total)
    batch, first = ranks.gather(other.batch, total), ranks.share(total).start
    return ranks.world * contrast(latent.variant, target, own.batch, batch, config.temperature, first)


def refine_loss(
    encode: Encode,
    own: Cells,
    far_backbone: Tensor,
    config: TrainConfig,
    ranks: Ranks = ALONE,
    total: int | None = None,
) -> Tensor:
    """Refine: fused latents are pulled towards the backbone of far cells of their own kind, and held by their own."""
    latent = encode(own.anchor, own.variant)
    return ranks.world * pull_together(latent.fused, latent.backbone, far_backbone, config.pull, total)
