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


def pull_together(fused_md: Tensor, backbone_md: Tensor, far_md: Tensor, pull: float) -> Tensor:
    """Mean of (1 - pull) |z - B|^2 + pull |z - B_far|^2, B_far the backbone of a cell at the end of a long walk.

    The walk's end is random, so that the best latent is (1 - pull) B + pull P^reach B: a deep diffusion that never is
    computed, learned from as many walks as there are training steps, whatever the number of cells.
    """
    near = (fused_md - backbone_md).square().sum(dim=1)
    far = (fused_md - far_md).square().sum(dim=1)
    return ((1 - pull) * near + pull * far).mean()
