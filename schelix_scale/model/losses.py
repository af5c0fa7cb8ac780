"""Latents of a batch and of its positives -> the losses of Align and Refine."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

SAME_BATCH_WEIGHT = 2.0
BLOCK = 1_024  # queries whose logits are computed together


def contrast(
    query_md: Tensor,
    target_nd: Tensor,
    query_batch_m: Tensor,
    target_batch_n: Tensor,
    temperature: float,
    first: int = 0,
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018) of each query against its own target, the others are negatives.

    Negatives of the query's own batch weigh twice: to tell them apart needs biology, while to tell apart
    cells of two batches their batch would do.

    Parameters
    ----------
    query_md, target_nd
        Queries (m, d) and the targets of a whole step (n, d): those of ranks beside this one are negatives as well.
    first
        Where the targets of these queries begin; target ``first + i`` is that of query i.

    Returns
    -------
    The sum over queries, divided by n: the terms of all ranks add up to the mean.
    """
    query_md, target_dn = normalize(query_md, dim=1), normalize(target_nd, dim=1).T
    losses = [
        _contrast_block(
            query_md[i : i + BLOCK], target_dn, query_batch_m[i : i + BLOCK], target_batch_n, temperature, i + first
        )
        for i in range(0, max(1, len(query_md)), BLOCK)
    ]
    return torch.stack(losses).sum() / len(target_nd)


def _contrast_block(
    query_md: Tensor, target_dn: Tensor, query_batch_m: Tensor, target_batch_n: Tensor, temperature: float, first: int
) -> Tensor:
    """Sum over a block of queries; all at once, n x n logits would have to be fetched from memory again and again."""
    logits = query_md @ target_dn / temperature
    own = torch.arange(first, first + len(logits), device=logits.device)
    same = query_batch_m[:, None] == target_batch_n[None, :]
    same[own - first, own] = False
    logits = logits + same * math.log(SAME_BATCH_WEIGHT)  # a number: a tensor of it would have to wait for a GPU
    return cross_entropy(logits, own, reduction="sum")


def pull_together(
    fused_md: Tensor, backbone_md: Tensor, far_md: Tensor, pull: float, total: int | None = None
) -> Tensor:
    """Mean of (1 - pull) |z - B|^2 + pull |z - B_far|^2, B_far the backbone of a cell at the end of a long walk.

    The walk's end is random, so that the best latent is (1 - pull) B + pull P^reach B: a deep diffusion that never is
    computed, learned from as many walks as there are training steps, whatever the number of cells. Of the m cells that
    a rank has of a step of ``total``, the sum is divided by ``total``.
    """
    near = (fused_md - backbone_md).square().sum(dim=1)
    far = (fused_md - far_md).square().sum(dim=1)
    return ((1 - pull) * near + pull * far).sum() / (len(fused_md) if total is None else total)
