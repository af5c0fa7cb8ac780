"""Cells of new batches, their pools and what novelty is calibrated by -> how novel each is, and its p-values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from schelix_scale.mapping.by_label import voted
from schelix_scale.mapping.calibration import Calibration
from schelix_scale.mapping.evidence import Evidence
from schelix_scale.mapping.kin import KinScores, Pool
from schelix_scale.mapping.odd_votes import often
from schelix_scale.mapping.reference import Frozen
from schelix_scale.transfer import Labels


def judged(
    frozen: Frozen,
    pools: Sequence[Pool],
    alike_m: np.ndarray,
    labels: Sequence[Labels],
    calibration: Calibration,
    batch_m: np.ndarray,
    rows: np.ndarray,
    raw_md: np.ndarray,
    own: Evidence,
    indices_mk: np.ndarray,
    distances_mk: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores of cells, and p-values without and with what labels say, (m,) each.

    Parameters
    ----------
    pools, alike_m
        See `pools.find_pools`: all pools by number of the batch, and what these cells have in common with theirs.
    batch_m, rows
        Their batches, and numbers.
    raw_md, own
        Their uncorrected Anchor components, and what tells how novel each is.
    indices_mk, distances_mk
        Their neighbours in the reference.
    """
    told_b = [calibration.of_pool(len(pool.rows)) for pool in pools]
    size_m = np.array([told.size for told in told_b])[batch_m]
    score, without_labels, p_value = np.empty((3, len(rows)))
    for size in np.unique(size_m).tolist():
        mine, told = np.flatnonzero(size_m == size), calibration.of_pools[size]
        near, far, often_m = indices_mk[mine], distances_mk[mine], np.ones(len(mine))
        high = alike_m[mine] > told.usually_alike.knee  # of the others it adds nothing
        often_m[high] = often(labels, frozen.profiles, near[high], far[high])
        adds = told.usually_alike.adds(alike_m[mine], often_m)
        found = KinScores.of_cells(pools, batch_m[mine], rows[mine], raw_md[mine], own[mine], told.most, adds)
        score[mine] = found[1].plain
        without_labels[mine], p_value[mine] = told.p_values(found, voted(labels, near, far))
    return score, without_labels, p_value
