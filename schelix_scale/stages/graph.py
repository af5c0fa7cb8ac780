"""Stream features -> the audited operator and what it diffuses, in the operator cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from schelix_scale.arrays import map_array
from schelix_scale.context import Context
from schelix_scale.records import read_json, recorded_stages
from schelix_scale.run import RunDirectory
from schelix_scale.stages.features import FEATURES, VARIANT

if TYPE_CHECKING:
    from schelix_scale.config import Config, GraphConfig
    from schelix_scale.graph.cache import OperatorCache


def build_graph(context: Context, directory: RunDirectory) -> None:
    """Write the audited operator of the corrected Anchors and what it diffuses, under the operator's id."""
    from schelix_scale.graph.knn import choose_method

    config, reporter = graph_settings(context.config), context.reporter
    method = choose_method(len(context.batches.codes), config)

    def make(_: str) -> tuple[list[str], dict[str, Any]]:
        from schelix_scale.graph.cache import operator_id
        from schelix_scale.graph.shared import SharedOperators

        cache = open_cache(context, directory)
        found_by = cache.circumstances(cache.features["anchor"].shape, context.threads)
        name = operator_id(inputs | found_by | {"content": _content(context, directory, cache)}, method)
        paths = [directory.path / path for path in cache.artifacts(name)]
        cache.discard_others(name)

        def build() -> None:
            neighbors, audit = cache.find(
                cache.features["anchor"], context.config.seed, context.threads, name, reporter, context.search
            )
            reporter.say(f"neighbour recall {audit}")
            operator = cache.operator(neighbors)
            with reporter.stage("diffusion", cache.work) as progress:
                cache.publish(name, operator, audit, progress.advance, context.threads)

        if context.config.graph.cache_dir is None:
            build()
        else:
            shared = SharedOperators(Path(context.config.graph.cache_dir).expanduser())
            with shared.claimed(name, reporter):
                if shared.fetch(name, paths, reporter):
                    cache.discard(name)
                else:
                    build()
                    shared.keep(name, paths)
        return cache.artifacts(name), {"operator_id": name, "audit": read_json(paths[0] / "audit.json")}

    inputs = {"graph": config.model_dump(mode="json", exclude={"cache_dir"}), "seed": context.config.seed}
    if method == "pynndescent":
        inputs["threads"] = context.threads  # another number of them finds other neighbours
    context.run_stage(directory, "graph", 3, inputs, ["features"], make)


def _content(context: Context, directory: RunDirectory, cache: OperatorCache) -> dict[str, Any]:
    """Return hashes of what an operator and its diffused features are made from."""
    sums = {artifact.path: artifact.sha256 for artifact in directory.record("features").artifacts}
    files = [FEATURES["anchor_corrected"], *([VARIANT["variant"]] if VARIANT["variant"] in sums else [])]
    batches = hashlib.sha256(cache.batch_n.astype(np.int64).tobytes()).hexdigest()
    return {"features": [sums[file] for file in files], "batches": batches, "theta": cache.theta}


@contextmanager
def search_ahead(context: Context, directory: RunDirectory) -> Iterator[Context]:
    """Give a context in which pynndescent compiles already, in a process of its own, if it is due."""
    from schelix_scale.graph.search import SearchProcess

    due = "graph" not in recorded_stages(directory.path)
    if not due or context.config.graph.method != "pynndescent":
        yield context
        return
    graph, features = context.config.graph, context.config.features
    with SearchProcess(graph.k, features.anchor_dims, context.threads) as search:
        yield replace(context, search=search)


def open_cache(context: Context, directory: RunDirectory) -> OperatorCache:
    """Open the operator cache of a run whose features are written."""
    from schelix_scale.graph.cache import OperatorCache

    details = directory.record("genes").details
    anchor = map_array(directory.path / FEATURES["anchor_corrected"])
    variant = np.zeros((len(anchor), 0), np.float32)
    if details["variants"]:
        variant = map_array(directory.path / VARIANT["variant"])
    graph = graph_settings(context.config)
    features = {"anchor": anchor, "variant": variant}
    theta = 0.0 if details["single_stream"] else graph.theta
    budget, scheduler = context.budget, context.config.scheduler
    return OperatorCache(directory.path, features, context.batches.codes, graph, theta, budget, scheduler)


def graph_settings(config: Config) -> GraphConfig:
    """Return the graph's settings at the run's strength: reweighting and diffusion, 1 - restart, are scaled by it."""
    graph, back = config.graph, 1 - config.strength
    return graph.model_copy(
        update={"theta": config.strength * graph.theta, "restart": graph.restart + (1 - graph.restart) * back}
    )
