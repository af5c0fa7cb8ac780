"""What votes say of how novel a cell is, against Kullback-Leibler divergences and means of single cells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.stats import entropy
from sklearn.metrics.pairwise import cosine_distances

from schelix_scale import Reference
from schelix_scale.mapping import odd_votes as odd_votes_module
from schelix_scale.mapping.by_label import voted
from schelix_scale.mapping.calibration import LEAST, calibrate
from schelix_scale.mapping.held_out import hold_out
from schelix_scale.mapping.kin import KinScores, Usual
from schelix_scale.mapping.odd_votes import odd_elsewhere, odd_votes, oddest, often, votes_within
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.transfer import LabelCalibration, Labels, usual_votes, vote
from tests.mapping.conftest import Atlas


def fitted(usual: np.ndarray) -> LabelCalibration:
    return LabelCalibration(1.0, 0.01, np.zeros(1), np.ones(1), usual)


def made_up(seed: int, n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Votes of cells of four types, two of which are often mixed; their types, and batches."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 4, n)
    sure = np.eye(4) * 20 + 0.05
    sure[0, 1], sure[1, 0] = 20, 20
    return np.stack([rng.dirichlet(sure[code]) for code in true]), true, rng.integers(0, 3, n)


def test_what_is_usual_is_the_mean_of_the_cells_of_a_label() -> None:
    votes, true, batch = made_up(0)
    weight = np.where(batch == 0, 2.0, 0.5)
    share = weight / weight.sum() * 300
    for label, found in enumerate(usual_votes(votes, true, weight)):
        mine = true == label
        mean = (votes[mine].T @ share[mine] + np.eye(4)[label]) / (share[mine].sum() + 1)
        np.testing.assert_allclose(found, 0.99 * mean + 0.01 / 4)
    none = np.zeros((0, 4)), np.zeros(0, int), np.zeros(0)
    np.testing.assert_allclose(usual_votes(*none), 0.99 * np.eye(4) + 0.01 / 4)
    others = np.roll(np.eye(4), 1, axis=1)
    np.testing.assert_allclose(usual_votes(*none, others), 0.99 * others + 0.01 / 4)


def test_votes_are_odd_between_types_that_are_hardly_mixed() -> None:
    votes, true, _ = made_up(1)
    usual = usual_votes(votes, true, np.ones(300))
    found = fitted(usual).oddness(votes)
    for cell in range(0, 300, 17):  # KL divergence, and the entropies that its cross entropy has beside it
        of_label = [entropy(votes[cell], row) + entropy(votes[cell]) - entropy(row) for row in usual]
        assert found[cell] == pytest.approx(min(of_label), abs=1e-9)
    mixed, between = fitted(usual).oddness(np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]))
    assert mixed < 0.2
    assert between > 1


def test_a_type_that_one_batch_alone_has_votes_as_it_does_there(reference: Reference) -> None:
    """No cell of it can be held out, and mixtures that are usual in its batch are not odd."""
    frozen, rng = reference.frozen, np.random.default_rng(8)
    (column,) = frozen.labels(("cell_type",))
    code = np.where(rng.random(len(column.code_n)) < 0.3, (column.code_n + 1) % 4, column.code_n).astype(np.int32)
    code[frozen.batch_n == 1] += 4  # labels of its own
    code[rng.random(len(code)) < 0.1] = -1
    private = Labels("type", tuple("abcdefgh"), code)
    anchor = np.asarray(frozen.anchor_na, np.float64)
    between = cosine_distances(anchor)
    np.fill_diagonal(between, np.inf)
    near = np.argsort(between, axis=1)[:, : frozen.config.graph.k]
    votes = vote(np.take_along_axis(between, near, axis=1), code[near], 8)
    expected = np.stack([votes[code == label].mean(axis=0) for label in range(8)])
    np.testing.assert_allclose(votes_within(frozen, private), expected, atol=2e-3)
    usual = calibrate(frozen, [private], MapConfig()).labels[0].usual_ll
    np.testing.assert_allclose(usual[4:], 0.99 * expected[4:] + 0.01 / 8, atol=2e-3)
    assert np.diag(expected).max() < 0.9
    none = Labels("type", ("a", "b"), np.where(np.arange(len(code)) == 0, 0, -1).astype(np.int32))
    np.testing.assert_array_equal(votes_within(frozen, none), np.eye(2))


def test_a_batch_has_no_part_in_what_is_usual_for_its_own_cells() -> None:
    votes, true, batch = made_up(2)
    votes[batch == 2] = np.roll(votes[batch == 2], 2, axis=1)
    near, chosen = np.zeros((300, 3), int), np.flatnonzero(true != 3)
    near[::9] = -1
    found = odd_elsewhere(fitted(np.eye(4)), votes, near, true, batch, chosen)
    for code in range(3):
        others = chosen[batch[chosen] != code]
        weight = 1 / np.maximum(np.bincount(batch[others])[batch[others]], 100)
        expected = fitted(usual_votes(votes[others], true[others], weight)).oddness(votes)
        np.testing.assert_allclose(found[batch == code], np.where(near[:, 0] < 0, -np.inf, expected)[batch == code])
    told = near[:, 0] >= 0
    assert found[(batch == 2) & told].mean() > found[(batch != 2) & told].mean() + 0.6


def test_labels_say_nothing_where_there_are_none() -> None:
    fit = fitted(usual_votes(np.eye(2), np.arange(2), np.ones(2)))
    votes, code = np.full((2, 2), 0.5), np.array([[-1, -1], [-1, 0]])
    found = odd_votes(fit, votes, code)
    assert found[0] == -np.inf
    assert found[1] > 0
    said = np.array([1.0, -3.0, -np.inf]), np.array([0.5, -np.inf, -np.inf])
    np.testing.assert_array_equal(oddest(said, 3), [1.0, -3.0, 0.0])
    np.testing.assert_array_equal(oddest([], 2), [0.0, 0.0])


def test_cells_without_a_labelled_neighbour_say_nothing_of_what_is_usual(reference: Reference) -> None:
    """In a reference in which one cell in ten has a label, votes of these are as sure as where all have one."""
    (column,) = reference.frozen.labels(("cell_type",))
    hidden = np.random.default_rng(7).random(len(column.code_n)) > 0.1
    held_out = hold_out(reference.frozen, MapConfig())
    few = replace(column, code_n=np.where(hidden, -1, column.code_n).astype(np.int32))
    assert (few.code_n[held_out.indices] < 0).all(axis=1).mean() > 0.08, "many have no labelled neighbour"
    fits = [calibrate(reference.frozen, [one], MapConfig()).labels[0] for one in (column, few)]
    for fit in fits:
        assert (np.diag(fit.usual_ll) > 0.9).all()
    assert LEAST <= len(fits[1].scores_s) < (~hidden).sum()


def between_types(atlas: Atlas) -> anndata.AnnData:
    """Twelve cells of the new batch, and six of an unseen type: half of each gene's counts are of one of two types."""
    known, rng = atlas.known, np.random.default_rng(5)
    counts, types = known.X.toarray(), known.obs["cell_type"].to_numpy()
    one, other = (counts[types == name][:6].astype(int) for name in ("type0", "type1"))
    mixed = rng.binomial(one, 0.5) + rng.binomial(other, 0.5)
    some = np.linspace(0, len(counts) - 1, 12).astype(int)
    obs = pd.concat([known.obs.iloc[some], known.obs.iloc[:6].assign(cell_type="between")])
    obs.index = [f"c{i}" for i in range(len(obs))]
    return anndata.AnnData(sparse.csr_matrix(np.r_[counts[some], mixed].astype(np.float32)), obs=obs, var=known.var)


def test_labels_tell_of_a_type_between_two(reference: Reference, atlas: Atlas, tmp_path: Path) -> None:
    """By how much scores of cells without kin are higher, and that nothing else is another: 3 times the odder votes."""
    query, keys = between_types(atlas), ("side", "cell_type")
    alone = reference.map(query, batch_key="batch", out=tmp_path / "alone")
    told = reference.map(query, batch_key="batch", label_key=keys, out=tmp_path / "told")
    indices, distances = (np.load(tmp_path / "told" / "neighbors" / f"{name}.npy") for name in ("indices", "distances"))
    columns = reference.frozen.labels(keys)
    calibration = calibrate(reference.frozen, columns, MapConfig())
    odd = [
        fit.oddness(vote(distances, column.code_n[indices], len(column.names)))
        for column, fit in zip(columns, calibration.labels, strict=True)
    ]
    more = (told.obs["schelix_novelty"] - alone.obs["schelix_novelty"]).to_numpy()
    np.testing.assert_allclose(more, 3 * np.maximum(*odd), atol=1e-4)
    new = (query.obs["cell_type"] == "between").to_numpy()
    assert more[new].max() > 0.5 > more[~new].max(), "neighbours of both types are no label's usual ones"
    score = told.obs["schelix_novelty"].to_numpy()
    alone_p = calibration.of_pools[19]
    p = alone_p.novelty.p_values(KinScores(score, score, score, score, np.zeros(len(score), int)))
    p = alone_p.by_label.p_values(p, voted(columns, indices, distances))
    np.testing.assert_allclose(told.obs["schelix_novelty_p"], p, atol=1e-6)
    np.testing.assert_array_equal(alone.embedding, told.embedding, "a latent does not depend on labels")


def test_held_out_cells_tell_what_labels_say(reference: Reference) -> None:
    held_out = hold_out(reference.frozen, MapConfig())
    odd = np.random.default_rng(0).exponential(size=len(held_out.rows))
    every, pools = np.ones(len(odd)), held_out.pools[0]

    def with_kin(odd_s: np.ndarray, often_s: np.ndarray) -> tuple[np.ndarray, Usual]:
        return pools.with_kin(held_out.raw, held_out.evidence(odd_s), often_s)

    (without, told), usual = with_kin(odd, every)
    np.testing.assert_allclose(told[0] - without[0], 3 * odd)
    np.testing.assert_array_equal(without, with_kin(odd * 0, every)[0][1])
    assert (usual.score_cz[1, 1:5] > usual.score_cz[0, 1:5]).all()
    silent = with_kin(odd * 0, every * 0)[0]
    np.testing.assert_array_equal(silent[0], without, "without labels none is rare")
    assert (silent[1, 0] < without[0]).mean() > 0.5, "expression of cells whose labels are rare does not count"


def test_expression_counts_less_where_labels_are_rare(atlas: Atlas, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = []
    for asked in (30, 1e9):  # cells that a label has at least, to be none that is rare
        monkeypatch.setattr(odd_votes_module, "NEIGHBORS", asked)
        found = Reference.open(atlas.run).map(atlas.known, batch_key="batch", label_key="cell_type")
        scores.append(found.obs["schelix_novelty"].to_numpy())
    common, rare = scores
    assert (rare <= common).all()
    assert (rare < common - 0.1).mean() > 0.5


def test_novelty_is_calibrated_on_held_out_cells_and_their_votes(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(odd_votes_module, "NEIGHBORS", 300)  # all labels are rare
    frozen, rng = reference.frozen, np.random.default_rng(6)
    columns, held_out, said = frozen.labels(("side", "cell_type")), hold_out(frozen, MapConfig()), []
    for column in columns:  # a tenth of the labels are wrong, so that votes are mixed
        wrong = rng.random(len(column.code_n)) < 0.1
        column.code_n[wrong] = rng.integers(0, len(column.names), wrong.sum())
    found = calibrate(frozen, columns, MapConfig())
    for column, fit in zip(columns, found.labels, strict=True):
        near, true = column.code_n[held_out.indices], column.code_n[held_out.rows]
        votes = vote(held_out.distances, near, len(column.names))
        within = votes_within(frozen, column)
        said.append(odd_elsewhere(fit, votes, near, true, held_out.batch, np.arange(len(true)), within))
    often_s = np.ones(len(held_out.rows))
    for code in np.unique(held_out.batch):
        mine = held_out.batch == code
        near = held_out.indices[mine], held_out.distances[mine]
        often_s[mine] = often(columns, frozen.profiles, *near, int(code))
    for pools in held_out.pools:
        (without, told), _ = pools.with_kin(held_out.raw, held_out.evidence(np.maximum(*said)), often_s)
        of_pools = found.of_pools[pools.size]
        for calibration, scores in ((of_pools.unlabelled, without), (of_pools.novelty, told)):
            for part, of_size in zip(calibration.sizes, scores, strict=False):
                np.testing.assert_allclose(part.scores_s, np.sort(of_size[np.isfinite(of_size)]), atol=1e-9)
    (without, told), _ = held_out.pools[0].with_kin(held_out.raw, held_out.evidence(np.maximum(*said)), often_s)
    assert np.nanmax(np.abs(told - without)) > 0.5
