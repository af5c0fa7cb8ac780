"""Between phases: the operator is rebuilt from the current Anchor latent, unless it has hardly moved."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from schelix_scale.config import TrainConfig
from schelix_scale.graph.cache import OperatorCache, operator_id
from schelix_scale.graph.knn import choose_method
from schelix_scale.graph.operator import blend, jaccard
from schelix_scale.graph.scratch import content_hash
from schelix_scale.graph.vectors import row_blocks
from schelix_scale.model.streams import DualStream, Latent
from schelix_scale.progress import Reporter
from schelix_scale.training.data import CachedFeatures
from schelix_scale.training.expression import Expression

JACCARD_CELLS = 2_000
ENCODE_CELLS = 8_192


def encode(
    model: DualStream,
    features: CachedFeatures,
    start: int,
    stop: int,
    device: torch.device,
    expression: Expression | None = None,
) -> Latent:
    """Encode cells start:stop without gradients; latents on the CPU. Learned loadings need the cells' expression."""
    assert (model.loadings is None) or expression is not None, "learned loadings, but no expression"
    rows = np.arange(start, stop)
    read = None if expression is None or model.loadings is None else expression.read(rows)
    cells = features.cells(rows, device, read)
    with torch.no_grad():
        cells = cells.through(model.loadings)
        latent = model(cells.anchor, cells.variant)
    return Latent(*(part.cpu() for part in latent))


def open_features(cache: OperatorCache, name: str) -> CachedFeatures:
    """Open the cached features of an operator id."""
    operator, anchor, variant = cache.open(name)
    return CachedFeatures(name, operator, anchor, variant, cache.batch_n)


@dataclass(frozen=True)
class Refresh:
    """Rebuilds the cache from a model: a function of (features, model), so that resuming repeats it exactly.

    Attributes
    ----------
    cache
        Where versions are published.
    config
        Blend, Jaccard limit, on or off.
    fingerprint
        Of the training; part of the new version's id.
    expression
        Where learned loadings read; None where they are frozen.
    """

    cache: OperatorCache
    config: TrainConfig
    fingerprint: str
    seed: int
    threads: int
    device: torch.device
    reporter: Reporter
    expression: Expression | None = None

    def __call__(self, features: CachedFeatures, model: DualStream) -> CachedFeatures:
        """Return the features to train on next: a new version, or ``features`` if the graph would hardly change."""
        if not self.config.refresh:
            return features
        with self.cache.scratch((features.n_cells, features.anchor_nta.shape[2])) as latent:
            self._encode_anchors(features, model, latent)
            return self._rebuilt(features, latent)

    def _rebuilt(self, features: CachedFeatures, latent: np.ndarray) -> CachedFeatures:
        method = choose_method(features.n_cells, self.cache.config)
        name = operator_id(
            {
                "parent": features.operator_id,  # with it, the phase
                "latent": content_hash(latent),
                "training": self.fingerprint,
                "seed": self.seed,
                **self.cache.circumstances(latent.shape, self.threads),
            },
            method,
        )
        if self.cache.has(name):
            return open_features(self.cache, name)
        self.reporter.say("refresh: neighbours of the current Anchor latents")
        neighbors, audit = self.cache.find(latent, self.seed, self.threads, name, self.reporter)
        self.reporter.say(f"neighbour recall {audit}")
        fresh = self.cache.operator(neighbors)
        rng = np.random.default_rng([self.seed, 0x1ACC])
        sample = rng.choice(features.n_cells, min(JACCARD_CELLS, features.n_cells), replace=False)
        overlap = jaccard(features.operator, fresh, sample)
        if overlap > self.config.refresh_jaccard:
            self.reporter.say(f"graph kept: neighbours of the current Anchor latents overlap by {overlap:.2f}")
            self.cache.discard(name)
            return features
        self.reporter.say(
            f"graph refreshed as {name}: neighbours of the current Anchor latents overlap by {overlap:.2f}"
        )
        blended = blend(features.operator, fresh, self.config.refresh_blend, self.cache.folder(name))
        audit = replace(audit, method=f"{audit.method}, before it was blended with {features.operator_id}")
        with self.reporter.stage("refresh: diffusion", self.cache.work) as progress:
            self.cache.publish(name, blended, audit, progress.advance, self.threads)
        return open_features(self.cache, name)

    def _encode_anchors(self, features: CachedFeatures, model: DualStream, latent: np.ndarray) -> None:
        model.eval()
        for start, stop in row_blocks(features.n_cells, ENCODE_CELLS):
            latent[start:stop] = encode(model, features, start, stop, self.device, self.expression).anchor.numpy()
