"""Ablations: schelix with one of its parts changed, by name, for `quality.py --ablations`."""

from __future__ import annotations

ABLATIONS: dict[str, list[str]] = {
    "no-diffusion": ["graph.hops=[0]"],
    "no-reweighting": ["graph.theta=0"],
    "one-partition": ["genes.iterations=1"],
    "no-gate": ["train.gate=0"],
    "no-refresh": ["train.refresh=false"],
    "backbone-only": ["train.enabled=false"],
}
