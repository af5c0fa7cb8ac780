"""The cells of a step that are a rank's -> its part of the loss, such that gradients do not depend on the split."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from schelix_scale.config import TrainConfig
from schelix_scale.model.losses import contrast, pull_together
from schelix_scale.model.streams import DualStream, Latent
from schelix_scale.training.data import Cells
from schelix_scale.training.dist import Ranks

ALIGN, REFINE = "align", "refine"
Parts = tuple[Callable[[Tensor, Tensor], Latent], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


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
        ``align``, in which Variant latents find Anchors, or ``refine``, in which fused latents are pulled towards the
        backbone of far cells of their own kind, and held by their own.
    """

    def __init__(self, model: DualStream, phase: str, config: TrainConfig, ranks: Ranks) -> None:
        super().__init__()
        self.model, self.phase, self.config, self.ranks = model, phase, config, ranks
        self._parts: Parts = model, model.anchor_latent, model.variant_latent
        if config.compile:
            self._parts = torch.compile(model), torch.compile(model.anchor_latent), torch.compile(model.variant_latent)

    def forward(self, cells: StepCells) -> Tensor:
        """Return the loss."""
        model, anchor_latent, variant_latent = self._parts
        own, other = cells.own.through(self.model.loadings), cells.other
        if self.phase == ALIGN:
            with self._products(own):
                variant = variant_latent(own.variant)
            with self._products(own), torch.set_grad_enabled(self._symmetric and torch.is_grad_enabled()):
                anchor = anchor_latent(other.anchor)
            return self._align(variant.float(), anchor.float(), own.batch, other.batch, cells.total)
        with self._products(own):
            latent = model(own.anchor, own.variant)
        far, pull = self.model.backbone(other.anchor), self.config.pull
        return self.ranks.world * pull_together(latent.fused.float(), latent.backbone, far, pull, cells.total)

    @property
    def _symmetric(self) -> bool:
        return self.config.alignment == "symmetric"

    def _align(
        self, variant_md: Tensor, anchor_md: Tensor, batch_m: Tensor, other_batch_m: Tensor, total: int
    ) -> Tensor:
        """Align: each cell's Variant latent finds the Anchor latent of its positive, which gets no gradient.

        The Anchor latents of the positives of all ranks are gathered: all are negatives of each other's cells.
        """
        ranks, first = self.ranks, self.ranks.share(total).start
        packed = torch.cat([anchor_md, other_batch_m[:, None].to(anchor_md.dtype)], dim=1)  # exact to 2^24 batches
        packed = ranks.gather(packed, total)  # in one message: each costs as much as the model's layers
        target_nd, target_batch_n = packed[:, :-1], packed[:, -1].to(other_batch_m.dtype)
        temperature = self.config.temperature
        return ranks.world * contrast(variant_md, target_nd, batch_m, target_batch_n, temperature, first)

    def _products(self, cells: Cells) -> AbstractContextManager[object]:
        """Return the context in which the model computes, in the precision that the settings ask for."""
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(cells.anchor.device.type, torch.bfloat16)
