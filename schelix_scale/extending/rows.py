"""New cells beside those of a run -> their neighbours among all, rows of the operator, diffused features."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from schelix_scale.errors import GraphError
from schelix_scale.graph.audit import others_once, recall_interval
from schelix_scale.graph.build import build_neighbors
from schelix_scale.graph.nearest import nearest_in_blocks
from schelix_scale.graph.vectors import row_blocks, unit_rows
from schelix_scale.mapping.diffusion import Levels, mix, query_weights
from schelix_scale.mapping.query import BLOCK, QUERY_BLOCK
from schelix_scale.mapping.reference import Frozen
from schelix_scale.scheduling import run_tasks
from schelix_scale.stages.graph import graph_settings

EXACT_BELOW, EXACT_QUERIES = 12_000, 1_000  # new cells, and how many of them are compared at once
PROBES = (64, 256)  # lists that are searched for a new cell; more where these find too few


@dataclass(frozen=True)
class NewRows:
    """Rows of the operator for m new cells: (m, k) columns among all cells, new ones from n on, distances, weights."""

    indices_mk: np.ndarray
    distances_mk: np.ndarray
    weights_mk: np.ndarray


def new_rows(
    frozen: Frozen, anchor_md: np.ndarray, batch_m: np.ndarray, folder: Path, threads: int, budget: int
) -> tuple[NewRows, dict[str, float | int]]:
    """Find the neighbours of new cells among the run's cells and each other, and weigh them as the run does.

    Rows of the run's own cells stay: they have no new cell among their neighbours. ``folder`` is for what the search
    keeps on disk. A search that finds too few is done again, wider. Also returns the audit, see `audit_rows`.

    Raises
    ------
    GraphError
        See `audit_rows`.
    """
    among = _among_each_other(frozen, anchor_md, folder, threads, budget)
    for probes in PROBES:
        indices, distances = _merged(frozen, anchor_md, among, probes, threads)
        audit = audit_rows(frozen, anchor_md, indices, last=probes == PROBES[-1])
        if audit["recall"] >= frozen.config.graph.min_recall:
            break
    return _weighed(frozen, indices, distances, batch_m), audit


def _weighed(frozen: Frozen, indices: np.ndarray, distances: np.ndarray, batch_m: np.ndarray) -> NewRows:
    """Weigh neighbours (m, k) as the run does."""
    settings, n = graph_settings(frozen.config), frozen.n_cells
    k = indices.shape[1]
    own_m = distances[:, min(settings.kernel_neighbor, k) - 1]
    weights = np.empty(indices.shape, np.float32)
    batch_n = np.r_[frozen.batch_n, batch_m]
    for start, stop in row_blocks(len(indices), BLOCK):
        columns = indices[start:stop]
        width = np.maximum(own_m[np.maximum(columns - n, 0)], 1e-8).astype(np.float64)
        old = columns < n
        width[old] = frozen.widths(columns[old])
        weights[start:stop] = query_weights(
            distances[start:stop], width, batch_n[columns], frozen.theta, settings.kernel_neighbor
        )
    return NewRows(indices, distances, weights)


def _among_each_other(
    frozen: Frozen, anchor_md: np.ndarray, folder: Path, threads: int, budget: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest other new cells of each: columns from n on, and distances."""
    m, k = len(anchor_md), min(frozen.neighbor_operator.indices_nk.shape[1], len(anchor_md) - 1)
    if m <= EXACT_BELOW:
        unit = unit_rows(anchor_md)
        indices, distances = np.empty((m, k), np.int64), np.empty((m, k), np.float32)

        def task(span: tuple[int, int]) -> int:
            rows = np.arange(*span)
            indices[rows], distances[rows] = nearest_in_blocks(unit[rows], [(0, unit)], k, rows)
            return len(rows)

        run_tasks(task, list(row_blocks(m, EXACT_QUERIES)), threads)
        return indices + frozen.n_cells, distances
    among = frozen.config.graph.model_copy(update={"k": k})
    found, _ = build_neighbors(anchor_md, folder, among, frozen.config.seed, threads, budget)
    return found.indices_nk.astype(np.int64) + frozen.n_cells, found.distances_nk


def _merged(
    frozen: Frozen, anchor_md: np.ndarray, among: tuple[np.ndarray, np.ndarray], probes: int, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merge the k nearest cells of the run and the k nearest new ones: (m, k) columns and distances."""
    k = frozen.neighbor_operator.indices_nk.shape[1]
    parts = [
        frozen.index.query(np.asarray(anchor_md[start:stop]), k, threads, probes)
        for start, stop in row_blocks(len(anchor_md), QUERY_BLOCK)
    ]
    indices, distances = (np.concatenate(part) for part in zip(*parts, strict=True))
    indices, distances = np.hstack([indices, among[0]]), np.hstack([distances, among[1]])
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(indices, order, axis=1), np.take_along_axis(distances, order, axis=1)


def audit_rows(
    frozen: Frozen, anchor_md: np.ndarray, indices_mk: np.ndarray, last: bool = True
) -> dict[str, float | int]:
    """Compare the neighbours (m, k) of sampled new cells with their exact ones among all cells.

    Raises
    ------
    GraphError
        The recall of the ``last`` search is below ``graph.min_recall``.
    """
    config, (m, k) = frozen.config, indices_mk.shape
    rng = np.random.default_rng([config.seed, 0xA0D17, frozen.n_cells])
    chosen = np.sort(rng.choice(m, min(config.graph.audit_cells, m), replace=False))
    unit = unit_rows(anchor_md[chosen])
    blocks = chain(
        ((start, unit_rows(frozen.anchor_na[start:stop])) for start, stop in row_blocks(frozen.n_cells)),
        ((frozen.n_cells + start, unit_rows(anchor_md[start:stop])) for start, stop in row_blocks(m)),
    )
    exact = nearest_in_blocks(unit, blocks, k, frozen.n_cells + chosen)[1]
    columns = indices_mk[chosen]
    old = columns < frozen.n_cells
    others = np.empty((*columns.shape, anchor_md.shape[1]), np.float32)
    others[old] = frozen.anchor_na[columns[old]]
    others[~old] = anchor_md[columns[~old] - frozen.n_cells]
    cosine = np.einsum("md,mkd->mk", unit, unit_rows(others.reshape(-1, others.shape[2])).reshape(others.shape))
    true = (1 - cosine <= exact[:, -1:] + 1e-6) & others_once(columns, frozen.n_cells + chosen)
    found = true.sum(axis=1)
    recall = float(found.mean() / k)
    low, high = recall_interval(found, k)
    if last and recall < config.graph.min_recall:
        raise GraphError(
            f"{recall:.3f} of the exact neighbours of {len(found)} sampled new cells were found; graph.min_recall of "
            f"the run asks for {config.graph.min_recall}. Integrate all cells together instead."
        )
    return {
        "recall": recall,
        "low": low,
        "high": high,
        "cells": len(found),
        "first_row": frozen.n_cells,
        "new_cells": m,
    }


def diffuse_rows(frozen: Frozen, levels: Levels, rows: NewRows, own_md: np.ndarray) -> np.ndarray:
    """Diffuse new cells among all cells, (m, T, d): F^(t) of the run's own cells is as it was."""
    settings, n, own = graph_settings(frozen.config), frozen.n_cells, np.asarray(own_md, np.float32)
    out = np.empty((len(own), len(settings.hops), own.shape[1]), np.float32)
    current = own
    for hop in range(max(settings.hops) + 1):
        if hop:
            before, previous = hop - 1, current

            def values(needed: np.ndarray, before: int = before, previous: np.ndarray = previous) -> np.ndarray:
                old = needed < n
                found = np.empty((len(needed), own.shape[1]), np.float32)
                found[old] = levels.rows(before, needed[old])
                found[~old] = previous[needed[~old] - n]
                return found

            current = np.empty_like(own)
            for start, stop in row_blocks(len(own), BLOCK):
                mixed = mix(rows.indices_mk[start:stop], rows.weights_mk[start:stop], values)
                current[start:stop] = (1 - settings.restart) * mixed + settings.restart * own[start:stop]
        if hop in settings.hops:
            out[:, settings.hops.index(hop)] = current
    return out
