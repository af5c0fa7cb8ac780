"""The novelty of single cells against a dense computation, and which held-out cells it is calibrated on."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_distances

from schelix_scale import Reference
from schelix_scale.mapping import calibration
from schelix_scale.mapping.calibration import KinCalibration, _not_novel, calibrate
from schelix_scale.mapping.kin import KinScores
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
    around = anchor[near[:, :7]].mean(axis=1)
    spread = far(raw) + far(corrected) - far(around)
    found = score(raw, corrected, around, distances, frozen.widths(near))
    np.testing.assert_allclose(found, spread + np.log(d**2 / w), rtol=1e-3, atol=2e-3)
    copies = score(raw, corrected, around, distances, np.full_like(width, 1e-12))
    np.testing.assert_allclose(copies, spread + np.log(100 * d), rtol=1e-6)
    copy = score(raw, corrected, around, np.zeros_like(distances), width)
    np.testing.assert_allclose(copy, spread + np.log(w / 100**2), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("voters", "elsewhere", "left_out"), [(15, 0, 1), (15, 7, 1), (15, 8, 0), (9, 4, 1), (9, 5, 0)]
)
def test_types_too_rare_to_decide_a_vote_do_not_calibrate_novelty(
    reference: Reference, monkeypatch: pytest.MonkeyPatch, voters: int, elsewhere: int, left_out: int
) -> None:
    """A label that one batch has often and the others ``elsewhere`` times; a majority of 15 voters is 8."""
    monkeypatch.setattr(calibration, "VOTERS", voters)
    monkeypatch.setattr(calibration, "BLOCK", 100)
    frozen = reference.frozen
    batch = np.asarray(frozen.batch_n)
    code = np.zeros(len(batch), np.int32)
    rare = np.r_[np.flatnonzero(batch == 0)[:60], np.flatnonzero(batch == 1)[:elsewhere]]
    code[rare] = 1
    found = calibrate(frozen, [Labels("type", ("common", "rare"), code)], MapConfig())
    for of_pools in found.of_pools.values():
        held_out = len(of_pools.unlabelled.sizes[0].scores_s)
        assert len(of_pools.novelty.sizes[0].scores_s) == held_out - 60 * left_out
    assert held_out == len(batch), "all are held out, for this to be told"
    labelled = len(found.labels[0].scores_s)
    assert labelled == held_out - (60 if elsewhere == 0 else 0), "labels are calibrated on all that others have at all"


def test_where_all_types_are_rare_more_of_them_calibrate() -> None:
    batch, place = np.repeat(np.arange(4), 60), np.arange(240)
    some, few = np.where(place % 10 < 6, 9, 3), np.where(place % 10 < 4, 9, 3)
    np.testing.assert_array_equal(_not_novel(some, batch, 7), some > 7)
    assert _not_novel(few, batch, 7).all(), "less than half would be left: all but those of which the others have none"
    few[:10] = 0
    np.testing.assert_array_equal(_not_novel(few, batch, 7), few > 0)
    assert _not_novel(np.where(place < 15, 9, 0), batch, 7).all(), "hardly any would be left"
    one_batch = np.where(place < 60, 9, 0)
    assert _not_novel(one_batch, batch, 7).all(), "they would be of one batch"


def test_batches_too_small_for_kin_are_calibrated_alone() -> None:
    """Ten batches of 15 cells: no pool is large enough for kin."""
    rng = np.random.default_rng(0)
    scores = np.full((5, 150), np.nan)
    scores[0] = rng.normal(size=150)
    found = KinCalibration.fit(scores, np.repeat(np.arange(10), 15))
    assert len(found.sizes) == 1
    new = rng.normal(size=400)
    p = found.p_values(KinScores(new, new, new, new, np.zeros(400, np.int64)))
    rank = (1 + (scores[0] >= new[:, None]).sum(axis=1)) / 151
    np.testing.assert_allclose(p, rank, atol=0.02)
