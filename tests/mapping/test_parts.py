"""The closed-form parts of mapping against dense NumPy."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.metrics.pairwise import cosine_similarity

from schelix_scale import Reference, open_store
from schelix_scale.errors import DataError
from schelix_scale.extending.files import _apart, new_batch_names
from schelix_scale.extending.index import append_index
from schelix_scale.features.correction import fit_correction
from schelix_scale.features.projection import fit_projection
from schelix_scale.graph.knn import find_neighbors
from schelix_scale.graph.lists import CellIndex
from schelix_scale.graph.operator import Operator, build_operator
from schelix_scale.graph.vectors import BLOCK_CELLS
from schelix_scale.mapping.correction import Clusters, fit_batch, shifted
from schelix_scale.mapping.diffusion import Levels, Widths, kernel_widths, query_weights
from schelix_scale.mapping.genes import GeneMatch, _restricted, match_genes, reference_values, shared_target
from schelix_scale.stores.batches import Batches
from tests.mapping.conftest import Atlas
from tests.synthetic import gaussian_cells, make_cells


@pytest.fixture(scope="module")
def planted() -> tuple[Clusters, np.ndarray, np.ndarray, np.ndarray]:
    """Clusters fitted on three batches; the cells of a fourth one, their types and their true displacement."""
    z, types, batch = gaussian_cells(n=1200, d=8, n_types=4, n_batches=4, shift=1.5)
    old = batch < 3
    correction = fit_correction(z[old], batch[old], 3, 0, 1)
    none = np.zeros((int(old.sum()), 0))
    clusters = Clusters.of_cells(correction, np.zeros((len(correction.centroids_kd), 3, 0)), z[old], none, batch[old])
    return clusters, z, types, batch


def centres(corrected: np.ndarray, types: np.ndarray) -> np.ndarray:
    return np.stack([corrected[types == t].mean(axis=0) for t in range(4)])


def test_a_new_batch_is_moved_onto_the_common_centres(
    planted: tuple[Clusters, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    clusters, z, types, batch = planted
    old, new = batch < 3, batch == 3
    target = centres(clusters.correction.apply(z[old], batch[old]), types[old])
    before = np.linalg.norm(centres(z[new], types[new]) - target, axis=1)
    none = np.zeros((int(new.sum()), 0))
    shift = fit_batch(clusters, z[new], none)
    moved, _ = shifted(shift, z[new], none, 1.0)
    after = np.linalg.norm(centres(moved, types[new]) - target, axis=1)
    assert after.max() < 0.5 * before.min()
    half, _ = shifted(shift, z[new], none, 0.5)
    np.testing.assert_allclose(half, (moved + z[new]) / 2, atol=1e-5)


def test_one_type_alone_is_moved_by_what_its_batch_is_displaced_by(
    planted: tuple[Clusters, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    clusters, z, types, batch = planted
    one = z[(batch == 3) & (types == 0)]
    old = batch < 3
    target = centres(clusters.correction.apply(z[old], batch[old]), types[old])
    true = np.mean(centres(z[batch == 3], types[batch == 3]) - target, axis=0)
    shift = fit_batch(clusters, one, np.zeros((len(one), 0)))
    assert np.linalg.norm(shift.anchor_d - true) < 0.7 * np.linalg.norm(true)
    near = np.linalg.norm((one - shift.anchor_d)[:, None] - target, axis=2).argmin(axis=1)
    assert (near == 0).mean() > 0.95, "it must not be drawn to other types"


def test_what_a_type_of_most_cells_has_of_its_own_is_not_that_of_the_batch(
    planted: tuple[Clusters, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """Three quarters of the cells are of a type that has a displacement of its own beside the batch's."""
    clusters, z, types, batch = planted
    of_type = [np.flatnonzero((batch == 3) & (types == t)) for t in range(4)]
    whole = fit_batch(clusters, z[batch == 3], np.zeros((int((batch == 3).sum()), 0)))
    cells = z[np.concatenate([of_type[0], *(rows[:8] for rows in of_type[1:])])]
    cells[: len(of_type[0]), 0] += 2
    shift = fit_batch(clusters, cells, np.zeros((len(cells), 0)))
    assert np.linalg.norm(shift.anchor_d - whole.anchor_d) < 0.5


def test_a_type_that_the_reference_lacks_has_little_part_in_the_displacement(
    planted: tuple[Clusters, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """40 cells 20 away from the others, in any direction: the mean of all cells would move by 1.8."""
    clusters, z, _, batch = planted
    new, moved = z[batch == 3], []
    without = fit_batch(clusters, new, np.zeros((len(new), 0)))
    for seed in range(6):
        away = np.random.default_rng(seed).normal(size=new.shape[1])
        cells = np.vstack([new, 0.5 * new[:40] + 20 * away / np.linalg.norm(away)])
        shift = fit_batch(clusters, cells, np.zeros((len(cells), 0)))
        moved.append(np.linalg.norm(shift.anchor_d - without.anchor_d))
        assert shift.held_back > without.held_back
    assert np.mean(moved) < 0.6


def test_three_cells_move_little(planted: tuple[Clusters, np.ndarray, np.ndarray, np.ndarray]) -> None:
    clusters, z, _, batch = planted
    rows = np.flatnonzero(batch == 3)
    whole = fit_batch(clusters, z[rows], np.zeros((len(rows), 0)))
    few = fit_batch(clusters, z[rows[:3]], np.zeros((3, 0)))
    assert np.linalg.norm(few.anchor_d) < 0.5 * np.linalg.norm(whole.anchor_d)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_missing_genes_count_as_what_the_others_lead_to_expect(weight: float) -> None:
    """Also where half of the genes have less weight, as the Variants do below a strength of 1."""
    x = make_cells(n_genes=120, per_group=30, seed=2).log_csr
    genes = np.arange(100)
    weights = np.where(genes < 50, 1.0, weight)
    projection, z = fit_projection(x, genes, 5, 0.75, weights)
    dense = x.toarray()[:, genes].astype(np.float64)
    table = pd.DataFrame({"mean": x.toarray().mean(axis=0), "var": x.toarray().var(axis=0)})
    place = np.arange(x.shape[1])
    lacking = np.sort(np.random.default_rng(0).choice(100, 40, replace=False))
    place[lacking] = -1
    match = GeneMatch(place, np.isin(np.arange(x.shape[1]), genes), "")
    spread = z.astype(np.float64).var(axis=0)
    restricted = _restricted(projection, match, table, 0.75, spread, weights)
    without = x.toarray()
    without[:, lacking] = 0
    found = restricted.apply(sparse.csr_matrix(without))
    # dense conditional expectation of a probabilistic PCA, with the covariance of all genes written out
    scale = table["var"].to_numpy()[genes] ** 0.375 / weights
    components = projection.loadings_hd * scale[:, None]
    noise = ((table["var"].to_numpy()[genes] / scale**2).sum() - spread.sum()) / (len(genes) - 5)
    covariance = components @ np.diag(spread) @ components.T + noise * np.eye(len(genes))
    there = ~np.isin(genes, lacking)
    scaled = (np.minimum(dense, projection.cap) - table["mean"].to_numpy()[genes]) / scale
    gain = covariance[np.ix_(~there, there)] @ np.linalg.inv(covariance[np.ix_(there, there)])
    full = scaled.copy()
    full[:, ~there] = scaled[:, there] @ gain.T
    np.testing.assert_allclose(found, full @ components, atol=2e-3 * np.abs(z).max())
    zero_filled = np.where(there, scaled, 0) @ components
    assert np.square(found - z).sum() < 0.8 * np.square(zero_filled - z).sum()


def test_genes_in_another_order_and_more_of_them(reference: Reference, atlas: Atlas) -> None:
    query, order = atlas.known, np.random.default_rng(0).permutation(atlas.known.n_vars)
    extra = anndata.AnnData(
        sparse.csr_matrix(np.full((query.n_obs, 3), 50, np.float32)),
        obs=query.obs[[]],
        var=pd.DataFrame(index=list("xyz")),
    )
    shuffled = anndata.concat([query[:, order], extra], axis=1, merge="first")
    one, other = (reference.map(cells, batch_key="batch") for cells in (query, shuffled))
    np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-4)


def test_genes_are_found_under_other_names_and_missing_ones_are_told(reference: Reference, atlas: Atlas) -> None:
    query = atlas.known[:, :150].copy()
    query.var["symbol"] = query.var_names
    query.var_names = [f"ENS{i}" for i in range(query.n_vars)]
    mapped = reference.map(query, batch_key="batch", label_key="cell_type")
    summary = mapped.manifest["summary"]
    assert (summary["genes_matched"], summary["genes_matched_by"]) == (150, "symbol = var_names")
    assert 0 < summary["used_genes_missing_share"] < 0.3
    right = mapped.obs["schelix_cell_type"].to_numpy() == query.obs["cell_type"].to_numpy()
    assert right.mean() > 0.9
    with pytest.raises(DataError, match=r"mapping needs 100% \(min_genes\).*name the var column"):
        reference.map(query, min_genes=1.0)
    with pytest.raises(DataError, match="has no var column 'gene'"):
        reference.map(query, gene_key="gene")


def test_a_panel_is_normalised_to_the_share_that_its_genes_have() -> None:
    counts = sparse.csr_matrix(np.array([[5.0, 3.0, 2.0, 40.0]], np.float32))
    query = anndata.AnnData(counts, var=pd.DataFrame(index=["b", "a", "c", "other"]))
    genes = pd.DataFrame({"mean": np.log1p([30.0, 50.0, 20.0, 100.0])}, index=["a", "b", "c", "d"])
    match = match_genes(open_store(query), genes, np.array([True, True, False, True]), None)
    assert match.place_g.tolist() == [1, 0, 2, -1]
    target = shared_target(match, genes["mean"].to_numpy(), np.zeros(4))
    assert target == pytest.approx(1e4 / 2)
    found = reference_values(counts, match, "counts", target).toarray()
    np.testing.assert_allclose(found, np.log1p([[1500.0, 2500.0, 0, 0]]), rtol=1e-6)


def test_the_share_of_genes_that_few_cells_have() -> None:
    """Of counts that are 0 in most cells, from mean and variance of their logarithms alone."""
    values = np.zeros((1000, 3))
    values[:50, 0], values[:, 1], values[:400, 2] = 60.0, 4.0, 5.0
    logs = np.log1p(values)
    match = GeneMatch(np.array([0, -1, 1]), np.ones(3, bool), "")
    target = shared_target(match, logs.mean(axis=0), logs.var(axis=0))
    assert target == pytest.approx(1e4 * (3 + 2) / (3 + 4 + 2))


def test_a_query_diffuses_as_a_row_of_the_operator_would() -> None:
    """Against the dense formula, with a reference whose cells keep their own rows."""
    z, _, batch = gaussian_cells(n=120, d=6, seed=1)
    neighbors = find_neighbors(z, 8, "exact", 0, 1)
    operator = build_operator(neighbors, batch, 1.0, 5)
    dense = operator.block(slice(0, len(z))).toarray()
    levels_n = [z.astype(np.float32)]
    for _ in range(3):
        levels_n.append((0.7 * dense @ levels_n[-1] + 0.3 * z).astype(np.float32))
    levels = Levels(operator, levels_n[0], (0, 1, 3), np.stack([levels_n[t] for t in (0, 1, 3)], axis=1), 0.3)
    np.testing.assert_allclose(levels.rows(2, np.arange(7, 20)), levels_n[2][7:20], atol=1e-5)
    widths = kernel_widths(levels_n[0], operator, 5, np.arange(len(z)))
    np.testing.assert_allclose(widths, neighbors.distances_nk[:, 4], atol=1e-6)
    near, far = neighbors.indices_nk, neighbors.distances_nk
    weights = query_weights(far, widths[near], batch[near], 1.0, 5)
    np.testing.assert_allclose(weights, operator.weights_nk, atol=1e-5)
    rows, kept = np.array([3, 50]), np.array([1.0, 0.25])
    found = levels.diffuse(near[rows], weights[rows], levels_n[0][rows], (0, 1, 3), kept)
    for place, hop in enumerate((0, 1, 3)):
        mixed = dense[rows] @ levels_n[hop - 1] if hop else levels_n[0][rows]
        expected = [0.7 * mixed[0] + 0.3 * z[3], 0.175 * mixed[1] + 0.825 * z[50]] if hop else mixed
        np.testing.assert_allclose(found[:, place], expected, atol=1e-5)
    levels.materialize()
    again = levels.diffuse(near[rows], weights[rows], levels_n[0][rows], (0, 1, 3), kept)
    np.testing.assert_array_equal(found, again)


def test_widths_among_some_of_the_cells() -> None:
    rng = np.random.default_rng(4)
    features = rng.normal(size=(60, 5)).astype(np.float32)
    far = 1 - cosine_similarity(features)
    np.fill_diagonal(far, np.inf)
    near, chosen = np.argsort(far, axis=1)[:, :10], rng.random(60) < 0.5
    operator = Operator(near, np.zeros((60, 10), np.float32))
    rows = np.arange(40)
    expected = []
    for row in rows:
        others = [cell for cell in near[row] if chosen[cell]]
        expected.append(far[row, others[2] if len(others) > 2 else near[row, -1]])
    np.testing.assert_allclose(kernel_widths(features, operator, 3, rows, chosen), expected, rtol=1e-4)
    assert any(chosen[near[rows]].sum(axis=1) < 3), "of some too few are listed"
    np.testing.assert_allclose(kernel_widths(features, operator, 3, rows), np.sort(far, axis=1)[:40, 2], rtol=1e-4)


def test_widths_of_all_cells_are_those_of_single_ones() -> None:
    """Over more than two blocks, on any number of threads; among some of the cells they are others."""
    rng, n = np.random.default_rng(0), 2 * BLOCK_CELLS + 5
    z, near = rng.normal(size=(n, 3)).astype(np.float32), rng.integers(0, n, (n, 4))
    asked, others = rng.integers(0, n, (50, 6)), rng.random(n) < 0.5
    operator = Operator(near, np.zeros((n, 4), np.float32))
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    expected = 1 - np.einsum("mkd,mkd->mk", unit[asked], unit[near[asked, 2]])
    single = Widths(z, operator, 3)
    np.testing.assert_allclose(single(asked), np.maximum(expected, 1e-12), atol=1e-6)
    some = single(asked, others)
    assert (some != single(asked)).mean() > 0.2
    for threads in (1, 3):
        found = Widths(z, operator, 3)
        found.materialize(threads)
        np.testing.assert_array_equal(found(asked), single(asked))
        np.testing.assert_array_equal(found(asked, others), some)


def test_an_index_takes_in_new_cells(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cells = rng.normal(size=(900, 6)).astype(np.float32)
    old, new = cells[:700], cells[700:]
    CellIndex.build(old, tmp_path / "old", 0, 1, list_cells=32)
    append_index(tmp_path / "old", new, tmp_path / "new")
    index = CellIndex.open(tmp_path / "new")
    assert np.sort(index.cells).tolist() == list(range(900))
    unit = cells / np.linalg.norm(cells, axis=1, keepdims=True)
    np.testing.assert_allclose(index.vectors_nd, unit[index.cells], atol=1e-6)
    nearest = np.square(unit[:, None] - index.lists.centroids_md[None]).sum(axis=2).argmin(axis=1)
    in_list = np.repeat(np.arange(len(index.starts) - 1), np.diff(index.starts))
    chosen = np.empty(900, int)
    chosen[index.cells] = in_list
    assert (chosen == nearest).mean() > 0.98  # lists are looked for among those near a group
    before = CellIndex.open(tmp_path / "old")
    kept = index.cells[index.cells < 700]
    np.testing.assert_array_equal(kept, before.cells)


def test_new_batches_have_names_of_their_own() -> None:
    names = ["d1", "d1 (version 2)", "d2"]
    batches = Batches(np.arange(3, dtype=np.int32), names, np.ones(3, int))
    assert new_batch_names(batches, ["d1", "d3"], 2) == ["d1 (version 2, 2)", "d1 (version 2)", "d2"]


def test_new_batches_of_several_columns_stay_apart_from_those_of_the_run() -> None:
    run = pd.DataFrame({"donor": ["d1", "d1", "d2"], "assay": ["10x", "ss2", "10x"]})
    new = pd.DataFrame({"donor": ["d1", "d1", "d3", "d3"], "assay": ["10x", "ss3", "10x", "10x"]})
    batches = Batches(np.array([0, 1, 2, 2], np.int32), ["d1 | 10x", "d1 | ss3", "d3 | 10x"], np.array([1, 1, 2]))
    named = _apart(run, new, batches, ["donor", "assay"], 3)
    assert named["donor"].tolist() == ["d1 (version 3)", "d1", "d3", "d3"]
    assert named["assay"].tolist() == new["assay"].tolist()
    for codes in ([0, 1, 2, 3], [0, 0, 1, 1]):  # two batches of one name; a batch of two names
        other = Batches(np.array(codes, np.int32), [str(code) for code in sorted(set(codes))], np.ones(4, int))
        with pytest.raises(DataError, match="Use the batch key of the run"):
            _apart(run, new, other, ["donor", "assay"], 3)


def test_hops_of_all_cells_are_those_of_single_ones_on_any_number_of_threads() -> None:
    """Against the sparse formula, over more than two blocks."""
    rng, n = np.random.default_rng(0), 2 * BLOCK_CELLS + 5
    z = rng.normal(size=(n, 2)).astype(np.float32)
    indices, weights = rng.integers(0, n, (n, 3)), rng.dirichlet(np.ones(3), n).astype(np.float32)
    p = sparse.csr_matrix((weights.ravel().astype(float), indices.ravel(), np.arange(0, 3 * n + 1, 3)), shape=(n, n))
    once = 0.7 * (p @ z) + 0.3 * z
    twice = 0.7 * (p @ once) + 0.3 * z
    found = []
    for threads in (1, 3):
        levels = Levels(Operator(indices, weights), z, (0, 3), np.zeros((n, 2, 2), np.float32), 0.3)
        levels.materialize(threads)
        assert levels.missing_hops() == 0
        found.append([levels.rows(hop, np.arange(n)) for hop in (1, 2)])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], [once, twice], atol=1e-5)
