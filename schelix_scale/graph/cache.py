"""Versions of the stop-gradient cache on disk: ``graph/<operator id>/`` and ``diffused/<operator id>/``.

Features come in, an operator with its audit and diffused features go out, published atomically under an id that
hashes everything they were made from. What is there under an id is complete and is used again, also by other runs if
they share a directory of operators (`graph.shared`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from schelix_scale.arrays import create_array, load_array, map_array
from schelix_scale.config import GraphConfig
from schelix_scale.graph.audit import Audit
from schelix_scale.graph.build import build_neighbors, circumstances
from schelix_scale.graph.diffusion import diffuse
from schelix_scale.graph.knn import Neighbors
from schelix_scale.graph.operator import Operator, build_operator
from schelix_scale.graph.scratch import INDEX, search_version
from schelix_scale.graph.search import SearchProcess
from schelix_scale.progress import Reporter
from schelix_scale.publish import publish, remove, write_json

STREAMS = ("anchor", "variant")
BUILDING = ".building"


def operator_id(inputs: Mapping[str, Any], method: str) -> str:
    """Name an operator by what it is made from: ``inputs``, the method, and the libraries that do the work.

    The `OperatorCache.circumstances` of the search belong to the inputs.
    """
    content = {**inputs, "method": method, **search_version(method)}
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
    budget
        Bytes of memory that a search may use.
    scheduler
        A dask.distributed cluster for the search; else threads.
    """

    def __init__(
        self,
        root: Path,
        features: Mapping[str, np.ndarray],
        batch_n: np.ndarray,
        config: GraphConfig,
        theta: float,
        budget: int = 2**40,
        scheduler: str | None = None,
    ) -> None:
        self.root, self.features, self.batch_n, self.config, self.theta = root, features, batch_n, config, theta
        self.budget, self.scheduler = budget, scheduler

    def artifacts(self, name: str) -> list[str]:
        """Paths in the run of what is published under an operator id."""
        return [f"graph/{name}", f"diffused/{name}"]

    def has(self, name: str) -> bool:
        """Whether the operator and its diffused features are there."""
        return all((self.root / path).is_dir() for path in self.artifacts(name))

    def circumstances(self, shape: tuple[int, ...], threads: int) -> dict[str, Any]:
        """Return what else changes the neighbours of (n, d) features, for their `operator_id`."""
        return dict(circumstances(shape, self.config, threads, self.budget))

    def find(
        self,
        features_nd: np.ndarray,
        seed: int,
        threads: int,
        name: str = "search",
        reporter: Reporter | None = None,
        search: SearchProcess | None = None,
    ) -> tuple[Neighbors, Audit]:
        """Search and audit neighbours of (n, d) features; see `build.build_neighbors`.

        What is found lies in ``graph/<name>.building`` until the operator ``name`` is published or discarded.

        Raises
        ------
        GraphError
            Too few cells, or a recall below ``graph.min_recall``.
        """
        return build_neighbors(
            features_nd,
            self._building(name),
            self.config,
            seed,
            threads,
            self.budget,
            reporter,
            self.scheduler,
            search,
        )

    def operator(self, neighbors: Neighbors) -> Operator:
        """Weigh neighbours into an operator with this run's kernel and batches, beside them if they are on disk."""
        path = getattr(neighbors.indices_nk, "filename", None)
        folder = None if path is None else Path(path).parent
        return build_operator(neighbors, self.batch_n, self.theta, self.config.kernel_neighbor, folder)

    def discard(self, name: str) -> None:
        """Remove what `find` left."""
        remove(self._building(name))

    def discard_others(self, name: str) -> None:
        """Remove what searches for any other operator than ``name`` left, when they were interrupted."""
        for path in (self.root / "graph").glob(f"*{BUILDING}"):
            if path != self._building(name):
                remove(path)

    def publish(
        self,
        name: str,
        operator: Operator,
        audit: Audit,
        advance: Callable[[int], None] = lambda _: None,
        threads: int = 1,
    ) -> None:
        """Write the operator, its audit and index, and the features it diffuses on ``threads`` threads."""
        graph, diffused = (self.root / path for path in self.artifacts(name))
        index = self._building(name) / INDEX
        order = load_array(index / "cells.npy") if index.is_dir() else None
        with publish(graph) as partial:
            partial.mkdir()
            np.save(partial / "indices.npy", operator.indices_nk)
            np.save(partial / "weights.npy", operator.weights_nk)
            if index.is_dir():
                shutil.copytree(index, partial / INDEX)
            write_json(partial / "audit.json", audit.to_dict())
        with publish(diffused) as partial:
            partial.mkdir()
            for stream in STREAMS:
                target = partial / f"{stream}.npy"
                hops, restart = self.config.hops, self.config.restart
                diffuse(operator, self.features[stream], hops, restart, target, advance, threads, order)
        self.discard(name)

    def open(self, name: str) -> tuple[Operator, np.ndarray, np.ndarray]:
        """Memory-map the operator and the diffused (n, T, a) and (n, T, v) features of an id."""
        graph, diffused = (self.root / path for path in self.artifacts(name))
        operator = Operator(map_array(graph / "indices.npy"), map_array(graph / "weights.npy"))
        anchor, variant = (map_array(diffused / f"{stream}.npy") for stream in STREAMS)
        return operator, anchor, variant

    @property
    def work(self) -> int:
        """Cells that `publish` advances by in all."""
        return int(len(STREAMS) * max(self.config.hops) * len(self.batch_n))

    @contextmanager
    def scratch(self, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield a float32 array on disk that is removed in the end."""
        folder = self._building("values")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield create_array(folder / "values.npy", shape, np.float32)
        finally:
            remove(folder)

    def folder(self, name: str) -> Path:
        """Return the directory of what is made for an operator, see `find`."""
        folder = self._building(name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _building(self, name: str) -> Path:
        return self.root / "graph" / f"{name}{BUILDING}"
