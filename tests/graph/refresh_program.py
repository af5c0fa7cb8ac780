"""What the test of a refresh under several ranks starts: one of two processes that train together, with gloo."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from schelix_scale.config import GraphConfig
from schelix_scale.graph.audit import Audit
from schelix_scale.graph.cache import OperatorCache
from schelix_scale.graph.knn import Neighbors
from schelix_scale.progress import QuietReporter
from schelix_scale.publish import checksum
from schelix_scale.training.data import CachedFeatures
from schelix_scale.training.dist import end_at_once, joined
from schelix_scale.training.loop import train
from schelix_scale.training.refresh import Refresh, open_features
from tests.training.tools import CONFIG, Cache, cached, stream_inputs, training_in

GRAPH = GraphConfig(k=8, method="ivf", hops=(0, 1), audit_cells=50)
TRAIN = CONFIG.model_copy(update={"align_steps": 3, "refine_steps": 2, "refresh_jaccard": 1.0})


class Counted(OperatorCache):
    """A cache that knows how many searches and versions were made through it."""

    searches = 0
    versions = 0

    def find(self, *given: Any, **more: Any) -> tuple[Neighbors, Audit]:
        self.searches += 1
        return super().find(*given, **more)

    def publish(self, *given: Any, **more: Any) -> None:
        self.versions += 1
        super().publish(*given, **more)


def main(folder: Path) -> None:
    """Train over a refresh; write what this rank made, and what it read."""
    with joined("cpu") as ranks:
        anchor, variant, batch_n = stream_inputs(0)
        streams = {"anchor": anchor.astype(np.float32), "variant": variant.astype(np.float32)}
        cache = Counted(folder, streams, batch_n, GRAPH, 1.0)
        if ranks.main:
            neighbors, audit = cache.find(streams["anchor"], 0, 1, "first")
            cache.publish("first", cache.operator(neighbors), audit)
            cache.searches = cache.versions = 0
        ranks.wait()
        refresh = Refresh(cache, TRAIN, "abc", 0, 1, torch.device("cpu"), QuietReporter())

        def reopen(name: str) -> CachedFeatures:
            return open_features(cache, name)

        training = training_in(folder / "checkpoints", Cache(cached()), TRAIN)
        training = replace(training, refresh=refresh, reopen=reopen, ranks=ranks)
        model, features = train(training, reopen("first"), QuietReporter())
        content = np.ascontiguousarray(features.anchor_nta).tobytes() + features.operator.indices_nk.tobytes()
        made = {
            "searches": cache.searches,
            "versions": cache.versions,
            "operator": features.operator_id,
            "read": checksum(folder / "graph" / features.operator_id),
            "file": str(getattr(features.operator.indices_nk, "filename", None)),
            "content": hash_of(content),
            "weights": hash_of(b"".join(value.numpy().tobytes() for value in model.state_dict().values())),
        }
        (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(made))


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    end_at_once(0)
