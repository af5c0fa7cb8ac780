"""Stream features -> the audited operator and what it diffuses, in the operator cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from schelix_scale.context import Context
from schelix_scale.records import recorded_stages
from schelix_scale.run import RunDirectory
from schelix_scale.stages.features import FEATURES, VARIANT

if TYPE_CHECKING:
    from schelix_scale.config import Config, GraphConfig
    from schelix_scale.graph.cache import OperatorCache


def build_graph(context: Context, directory: RunDirectory) -> None:
    """Write the audited operator of the corrected Anchors and what it diffuses, under the operator's id."""
    from schelix_scale.graph.cache import operator_id
    from schelix_scale.graph.knn import choose_method

    config = graph_settings(context.config)

    def make(fingerprint: str) -> tuple[list[str], dict[str, Any]]:
        cache = open_cache(context, directory)
        method = choose_method(context.store.n_cells, config)
        name = operator_id({"stage": fingerprint, "threads": context.threads}, method)
        with context.reporter.stage(f"neighbours ({method})", context.store.n_cells) as progress:
            neighbors, audit = cache.find(
                cache.features["anchor"], context.config.seed, context.threads, progress.advance, context.search
            )
        context.reporter.say(f"neighbour recall {audit.recall:.3f} (95 % CI {audit.low:.3f}-{audit.high:.3f})")
        with context.reporter.stage("diffusion", cache.work) as progress:
            cache.publish(name, cache.operator(neighbors), audit, progress.advance)
        return cache.artifacts(name), {"operator_id": name, "audit": audit.to_dict()}

    inputs = {"graph": config, "seed": context.config.seed}
    if choose_method(context.store.n_cells, config) == "pynndescent":
        inputs["threads"] = context.threads  # another number of them finds other neighbours
    context.run_stage(directory, "graph", 2, inputs, ["features"], make)


@contextmanager
def search_ahead(context: Context, directory: RunDirectory) -> Iterator[Context]:
    """Give a context in which the search among many cells compiles already, in a process of its own, if it is due."""
    from schelix_scale.graph.search import SearchProcess, worth_a_process

    due = "graph" not in recorded_stages(directory.path)
    if not due or not worth_a_process(context.store.n_cells, context.config.graph):
        yield context
        return
    graph, features = context.config.graph, context.config.features
    with SearchProcess(graph.k, features.anchor_dims, context.threads) as search:
        yield replace(context, search=search)


def open_cache(context: Context, directory: RunDirectory) -> OperatorCache:
    """Open the operator cache of a run whose features are written."""
    from schelix_scale.graph.cache import OperatorCache

    details = directory.record("genes").details
    anchor = np.load(directory.path / FEATURES["anchor_corrected"], mmap_mode="r")
    variant = np.zeros((len(anchor), 0), np.float32)
    if details["variants"]:
        variant = np.load(directory.path / VARIANT["variant"], mmap_mode="r")
    graph = graph_settings(context.config)
    features = {"anchor": anchor, "variant": variant}
    theta = 0.0 if details["single_stream"] else graph.theta
    return OperatorCache(directory.path, features, context.batches.codes, graph, theta)


def graph_settings(config: Config) -> GraphConfig:
    """Return the graph's settings at the run's strength: reweighting and diffusion, 1 - restart, are scaled by it."""
    graph, back = config.graph, 1 - config.strength
    return graph.model_copy(
        update={"theta": config.strength * graph.theta, "restart": graph.restart + (1 - graph.restart) * back}
    )
