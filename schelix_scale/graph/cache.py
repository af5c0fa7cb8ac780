"""Versions of the stop-gradient cache on disk: ``graph/<operator id>/`` and ``diffused/<operator id>/``.

Features come in, an operator with its audit and diffused features go out, published atomically under an id that
hashes everything they were made from. What is there under an id is complete and is used again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from schelix_scale.config import GraphConfig
from schelix_scale.graph.audit import Audit, audit_recall, require_recall
from schelix_scale.graph.diffusion import diffuse
from schelix_scale.graph.knn import Neighbors, choose_method, find_neighbors
from schelix_scale.graph.operator import Operator, build_operator
from schelix_scale.graph.search import SearchProcess
from schelix_scale.publish import publish, write_json

STREAMS = ("anchor", "variant")


def operator_id(inputs: Mapping[str, Any], method: str) -> str:
    """Name an operator by what it is made from: ``inputs`` (with the threads, which change it) and the library."""
    library = "pynndescent" if method == "pynndescent" else "scikit-learn"
    content = {**inputs, "method": method, "library": f"{library} {version(library)}"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class OperatorCache:
    """The operators and diffused features of a run.

    Parameters
    ----------
    root
        The run directory.
    features
        Stream features by name, ``anchor`` (n, a) and ``variant`` (n, v).
    batch_n
        (n,) batch codes.
    config
        Neighbours, kernel, hops.
    theta
        Strength of the batch reweighting; 0 in a single-stream run.
    """

    def __init__(
        self, root: Path, features: Mapping[str, np.ndarray], batch_n: np.ndarray, config: GraphConfig, theta: float
    ) -> None:
        self.root, self.features, self.batch_n, self.config, self.theta = root, features, batch_n, config, theta

    def artifacts(self, name: str) -> list[str]:
        """Paths in the run of what is published under an operator id."""
        return [f"graph/{name}", f"diffused/{name}"]

    def has(self, name: str) -> bool:
        """Whether the operator and its diffused features are there."""
        return all((self.root / path).is_dir() for path in self.artifacts(name))

    def find(
        self,
        features_nd: np.ndarray,
        seed: int,
        threads: int,
        advance: Callable[[int], None] = lambda _: None,
        search: SearchProcess | None = None,
    ) -> tuple[Neighbors, Audit]:
        """Search and audit neighbours of (n, d) features, in the process ``search`` if there is one.

        Raises
        ------
        GraphError
            Too few cells, or a recall below ``graph.min_recall``.
        """
        method = choose_method(len(features_nd), self.config)
        if search is not None and isinstance(features_nd, np.memmap):
            neighbors = search.find(features_nd, seed, self.root)
            advance(len(features_nd))
        else:
            neighbors = find_neighbors(features_nd, self.config.k, method, seed, threads, advance)
        audit = audit_recall(features_nd, neighbors, self.config.audit_cells, seed)
        require_recall(audit, self.config.min_recall)
        return neighbors, audit

    def operator(self, neighbors: Neighbors) -> Operator:
        """Weigh neighbours into an operator with this run's kernel and batches."""
        return build_operator(neighbors, self.batch_n, self.theta, self.config.kernel_neighbor)

    def publish(
        self, name: str, operator: Operator, audit: Audit, advance: Callable[[int], None] = lambda _: None
    ) -> None:
        """Write the operator, its audit, and the features it diffuses."""
        graph, diffused = (self.root / path for path in self.artifacts(name))
        with publish(graph) as partial:
            partial.mkdir()
            np.save(partial / "indices.npy", operator.indices_nk)
            np.save(partial / "weights.npy", operator.weights_nk)
            write_json(partial / "audit.json", audit.to_dict())
        with publish(diffused) as partial:
            partial.mkdir()
            for stream in STREAMS:
                target = partial / f"{stream}.npy"
                diffuse(operator, self.features[stream], self.config.hops, self.config.restart, target, advance)

    def open(self, name: str) -> tuple[Operator, np.ndarray, np.ndarray]:
        """Memory-map the operator and the diffused (n, T, a) and (n, T, v) features of an id."""
        graph, diffused = (self.root / path for path in self.artifacts(name))
        operator = Operator(
            np.load(graph / "indices.npy", mmap_mode="r"), np.load(graph / "weights.npy", mmap_mode="r")
        )
        anchor, variant = (np.load(diffused / f"{stream}.npy", mmap_mode="r") for stream in STREAMS)
        return operator, anchor, variant

    @property
    def work(self) -> int:
        """Cells that `publish` advances by in all."""
        return int(len(STREAMS) * max(self.config.hops) * len(self.batch_n))
