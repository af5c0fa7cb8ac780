"""Ablations: schelix with one of its parts changed, by name, for `quality.py --ablations`."""

from __future__ import annotations

ABLATIONS: dict[str, list[str]] = {
    "all-genes": ["genes.partition=all"],
    "random-partition": ["genes.partition=random"],
    "no-correction": ["features.correct=false"],
    "no-diffusion": ["graph.hops=[0]"],
    "no-reweighting": ["graph.theta=0"],
    "one-partition": ["genes.iterations=1"],
    "symmetric-alignment": ["train.alignment=symmetric"],
    "gate-off": ["train.gate=0"],
    "gate-unbounded": ["train.gate=1000"],
    "concatenated-fuse": ["embed.fuse=concatenate"],
    "refresh": ["train.refresh=true"],
    "expression-input": ["train.input=stream", "train.loadings=learned"],
    "backbone-only": ["train.enabled=false"],
}
