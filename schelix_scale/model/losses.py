"""Latents of a batch and of its positives -> the losses of Align and Refine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

SAME_BATCH_WEIGHT = 2.0


def contrast(
    query_md: Tensor, target_md: Tensor, query_batch_m: Tensor, target_batch_m: Tensor, temperature: float
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018) of each query against its own target, the others are negatives.

    Negatives of the query's own batch weigh twice: to tell them apart needs biology, while to tell apart
    cells of two batches their batch would do.
    """
    logits = normalize(query_md, dim=1) @ normalize(target_md, dim=1).T / temperature
    same = query_batch_m[:, None] == target_batch_m[None, :]
    same.fill_diagonal_(False)
    logits = logits + same * torch.log(torch.tensor(SAME_BATCH_WEIGHT, device=logits.device))
    return cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def preservation(fused_md: Tensor, backbone_md: Tensor) -> Tensor:
    """Mean squared distance to the backbone, whose own squared norm is 1 on average."""
    return (fused_md - backbone_md).square().sum(dim=1).mean()
