"""(F_anchor, F_variant) -> embedding: the dual-stream encoder and its bounded gate (METHOD section 5). No I/O.

Shapes: m cells in a batch, T hops, a and v input dimensions of the streams, d latent dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from schelix_scale.config import TrainConfig
from schelix_scale.model.loadings import Loadings


class Latent(NamedTuple):
    """The latents of a batch of cells, (m, d) each.

    Attributes
    ----------
    backbone
        B: diffused, corrected Anchors at unit RMS norm.
    anchor
        z_A: the backbone and the Anchor encoder's bounded residual.
    variant
        z_V: the Variant stream.
    fused
        z: Anchors after they absorbed Variant detail through the gate; the user's embedding.
    """

    backbone: Tensor
    anchor: Tensor
    variant: Tensor
    fused: Tensor


def clip_norm(update_md: Tensor, limit_m1: Tensor) -> Tensor:
    """Scale each row of ``update_md`` down to a norm of at most ``limit_m1`` (m, 1)."""
    norm = update_md.norm(dim=1, keepdim=True).clamp_min(1e-12)
    scale: Tensor = (limit_m1 / norm).clamp(max=1.0)
    return update_md * scale


def _mlp(inputs: int, width: int, outputs: int, last_scale: float) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Linear(inputs, width),
        nn.LayerNorm(width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, outputs),
    )
    last = layers[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(last_scale)
        last.bias.zero_()
    return layers


class DualStream(nn.Module):
    """Anchor stream, Variant stream and the bounded residual gate between them.

    Parameters
    ----------
    hops
        T, number of diffusion scales; the last one is the backbone.
    anchor_dims, variant_dims
        Input dimensions of the streams; ``variant_dims`` 0 makes a single-stream model.
    anchor_scale, variant_scale
        RMS norm of the last hop of each stream under the first operator, by which its inputs are divided.
    config
        Widths and bounds.

    Attributes
    ----------
    loadings
        The first layers, where they are learned; what they add to hop 0 is part of the inputs. None: they are frozen.
    """

    def __init__(
        self,
        hops: int,
        anchor_dims: int,
        variant_dims: int,
        anchor_scale: float,
        variant_scale: float,
        config: TrainConfig,
    ) -> None:
        super().__init__()
        self.residual = config.anchor_residual
        self.bound = config.gate
        self.loadings: Loadings | None = None
        self.single_stream = variant_dims == 0
        self.anchor_scale: Tensor
        self.variant_scale: Tensor
        self.register_buffer("anchor_scale", torch.tensor(float(anchor_scale)))
        self.register_buffer("variant_scale", torch.tensor(float(variant_scale)))
        self.anchor_encoder = _mlp(hops * anchor_dims, config.width, anchor_dims, 0.1)
        if not self.single_stream:
            self.variant_encoder = _mlp(hops * variant_dims, config.width, anchor_dims, 1.0)
            self.variant_norm = nn.LayerNorm(anchor_dims)
            self.variant_map = nn.Linear(anchor_dims, anchor_dims)
            self.gate = nn.Linear(2 * anchor_dims, anchor_dims)
            with torch.no_grad():
                self.variant_map.weight.mul_(0.1)
                self.variant_map.bias.zero_()

    def forward(self, anchor_mta: Tensor, variant_mtv: Tensor) -> Latent:
        """Encode a batch.

        Parameters
        ----------
        anchor_mta
            (m, T, a) diffused Anchor features, hops ascending.
        variant_mtv
            (m, T, v) diffused Variant features; ignored by a single-stream model.
        """
        backbone, z_anchor = self.backbone(anchor_mta), self.anchor_latent(anchor_mta)
        if self.single_stream:
            return Latent(backbone, z_anchor, torch.zeros_like(z_anchor), z_anchor)
        z_variant = self.variant_latent(variant_mtv)
        return Latent(backbone, z_anchor, z_variant, self.fuse(z_anchor, z_variant))

    def backbone(self, anchor_mta: Tensor) -> Tensor:
        """B (m, a): the last hop of the Anchors at unit RMS norm; no parameter can change it."""
        return anchor_mta[:, -1] / self.anchor_scale

    def anchor_latent(self, anchor_mta: Tensor) -> Tensor:
        """z_A (m, d): the backbone and a residual no longer than it, times its bound."""
        backbone, inputs = self.backbone(anchor_mta), anchor_mta / self.anchor_scale
        update = clip_norm(self.anchor_encoder(inputs.flatten(1)), backbone.norm(dim=1, keepdim=True))
        return backbone + self.residual * update

    def variant_latent(self, variant_mtv: Tensor) -> Tensor:
        """z_V (m, d) of a model that has a Variant stream."""
        latent: Tensor = self.variant_encoder((variant_mtv / self.variant_scale).flatten(1))
        return latent

    def fuse(self, z_anchor: Tensor, z_variant: Tensor) -> Tensor:
        """Z = z_A + rho sigmoid(G[z_A, z_V]) * clip(W LN(z_V), |z_A|): |z - z_A| <= rho |z_A| in every cell."""
        gate = torch.sigmoid(self.gate(torch.cat([z_anchor, z_variant], dim=1)))
        detail = clip_norm(self.variant_map(self.variant_norm(z_variant)), z_anchor.norm(dim=1, keepdim=True))
        return z_anchor + self.bound * gate * detail
