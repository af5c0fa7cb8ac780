"""What must not decide a mapping: places, names, company, repeated or missing names of genes, missing labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from schelix_scale import Reference, extend, open_store
from schelix_scale.errors import DataError, RunError
from schelix_scale.mapping import encode
from schelix_scale.mapping.alike import UsuallyAlike
from schelix_scale.mapping.by_label import ByLabel
from schelix_scale.mapping.calibration import Calibration, KinCalibration, calibrate
from schelix_scale.mapping.columns import LabelColumns, check_keys
from schelix_scale.mapping.correction import fit_batch
from schelix_scale.mapping.expression import Shared
from schelix_scale.mapping.genes import match_genes
from schelix_scale.mapping.held_out import hold_out
from schelix_scale.mapping.kin import Usual
from schelix_scale.mapping.of_pools import OfPools
from schelix_scale.mapping.query import content_order, drawn_step
from schelix_scale.mapping.reference import Frozen
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.mapping.strange import Strange
from schelix_scale.progress import QuietReporter
from schelix_scale.transfer import (
    LabelCalibration,
    Labels,
    NoveltyCalibration,
    batch_weights,
    effective_count,
    vote,
)
from tests.mapping.conftest import Atlas


def test_a_batch_is_moved_alike_in_any_order(reference: Reference, atlas: Atlas, tmp_path: Path) -> None:
    """Types of equally many cells: half of the weight of the clusters lies on either side of a cluster exactly."""
    reference.map(atlas.known, batch_key="batch", out=tmp_path / "m")
    anchor, variant = (np.load(tmp_path / "m" / "features" / f"{name}_raw.npy") for name in ("anchor", "variant"))
    frozen, rows = reference.frozen, np.arange(len(anchor))
    first = fit_batch(frozen.clusters, anchor, variant)
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(rows))
        again = fit_batch(frozen.clusters, anchor[order], variant[order])
        np.testing.assert_allclose(again.anchor_d, first.anchor_d, atol=1e-4)
        np.testing.assert_allclose(again.variant_v, first.variant_v, atol=1e-4)


def test_cells_are_drawn_by_what_is_measured(reference: Reference, atlas: Atlas) -> None:
    raw = np.asarray(reference.frozen.raw_na)
    order = np.random.default_rng(0).permutation(len(raw))
    step = drawn_step(reference.frozen)
    numbers = content_order(raw, step)
    np.testing.assert_array_equal(content_order(raw[order], step), numbers[order])
    assert (content_order(raw * (1 + 1e-7), step) == numbers).mean() > 0.99
    assert len(np.unique(numbers)) > 0.95 * len(raw)
    drawn = np.argsort(numbers)[: len(raw) // 4]  # at random: a quarter of each type
    types = atlas.reference.obs["cell_type"].to_numpy()[drawn]
    assert pd.Series(types).value_counts(normalize=True).between(0.15, 0.35).all()


def test_names_of_cells_and_labels_asked_for_do_not_matter(reference: Reference, atlas: Atlas) -> None:
    plain, renamed = atlas.query.copy(), atlas.query.copy()
    renamed.obs_names = [f"other-{9999 - i}" for i in range(renamed.n_obs)]
    one = reference.map(plain, batch_key="batch")
    other = reference.map(renamed, batch_key="batch", label_key=["cell_type", "side"])
    np.testing.assert_array_equal(one.embedding, other.embedding)


def test_labels_that_calibrate_fewer_kin_change_no_latent(atlas: Atlas, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the cells of whole batches are left out for their labels."""

    def fewer(frozen: Frozen, labels: Sequence[Labels], *others: Any) -> Calibration:
        found = calibrate(frozen, labels, *others)
        few = {
            size: replace(part, novelty=KinCalibration(part.novelty.sizes[:2], part.novelty.both[:2]))
            for size, part in found.of_pools.items()
        }
        return replace(found, of_pools=few) if labels else found

    monkeypatch.setattr(encode, "calibrate", fewer)
    one, other = (Reference.open(atlas.run).map(atlas.query, batch_key="batch", label_key=key) for key in ((), "side"))
    np.testing.assert_array_equal(one.embedding, other.embedding)


def test_files_do_not_take_genes_from_each_other(reference: Reference, atlas: Atlas, tmp_path: Path) -> None:
    whole, panel = atlas.known[:100].copy(), atlas.known[100:, :120].copy()
    paths = [tmp_path / "whole.h5ad", tmp_path / "panel.h5ad"]
    for cells, path in zip((whole, panel), paths, strict=True):
        cells.obs["batch"] = path.stem
        cells.write_h5ad(path)
    alone = [reference.map(str(path), batch_key="batch") for path in paths]
    both = reference.map([str(path) for path in paths], batch_key="batch")
    np.testing.assert_allclose(both.embedding, np.concatenate([one.embedding for one in alone]), atol=1e-4)


def test_repeated_and_missing_names_of_genes() -> None:
    counts = np.ones((3, 4), np.float32)
    query = anndata.AnnData(counts, var=pd.DataFrame({"symbol": ["A", "A", "nan", None]}, index=list("wxyz")))
    genes = pd.DataFrame({"mean": 1.0, "symbol": ["A", "nan", "A", "None"]}, index=["g1", "g2", "g3", "g4"])
    match = match_genes(open_store(query), genes, np.ones(4, bool), None)
    assert match.place_g.tolist() == [0, -1, -1, -1]
    versions = anndata.AnnData(counts, var=pd.DataFrame(index=["ENSG00000001.7", "ENSG00000002", "b", "c"]))
    genes = pd.DataFrame({"mean": 1.0}, index=["ENSG00000002.1", "ENSG00000001"])
    assert match_genes(open_store(versions), genes, np.ones(2, bool), None).place_g.tolist() == [1, 0]


def test_numbers_as_labels() -> None:
    assert Labels.of_column("c", [1.0, 2.0, float("nan"), 2.0]).names == ("1", "2")
    assert Labels.of_column("c", [True, False]).names == ("False", "True")
    column = pd.Series(pd.Categorical(["a", "b", None], categories=["a", "b", "unused"]))
    assert Labels.of_column("c", list(column)).names == ("a", "b")


def test_measurements_are_no_labels(reference: Reference, atlas: Atlas, tmp_path: Path) -> None:
    path = reference.path / "cells.parquet"
    kept = path.read_bytes()
    table = pd.read_parquet(path)
    try:
        table.assign(size=np.linspace(0, 1, len(table))).to_parquet(path)
        with pytest.raises(DataError, match="'size' of the reference has numbers"):
            reference.frozen.labels(("size",))
    finally:
        path.write_bytes(kept)
    with pytest.raises(DataError, match="would be written to schelix_novelty"):
        check_keys(["novelty"])
    with pytest.raises(DataError, match="would be written to schelix_a_set"):
        check_keys(["a", "a_set"])


def test_cells_without_any_gene_of_the_reference_are_unknown_and_counted(reference: Reference, atlas: Atlas) -> None:
    query = atlas.known[:60]
    counts = sparse.csr_matrix(query.X, copy=True).tolil()
    counts[[3, 17]] = 0
    more = np.zeros((query.n_obs, 1), np.float32)
    more[[3, 17]] = 9
    names = [*query.var_names, "not in the reference"]
    cells = anndata.AnnData(
        sparse.hstack([counts, more], format="csr").astype(np.float32), query.obs, pd.DataFrame(index=names)
    )
    reporter = QuietReporter()
    mapped = reference.map(cells, batch_key="batch", label_key="cell_type", reporter=reporter)
    labels = mapped.obs["schelix_cell_type"].astype(str).to_numpy()
    sets = mapped.obs["schelix_cell_type_set"].astype(str).to_numpy()
    assert set(labels[[3, 17]]) == {"unknown"}
    assert {len(text.split("; ")) for text in sets[[3, 17]]} == {atlas.reference.obs["cell_type"].nunique()}
    others = np.delete(np.arange(60), [3, 17])
    assert (labels[others] == query.obs["cell_type"].astype(str).to_numpy()[others]).mean() > 0.9
    assert any("2 of 60 cells have no counts of any gene that the reference has" in said for said in reporter.messages)


def test_few_labelled_neighbours_still_vote_and_none_is_unknown() -> None:
    distances = np.array([[1e-9, 1e-9, 1e-9, 1e-9, 0.3, 0.3, 0.3, 0.4]])
    code = np.array([[-1, -1, -1, -1, 1, 1, 0, -1]])
    np.testing.assert_allclose(vote(distances, code, 2), [[1 / 3, 2 / 3]])
    columns = LabelColumns(Labels("c", ("a", "b"), np.zeros(0, np.int32)), 3)
    probabilities = np.array([[0.9, 0.1], [0.5, 0.5], [0.9, 0.1]])
    sets, novel, voted = probabilities > 0.6, np.array([False, False, True]), np.array([True, False, True])
    columns.fill(0, probabilities, sets, novel, voted)
    table = columns.table()
    assert list(table["schelix_c"]) == ["a", "unknown", "unknown"]
    assert list(table["schelix_c_set"]) == ["a", "a; b", "unknown"]


def test_one_cell_of_a_small_batch_does_not_hide_all_novelty() -> None:
    batch = np.r_[np.zeros(1000, int), np.ones(1000, int), 2]
    scores = np.r_[np.linspace(0, 1, 1000), np.linspace(0, 1, 1000), 50.0]
    alike, capped = (NoveltyCalibration.fit(scores, batch_weights(batch, enough)) for enough in (1, 100))
    assert alike.p_values(np.array([10.0]))[0] > 0.3
    assert capped.p_values(np.array([10.0]))[0] < 0.01
    np.testing.assert_allclose(effective_count(np.ones(50)), 50)
    assert capped.least == pytest.approx(1 / (effective_count(batch_weights(batch, 100)) + 1))


def test_thresholds_count_the_new_cell_in() -> None:
    """With 9 held-out cells, 90 % is the largest score; with 8 there is no such score and all labels are in."""
    for count, threshold in ((9, 0.1), (8, 0.0)):
        scores = np.linspace(0.1, 0.9, 9)[9 - count :]
        fit = LabelCalibration(1.0, 0.01, scores, np.full(count, 1 / count), np.eye(2))
        assert fit.threshold(0.9) == pytest.approx(threshold)


def test_held_out_cells_have_no_neighbour_of_their_batch(reference: Reference) -> None:
    held_out = hold_out(reference.frozen, MapConfig())
    batch = reference.frozen.batch_n
    assert (batch[held_out.indices] != batch[held_out.rows][:, None]).all()
    assert (np.diff(held_out.distances, axis=1) >= 0).all()


def test_a_calibration_is_kept_as_it_is(tmp_path: Path) -> None:
    parts = [NoveltyCalibration(np.arange(3.0) + i, np.array([0.5, 0.3, 0.2])) for i in range(14)]
    label = LabelCalibration(1.5, 0.02, np.arange(4.0), np.full(4, 0.25), np.array([[0.9, 0.1], [0.2, 0.8]]))
    novelty = KinCalibration(tuple(parts[:5]), tuple(parts[5:10]))
    unlabelled = KinCalibration(tuple(parts[10:12]), tuple(parts[12:]))
    usual, shared = Usual(7.5, np.arange(12.0).reshape(2, 6)), Shared(np.arange(4.0))
    by_label = ByLabel(np.arange(4.0), np.full(4, 0.25), np.arange(4)[None])
    alike = UsuallyAlike(1.5, np.inf)
    strange = Strange(np.ones((3, 5), np.float32), np.array([0, 0, 1]))
    whitening = np.arange(9.0).reshape(3, 3)
    of_pools = OfPools(61, novelty, unlabelled, usual, shared, alike, strange, by_label)
    other_pools = OfPools(19, unlabelled, novelty, usual, shared, alike, strange, by_label)
    Calibration((label,), whitening, (123, 61, 30, 19), {61: of_pools, 19: other_pools}).save(tmp_path / "c.npz")
    whole = Calibration.load(tmp_path / "c.npz")
    assert whole.sizes == (123, 61, 30, 19)
    assert list(whole.of_pools) == [61, 19]
    assert whole.of_pool(70).size == 61
    assert whole.of_pools[19].most == (4, 1)
    again = whole.of_pool(60)
    found = [*again.novelty.sizes, *again.novelty.both, *again.unlabelled.sizes, *again.unlabelled.both]
    for one, other in zip(found, parts, strict=True):
        np.testing.assert_array_equal(one.scores_s, other.scores_s)
        np.testing.assert_array_equal(one.weight_s, other.weight_s)
    assert again.most == (1, 4)
    assert again.usual.spread == 7.5
    np.testing.assert_array_equal(again.usual.score_cz, usual.score_cz)
    np.testing.assert_array_equal(whole.labels[0].usual_ll, label.usual_ll)
    assert again.usually_alike == alike
    np.testing.assert_array_equal(again.strange.left_sh, strange.left_sh)
    np.testing.assert_array_equal(again.strange.batch_s, strange.batch_s)
    for name in ("p_s", "weight_s", "code_cs"):
        np.testing.assert_array_equal(getattr(again.by_label, name), getattr(by_label, name))
    np.testing.assert_array_equal(again.shared.usual_z, shared.usual_z)
    np.testing.assert_array_equal(whole.whitening_dd, np.arange(9.0).reshape(3, 3))
    assert (whole.labels[0].temperature, whole.labels[0].floor) == (1.5, 0.02)


def test_too_few_held_out_cells_for_the_level_are_told(reference: Reference, atlas: Atlas) -> None:
    reporter = QuietReporter()
    reference.map(atlas.known[:20].copy(), batch_key="batch", reporter=reporter, novelty=1e-6)
    assert any("tell p-values of" in text for text in reporter.messages)
    found = calibrate(reference.frozen, reference.frozen.labels(("cell_type",)), MapConfig())
    told = found.of_pool(atlas.known.n_obs)
    of_all = max(part.least for part in (*told.novelty.both, *told.unlabelled.both))
    level = (of_all + told.by_label.least(of_all)) / 2
    assert of_all < level, "against the cells of a label the least is higher"
    for keys, said in (((), False), (("cell_type",), True)):
        reporter = QuietReporter()
        reference.map(atlas.known.copy(), batch_key="batch", label_key=keys, reporter=reporter, novelty=level)
        assert any("tell p-values of" in text for text in reporter.messages) == said


def test_a_batch_without_a_gene_of_the_reference_says_nothing(reference: Reference, atlas: Atlas) -> None:
    """No cell of it is drawn; nothing is divided by their number (warnings are errors here)."""
    blind = atlas.known[:20].copy()
    blind.X = sparse.csr_matrix((20, blind.n_vars), dtype=np.float32)
    blind.obs["batch"] = "blind"
    blind.obs_names = [f"blind{i}" for i in range(20)]
    extra = sparse.csr_matrix(np.repeat([[0.0], [5.0]], [atlas.known.n_obs, 20], axis=0).astype(np.float32))
    both = anndata.concat([atlas.known, blind])
    names = pd.DataFrame(index=[*both.var_names, "of its own"])
    query = anndata.AnnData(sparse.hstack([both.X, extra]).tocsr(), obs=both.obs, var=names)
    found = reference.map(query, batch_key="batch", label_key="cell_type").obs
    assert (found["schelix_novelty_p"][-20:] == 1).all()
    assert (found["schelix_cell_type"][-20:] == "unknown").all()


def test_an_extension_goes_on_only_with_the_same_batches_and_settings(atlas: Atlas, tmp_path: Path) -> None:
    cells = atlas.query[:60].copy()
    cells.obs["half"] = np.where(np.arange(60) < 30, "x", "y")
    extend(atlas.run, cells, batch_key="batch", out=tmp_path / "v2", reporter=QuietReporter())
    for changed in ({"batch_key": "half"}, {"batch_key": "batch", "values": "linear"}):
        with pytest.raises(RunError, match="with other settings or cells"):
            extend(atlas.run, cells, out=tmp_path / "v2", reporter=QuietReporter(), **changed)
    log = Path("checkpoints") / "metrics.jsonl"
    assert not (tmp_path / "v2" / log).samefile(atlas.run / log)


def test_advice_names_the_verb(atlas: Atlas, reference: Reference, tmp_path: Path) -> None:
    from schelix_scale.run_directory import RunDirectory

    reference.map(atlas.query[:20].copy(), batch_key="batch", out=tmp_path / "m")
    (tmp_path / "m" / "mapped.zarr" / "zarr.json").unlink()
    assert "`schelix map` command again" in RunDirectory.open(tmp_path / "m").verify()[0]


def test_symbols_of_the_reference_are_kept(tmp_path: Path) -> None:
    from schelix_scale import prepare
    from tests.mapping.conftest import SETTINGS, cells

    made = cells()
    made.var["symbol"] = [f"S{i}" for i in range(made.n_vars)]
    made.var["kind"] = "Gene Expression"
    prepare(made, batch_key="batch", out=tmp_path / "run", reporter=QuietReporter(), **SETTINGS)
    genes = pd.read_parquet(tmp_path / "run" / "genes.parquet")
    assert genes["symbol"].tolist() == made.var["symbol"].tolist()
    assert "kind" not in genes
