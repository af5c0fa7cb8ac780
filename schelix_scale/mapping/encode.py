"""Features and neighbours of query cells -> their latent, labels and novelty, as an AnnData zarr."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from schelix_scale._version import __version__
from schelix_scale.errors import TrainingError
from schelix_scale.graph.vectors import row_blocks
from schelix_scale.mapping.calibration import Calibration, calibrate
from schelix_scale.mapping.columns import (
    DISTANCE,
    NOVELTY,
    OF_BATCH,
    P_VALUE,
    LabelColumns,
    create_mapped,
    finish_mapped,
    query_obs,
)
from schelix_scale.mapping.diffusion import query_weights
from schelix_scale.mapping.judged import judged
from schelix_scale.mapping.novelty import NEIGHBORS
from schelix_scale.mapping.pools import evidence, find_pools
from schelix_scale.mapping.query import (
    BLOCK,
    CORRECTED,
    DISTANCES,
    INDICES,
    MEASURED,
    MOVES,
    RAW,
    STREAMS,
    Query,
)
from schelix_scale.mapping.reference import Frozen
from schelix_scale.records import StageRecord
from schelix_scale.scheduling import run_tasks
from schelix_scale.stages.graph import graph_settings
from schelix_scale.transfer import NOT_LABELLED, Labels, vote

if TYPE_CHECKING:
    from torch import Tensor

CALIBRATION, MAPPED = "calibration.npz", "mapped.zarr"


def find_calibration(
    query: Query, labels: Sequence[Labels], wanted: Sequence[int], known: Calibration | None
) -> tuple[Calibration, Any]:
    """Calibrate on held-out batches of the reference, and keep it in the directory.

    Parameters
    ----------
    wanted
        The sizes of pools that the query has, see `pools.wanted_sizes`.
    known
        What was calibrated before, of some sizes.
    """
    settings = query.settings
    inputs: dict[str, Any] = {"labels": [column.key for column in labels], "version": 16}
    inputs |= {"cells": settings.calibration_cells, "batches": settings.calibration_batches}
    inputs["pools"] = list(wanted)

    def make() -> tuple[list[str], dict[str, Any]]:
        of_pools = {} if known is None else dict(known.of_pools)
        lacking, found = [size for size in wanted if size not in of_pools], known
        if lacking or found is None:
            with query.reporter.stage("calibrate", settings.calibration_cells) as progress:
                found = calibrate(query.frozen, labels, settings, query.threads, progress.advance, lacking)
        found = replace(found, of_pools=of_pools | dict(found.of_pools)).only(wanted)
        with query.directory.publish(CALIBRATION) as path:
            found.save(path)
        details: dict[str, Any] = {"held_out_cells": len(found.of_pools[wanted[0]].novelty.sizes[0].scores_s)}
        details["pools"] = list(wanted)
        fits = zip(labels, found.labels, strict=True)
        return [CALIBRATION], details | {column.key: {"temperature": fit.temperature} for column, fit in fits}

    record = query.stage("calibrate", inputs, [], make)
    calibration = Calibration.load(query.directory.path / CALIBRATION)
    least = max(part.least for part in calibration.of_pools.values())
    if least > settings.novelty > 0:
        query.reporter.warn(
            f"the held-out cells of the reference tell p-values of {least:.2g} and above: cells of "
            f"some batches cannot be found novel at {settings.novelty:g}. Raise novelty (--set novelty=) or "
            "calibration_cells"
        )
    return calibration, record


@dataclass(frozen=True)
class Encoded:
    """What is found of m query cells.

    Attributes
    ----------
    latents
        (m, d) float32 by obsm key.
    distance
        (m,).
    """

    latents: dict[str, np.ndarray]
    distance: np.ndarray


def encode_cells(
    frozen: Frozen,
    p_value_m: np.ndarray,
    features: Sequence[np.ndarray],
    moves: Sequence[np.ndarray] | None,
    indices_mk: np.ndarray,
    distances_mk: np.ndarray,
    width_mk: np.ndarray,
    level: float,
) -> Encoded:
    """Diffuse and encode query cells as the reference's own were, without training.

    A cell that is novel at ``level`` keeps its own features the more, the smaller its p-value is: its neighbours are
    not its kind, and their mean would make it one of them.

    Parameters
    ----------
    p_value_m
        P-values of novelty that no labels have a part in: a latent does not depend on which labels are asked for.
    features
        (m, a) and (m, v) corrected components.
    moves
        What learned loadings add to them; None where loadings are frozen.
    indices_mk, distances_mk, width_mk
        (m, k) neighbours in the reference, and their kernel widths.
    """
    settings = graph_settings(frozen.config)
    weights = query_weights(distances_mk, width_mk, frozen.batch_n[indices_mk], frozen.theta, settings.kernel_neighbor)
    kept = np.minimum(1.0, p_value_m / level) if level > 0 else np.ones(len(p_value_m))
    diffused = [
        levels.diffuse(indices_mk, weights, own, settings.hops, kept)
        for levels, own in zip(frozen.diffused, features, strict=True)
    ]
    if moves is not None:
        for hops, move in zip(diffused, moves, strict=True):
            hops[:, 0] += move
    return Encoded(latents(frozen, diffused), distances_mk[:, :NEIGHBORS].mean(axis=1))


def latents(frozen: Frozen, diffused: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Encode diffused features (m, T, a) and (m, T, v): what goes to which obsm key, (m, d).

    Raises
    ------
    TrainingError
        A latent is not finite.
    """
    import torch

    with torch.no_grad():
        latent = frozen.model(*(torch.from_numpy(part) for part in diffused))
    if not torch.isfinite(latent.fused).all():
        raise TrainingError("the latent of query cells is not finite: their expression is unlike the reference's.")
    return {key: _part(latent, part).numpy() for key, part in frozen.output_keys().items()}


def _part(latent: Any, part: str) -> Tensor:
    import torch
    from torch.nn.functional import normalize

    from schelix_scale.embedding import BESIDE, CONCATENATED

    if part == CONCATENATED:
        return torch.cat([latent.fused, BESIDE * normalize(latent.variant, dim=1)], dim=1)
    chosen: Tensor = getattr(latent, part)
    return chosen


def encode_query(query: Query, labels: Sequence[Labels], calibration: Calibration) -> StageRecord:
    """Write mapped.zarr: obs with labels and novelty, and the latents."""
    frozen, settings, n = query.frozen, query.settings, query.store.n_cells
    inputs = {"labels": [column.key for column in labels], "coverage": settings.coverage, "novelty": settings.novelty}
    inputs |= {"obs": query.store.obs_fingerprint(), "version": 17}

    def make() -> tuple[list[str], dict[str, Any]]:
        raw = query.load(RAW.format("anchor"))
        features = [query.load(CORRECTED.format(name)) for name in STREAMS]
        learned = query.directory.record("project").details["learned"]
        moves = [query.load(MOVES.format(name)) for name in STREAMS] if learned else None
        indices, distances, measured = query.load(INDICES), query.load(DISTANCES), query.load(MEASURED)
        found = {name: np.zeros(n, np.float32) for name in (NOVELTY, P_VALUE, DISTANCE)}
        columns = [LabelColumns(column, n) for column in labels]
        pools, alike = find_pools(query, labels, calibration)
        with query.directory.publish(MAPPED) as path, query.reporter.stage("map", n) as progress:
            widths = {key: part.shape[1] for key, part in _probe(frozen).items()}
            arrays = create_mapped(path, n, widths)

            def task(span: tuple[int, int]) -> int:
                rows = slice(*span)
                near, far = np.asarray(indices[rows]), np.asarray(distances[rows])
                moved = None if moves is None else [np.asarray(part[rows]) for part in moves]
                own = [np.asarray(part[rows]) for part in features]
                width = frozen.widths(near)
                signs = evidence(frozen, labels, calibration, raw[rows], own[0], near, far, width)
                parts = labels, calibration, query.batches.codes[rows], np.arange(*span), raw[rows], signs, near, far
                score, without_labels, p_value = judged(frozen, pools, alike[rows], *parts)
                got = encode_cells(frozen, without_labels, own, moved, near, far, width, settings.novelty)
                for key, latent in got.latents.items():
                    arrays[key][rows] = latent
                seen = np.asarray(measured[rows])
                p_value = np.where(seen, p_value, 1.0)  # of a cell without any gene nothing speaks for novelty
                for name, values in zip(found, (score, p_value, got.distance), strict=True):
                    found[name][rows] = values
                novel = p_value <= settings.novelty
                for column, fit in zip(columns, calibration.labels, strict=True):
                    sharp = fit.probabilities(vote(far, column.labels.code_n[near], len(column.labels.names)))
                    labelled = seen & (column.labels.code_n[near] != NOT_LABELLED).any(axis=1)
                    column.fill(span[0], sharp, fit.sets(sharp, settings.coverage), novel, labelled)
                return span[1] - span[0]

            run_tasks(task, list(row_blocks(n, BLOCK)), query.threads, None, progress.advance)
            table = query_obs(query)
            table[OF_BATCH] = pd.Categorical.from_codes(query.batches.codes, pd.Index(query.batches.names))
            for column in columns:
                table = table.assign(**column.table())
            finish_mapped(path, table.assign(**found), _uns(query))
        facts = {"dims": widths, "labels": [column.key for column in labels]}
        return [MAPPED], facts | _novel(query, found[P_VALUE] <= settings.novelty)

    return query.stage("map", inputs, ["neighbors", "calibrate"], make)


def _probe(frozen: Frozen) -> dict[str, np.ndarray]:
    """Return the latents of one cell of zeros, for their shapes."""
    hops = len(frozen.config.graph.hops)
    return latents(frozen, [np.zeros((1, hops, width), np.float32) for width in frozen.streams.dims])


def _novel(query: Query, novel_n: np.ndarray) -> dict[str, Any]:
    """Say which share of the cells is novel, and of those of each batch: where a type is new, it is in some."""
    names, codes = query.batches.names, query.batches.codes
    share_b = np.bincount(codes, novel_n, minlength=len(names)) / np.bincount(codes, minlength=len(names))
    by_batch = dict(zip(map(str, names), share_b.round(6).tolist(), strict=True))
    return {"novel_share": round(float(novel_n.mean()), 6), "novel_by_batch": by_batch}


def _uns(query: Query) -> dict[str, Any]:
    details = query.directory.record("project").details
    return {
        "version": __version__,
        "reference": str(query.frozen.directory.path),
        "reference_fingerprint": query.frozen.fingerprint,
        "source": query.directory.source["uri"],
        "settings": query.settings.model_dump_json(),
        "genes": json.dumps({key: details[key] for key in details if key.startswith(("genes", "used"))}),
    }
