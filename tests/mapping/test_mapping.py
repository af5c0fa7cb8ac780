from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from schelix_scale import Reference, Run, map_cells
from schelix_scale.errors import ConfigError, DataError, RunError
from schelix_scale.features import onepass
from schelix_scale.mapping import columns, diffusion, encode, project
from schelix_scale.mapping import query as query_stages
from schelix_scale.mapping.api import Mapped
from schelix_scale.progress import QuietReporter
from schelix_scale.run_directory import RunDirectory
from tests.mapping.conftest import NOVEL, Atlas
from tests.run_tools import tree


def close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


@pytest.fixture(scope="module")
def mapped(reference: Reference, atlas: Atlas) -> Mapped:
    return reference.map(atlas.query, batch_key="batch", label_key=["cell_type", "side"])


def test_a_new_batch_lies_among_its_types(mapped: Mapped, atlas: Atlas) -> None:
    types = atlas.query.obs["cell_type"].to_numpy()
    known = types != NOVEL
    assert (mapped.obs["schelix_cell_type"].to_numpy()[known] == types[known]).mean() > 0.95
    assert (mapped.obs["schelix_side"].to_numpy()[known] == atlas.query.obs["side"].to_numpy()[known]).mean() > 0.95
    z = Run.open(atlas.run).embedding
    near = NearestNeighbors(n_neighbors=10).fit(z).kneighbors(mapped.embedding[known], return_distance=False)
    assert (atlas.reference.obs["cell_type"].to_numpy()[near] == types[known][:, None]).mean() > 0.95


def test_an_unseen_type_is_flagged_and_not_absorbed(mapped: Mapped, atlas: Atlas) -> None:
    novel = (atlas.query.obs["cell_type"] == NOVEL).to_numpy()
    p = mapped.obs["schelix_novelty_p"].to_numpy()
    assert roc_auc_score(novel, mapped.obs["schelix_novelty"]) > 0.99
    assert (p[novel] <= 0.01).mean() > 0.9
    assert (p[~novel] <= 0.01).mean() < 0.05
    assert set(mapped.obs["schelix_cell_type"][p <= 0.01]) == {"unknown"}
    assert set(mapped.obs["schelix_cell_type_set"][p <= 0.01]) == {"unknown"}
    z = Run.open(atlas.run).embedding
    search = NearestNeighbors(n_neighbors=1).fit(z)
    far, near = (search.kneighbors(mapped.embedding[which])[0] for which in (novel, ~novel))
    assert np.quantile(far, 0.1) > np.quantile(near, 0.9)


def test_widths_of_cells_are_computed_once_where_queries_touch_most_of_them(
    atlas: Atlas, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, kernel_widths = [], diffusion.kernel_widths

    def counting(*parts: object) -> np.ndarray:
        computed.append(len(parts[3]) if len(parts) < 5 or parts[4] is None else 0)  # not those among some batches
        return kernel_widths(*parts)

    monkeypatch.setattr(diffusion, "kernel_widths", counting)
    reference = Reference.open(atlas.run)
    assert atlas.query.n_obs * reference.frozen.config.graph.k >= reference.frozen.n_cells
    for _ in range(2):
        reference.map(atlas.query, batch_key="batch")
        assert sum(computed) == reference.frozen.n_cells


def test_the_reference_is_only_read(atlas: Atlas, tmp_path: Path) -> None:
    before = tree(atlas.run)
    mapped = map_cells(
        atlas.run, atlas.query, batch_key="batch", label_key="cell_type", out=tmp_path / "m", reporter=QuietReporter()
    )
    assert tree(atlas.run) == before
    assert RunDirectory.open(tmp_path / "m").verify() == []
    assert mapped.path == tmp_path / "m"
    on_disk = anndata.read_zarr(tmp_path / "m" / "mapped.zarr")
    assert list(on_disk.obs_names) == list(atlas.query.obs_names)
    assert on_disk.obs["side"].tolist() == atlas.query.obs["side"].tolist()
    np.testing.assert_array_equal(on_disk.obsm["X_schelix"], mapped.embedding)
    summary = mapped.manifest["summary"]
    assert summary["reference_fingerprint"] == RunDirectory.open(atlas.run).record("embed").fingerprint
    assert (summary["cells"], summary["batches"], summary["used_genes_missing"]) == (200, 1, 0)
    with pytest.raises(RunError, match="is the run to map onto"):
        Reference.open(tmp_path / "m")
    with pytest.raises(RunError, match="it is never changed"):
        map_cells(atlas.run, atlas.query, out=atlas.run / "mapped", reporter=QuietReporter())


def test_order_blocks_and_other_batches_do_not_matter(
    mapped: Mapped, reference: Reference, atlas: Atlas, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = atlas.reference[atlas.reference.obs["batch"] == "b0"][::2].copy()
    other.obs_names = [f"other-{name}" for name in other.obs_names]
    both = anndata.concat([atlas.query, other])
    order = np.random.default_rng(1).permutation(both.n_obs)
    monkeypatch.setattr(encode, "BLOCK", 37)
    monkeypatch.setattr(columns, "BLOCK", 37)
    monkeypatch.setattr(query_stages, "QUERY_BLOCK", 41)
    written: list[int] = []

    def write_rows(path: Path, start: int, values: np.ndarray) -> None:
        written.append(len(values))
        onepass.write_rows(path, start, values)

    monkeypatch.setattr(project, "BLOCK_CELLS", 29)  # whatever the memory budget has room for
    monkeypatch.setattr(project, "write_rows", write_rows)
    again = reference.map(both[order].copy(), batch_key="batch", label_key=["cell_type", "side"])
    assert max(written) == 29
    rows = again.adata.obs_names.get_indexer(mapped.adata.obs_names)
    close(again.embedding[rows], mapped.embedding)
    for name in ("schelix_cell_type", "schelix_cell_type_set"):
        assert again.obs[name].astype(str).to_numpy()[rows].tolist() == mapped.obs[name].astype(str).tolist()
    close(again.obs["schelix_novelty_p"].to_numpy()[rows], mapped.obs["schelix_novelty_p"].to_numpy())


def test_cells_of_the_reference_land_on_themselves(reference: Reference, atlas: Atlas) -> None:
    z = Run.open(atlas.run).embedding
    spread = np.linalg.norm(z - z.mean(axis=0), axis=1).mean()
    batch = (atlas.reference.obs["batch"] == "b1").to_numpy()
    one_type = batch & (atlas.reference.obs["cell_type"] == "type1").to_numpy()
    few = np.zeros(len(batch), bool)
    few[np.flatnonzero(batch)[::8]] = True
    for chosen in (batch, one_type, few):
        mapped = reference.map(atlas.reference[chosen].copy(), batch_key="batch", label_key="cell_type")
        assert np.median(np.linalg.norm(mapped.embedding - z[chosen], axis=1)) < 0.1 * spread
        right = mapped.obs["schelix_cell_type"].to_numpy() == atlas.reference.obs["cell_type"].to_numpy()[chosen]
        assert right.mean() >= 0.95


def test_a_batch_of_one_type_stays_with_it(reference: Reference, atlas: Atlas) -> None:
    for name in ("type0", "type2"):
        chosen = (atlas.query.obs["cell_type"] == name).to_numpy()
        mapped = reference.map(atlas.query[chosen].copy(), batch_key="batch", label_key="cell_type")
        assert (mapped.obs["schelix_cell_type"] == name).mean() > 0.9
    alone = reference.map(atlas.query[atlas.query.obs["cell_type"] == NOVEL].copy(), label_key="cell_type")
    assert (alone.obs["schelix_novelty_p"] <= 0.01).mean() > 0.5


def test_threads_get_their_own_answers(reference: Reference, atlas: Atlas) -> None:
    parts = [atlas.query[i::4].copy() for i in range(4)]
    alone = [reference.map(part, batch_key="batch", label_key="cell_type") for part in parts]
    fresh = Reference.open(atlas.run)
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(lambda part: fresh.map(part, batch_key="batch", label_key="cell_type"), parts))
    for one, other in zip(alone, at_once, strict=True):
        np.testing.assert_array_equal(one.embedding, other.embedding)
        assert one.obs.equals(other.obs)


def test_a_mapping_goes_on_where_it_stopped(atlas: Atlas, tmp_path: Path) -> None:
    out = tmp_path / "m"
    done = map_cells(atlas.run, atlas.query, batch_key="batch", out=out, reporter=QuietReporter())
    (out / "manifest.json").unlink()
    (out / "stages" / "map.json").unlink()
    (out / "neighbors" / "indices.npy").write_bytes(b"torn")
    reporter = QuietReporter()
    again = map_cells(atlas.run, atlas.query, batch_key="batch", out=out, reporter=reporter)
    assert [text for text in reporter.messages if "done before" in text] == [
        f"{name}: done before, skipped" for name in ("project", "correct", "calibrate")
    ]
    np.testing.assert_array_equal(again.embedding, done.embedding)
    other, before = QuietReporter(), (out / "features" / "anchor.npy").stat().st_mtime_ns
    map_cells(atlas.run, atlas.query, batch_key="batch", out=out, reporter=other, novelty=0.05)
    assert [text.split(":")[1] for text in other.messages if "holds is replaced" in text] == [" map"]
    assert (out / "features" / "anchor.npy").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="with other settings or cells"):
        map_cells(atlas.run, atlas.known, batch_key="batch", out=out, reporter=QuietReporter())


def test_other_batches_in_the_same_directory(atlas: Atlas, tmp_path: Path) -> None:
    """What is kept of each batch is kept anew when the batches are others."""
    query = atlas.query.copy()
    query.obs["half"] = np.where(np.arange(query.n_obs) % 2, "x", "y")
    columns = ["schelix_novelty", "schelix_novelty_p"]
    map_cells(atlas.run, query, batch_key="batch", out=tmp_path / "m", reporter=QuietReporter())
    again = map_cells(atlas.run, query, batch_key="half", out=tmp_path / "m", reporter=QuietReporter())
    fresh = map_cells(atlas.run, query, batch_key="half", reporter=QuietReporter())
    np.testing.assert_array_equal(again.obs[columns], fresh.obs[columns])


def test_what_cannot_be_done_is_said(reference: Reference, atlas: Atlas) -> None:
    with pytest.raises(DataError, match=r"carries no obs column 'celltype' \(label_key\). It has: batch, cell_type"):
        reference.map(atlas.query, label_key="celltype")
    with pytest.raises(DataError, match="has no obs column 'donor'"):
        reference.map(atlas.query, batch_key="donor")
    with pytest.raises(ConfigError, match="Did you mean 'coverage'"):
        reference.map(atlas.query, coverag=0.5)
    with pytest.raises(ConfigError, match=r"coverage = 1\.5 is not allowed"):
        reference.map(atlas.query, coverage=1.5)
