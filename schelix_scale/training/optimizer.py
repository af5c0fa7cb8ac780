"""What each phase of training learns, and how fast."""

from __future__ import annotations

import math

import torch

from schelix_scale.config import TrainConfig
from schelix_scale.model.streams import DualStream

SLOW, WARM_UP = 0.1, 0.1


def make_optimizer(model: DualStream, align: bool, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters of Align, or of Refine; there the Variant stream, aligned already, learns slower."""
    rate = config.learning_rate
    anchor = list(model.anchor_encoder.parameters())
    first = _loadings(model)
    if model.single_stream:
        groups = [{"params": anchor, "lr": rate}, {"params": first["anchor"], "lr": rate * SLOW}]
    elif align:
        groups = [
            {"params": list(model.variant_encoder.parameters()), "lr": rate},
            {"params": first["variant"], "lr": rate * SLOW},
        ]
        if config.alignment == "symmetric":
            groups += [{"params": anchor, "lr": rate}, {"params": first["anchor"], "lr": rate * SLOW}]
    else:
        gate = [*model.gate.parameters(), *model.variant_map.parameters(), *model.variant_norm.parameters()]
        groups = [
            {"params": [*anchor, *gate], "lr": rate},
            {"params": list(model.variant_encoder.parameters()), "lr": rate * SLOW},
            {"params": first["anchor"], "lr": rate * SLOW},
            {"params": first["variant"], "lr": rate * SLOW * SLOW},
        ]
    groups = [group for group in groups if group["params"]]
    for group in groups:
        group["peak"] = group["lr"]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=1e-4)


def _loadings(model: DualStream) -> dict[str, list[torch.nn.Parameter]]:
    """Learned loadings of each stream: a first layer learns ten times slower than what follows it."""
    layer = model.loadings
    if layer is None:
        return {"anchor": [], "variant": []}
    return {"anchor": [layer.anchor], "variant": [layer.variant]}


def set_rate(optimizer: torch.optim.Optimizer, progress: float) -> None:
    """Warm up over the first tenth of the phase, then fall to zero along a cosine; ``progress`` is in [0, 1]."""
    share = progress / WARM_UP if progress < WARM_UP else (1 + math.cos(math.pi * progress)) / 2
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
