"""The novelty of single cells against a dense computation, and which held-out cells it is calibrated on."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_distances

from schelix_scale import Reference
from schelix_scale.mapping.calibration import calibrate
from schelix_scale.mapping.novelty import NoveltyScore
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.transfer import Labels


def test_the_score_of_single_cells(reference: Reference) -> None:
    frozen, rng = reference.frozen, np.random.default_rng(0)
    anchor = np.asarray(frozen.anchor_na, np.float64)
    clusters = frozen.clusters
    of_cluster = clusters.weights(anchor).argmax(axis=1)
    residual = anchor - clusters.centre_kd[of_cluster]
    covariance = residual.T @ residual / len(residual)
    precision = np.linalg.inv(covariance + 1e-3 * np.trace(covariance) / len(covariance) * np.eye(len(covariance)))

    def far(z: np.ndarray) -> np.ndarray:
        away = z[:, None] - clusters.centre_kd
        return np.log((clusters.weights(z) * np.einsum("mkd,de,mke->mk", away, precision, away)).sum(axis=1))

    raw = anchor[rng.choice(len(anchor), 50, replace=False)] + rng.normal(size=(50, anchor.shape[1]))
    corrected = raw - 0.3
    between = cosine_distances(corrected, anchor)
    near = np.argsort(between, axis=1)[:, :15]
    distances = np.take_along_axis(between, near, axis=1)
    own = cosine_distances(anchor)
    np.fill_diagonal(own, np.inf)
    width = np.sort(own, axis=1)[:, frozen.config.graph.kernel_neighbor - 1][near]
    d, w = distances[:, :7].mean(axis=1), width[:, :7].mean(axis=1)
    score = NoveltyScore.of_cells(clusters, anchor)
    found = score(raw, corrected, distances, frozen.widths(near))
    np.testing.assert_allclose(found, far(raw) + far(corrected) + np.log(d**2 / w), rtol=1e-3, atol=2e-3)
    copies = score(raw, corrected, distances, np.full_like(width, 1e-12))
    np.testing.assert_allclose(copies, far(raw) + far(corrected) + np.log(100 * d), rtol=1e-6)


@pytest.mark.parametrize(("elsewhere", "left_out"), [(0, True), (7, True), (8, False)])
def test_types_too_rare_to_decide_a_vote_do_not_calibrate_novelty(
    reference: Reference, elsewhere: int, left_out: bool
) -> None:
    """A label that one batch has often and the others ``elsewhere`` times; a majority of 15 neighbours is 8."""
    frozen = reference.frozen
    batch = np.asarray(frozen.batch_n)
    code = np.zeros(len(batch), np.int32)
    rare = np.r_[np.flatnonzero(batch == 0)[:60], np.flatnonzero(batch == 1)[:elsewhere]]
    code[rare] = 1
    found = calibrate(frozen, [Labels("type", ("common", "rare"), code)], MapConfig())
    held_out = len(found.unlabelled.sizes[0].scores_s)
    assert held_out == len(batch), "all are held out, for this to be told"
    gone = {True: 60, False: 0}[left_out]
    assert len(found.novelty.sizes[0].scores_s) == held_out - gone
    labelled = len(found.labels[0].scores_s)
    assert labelled == held_out - (60 if elsewhere == 0 else 0), "labels are calibrated on all that others have at all"
