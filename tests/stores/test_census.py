from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import cellxgene_census
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma
from typer.testing import CliRunner

from schelix_scale.cli import app
from schelix_scale.config import DataConfig
from schelix_scale.errors import DataError, StoreError
from schelix_scale.stores import CellStore, open_recorded, open_store
from schelix_scale.stores.census import CensusStore

from .census_builder import CensusTruth, make_census, write_census
from .contract import CellStoreContract
from .truth import Truth, make_truth

LUNG = "tissue_general == 'lung' and is_primary_data == True"


def as_census(truth: Truth, filler: int = 7) -> CensusTruth:
    """Put the cells of ``truth`` at every other joinid of a census; one gene before its genes is not measured."""
    n, g = truth.x_ng.shape
    x_ng = np.full((2 * n, g + 1), filler, np.float32)
    x_ng[::2, 1:] = truth.x_ng
    x_ng[:, 0] = 0
    obs = truth.obs.iloc[np.repeat(np.arange(n), 2)].reset_index(drop=True)
    obs["note"] = np.where(np.arange(2 * n) % 2 == 0, obs["note"], "other")
    obs.insert(0, "soma_joinid", np.arange(2 * n))
    obs["dataset_id"] = "one"
    var = pd.DataFrame({"soma_joinid": np.arange(g + 1), "feature_id": ["unmeasured", *truth.genes]})
    var["feature_name"] = [f"symbol{i}" for i in range(g + 1)]
    return CensusTruth(x_ng, obs, var, ["one"], np.array([[False] + [True] * g]))


def open_as_census(truth: Truth, folder: Path) -> CellStore:
    write_census(as_census(truth), folder / "census")
    return open_store("census:homo_sapiens", census_uri=str(folder / "census"), obs_filter="note != 'other'")


class TestCensusStore(CellStoreContract):
    @pytest.fixture
    def truth(self) -> Truth:
        made = make_truth()
        obs = made.obs.assign(dataset_id="one").set_axis([str(2 * i) for i in range(83)], axis=0)
        return Truth(made.x_ng, obs, made.genes)

    @pytest.fixture
    def store(self, truth: Truth, tmp_path: Path) -> CellStore:
        return open_as_census(make_truth(), tmp_path)

    @pytest.fixture
    def changed(self, tmp_path: Path) -> CellStore:
        return open_as_census(make_truth(seed=1), tmp_path)


@pytest.fixture
def truth() -> CensusTruth:
    return make_census()


@pytest.fixture
def census(tmp_path: Path, truth: CensusTruth) -> Path:
    return write_census(truth, tmp_path / "census")


@pytest.mark.filterwarnings("ignore:Transforming to str index")
def test_the_builder_makes_what_cellxgene_census_reads(census: Path, truth: CensusTruth) -> None:
    with cellxgene_census.open_soma(uri=str(census)) as opened:
        presence = cellxgene_census.get_presence_matrix(opened, "Homo sapiens").toarray().astype(bool)
        rows = opened["census_info"]["datasets"].read().concat().to_pandas()["dataset_id"]
        found = cellxgene_census.get_anndata(opened, "Homo sapiens", obs_value_filter=LUNG)
    np.testing.assert_array_equal(presence, truth.presence_pg[[truth.datasets.index(name) for name in rows]])
    chosen = ((truth.obs["tissue_general"] == "lung") & truth.obs["is_primary_data"]).to_numpy()
    np.testing.assert_array_equal(found.X.toarray(), truth.x_ng[chosen])


def test_selected_cells_and_measured_genes(census: Path, truth: CensusTruth) -> None:
    store = open_store("census:Homo sapiens", census_uri=str(census), obs_filter=LUNG)
    chosen = ((truth.obs["tissue_general"] == "lung") & truth.obs["is_primary_data"]).to_numpy()
    genes = truth.presence_pg[:2].any(axis=0)
    assert not genes[20]
    assert list(store.cell_names) == list(truth.obs["soma_joinid"][chosen].astype(str))
    assert list(store.gene_names) == list(truth.var["feature_id"][genes])
    table = store.gene_table()
    assert table is not None
    assert dict(table["feature_name"]) == dict(zip(store.gene_names, truth.var["feature_name"][genes], strict=True))
    np.testing.assert_array_equal(store.read(np.arange(store.n_cells)).toarray(), truth.x_ng[chosen][:, genes])
    assert list(store.obs(["donor_id"])["donor_id"]) == list(truth.obs["donor_id"][chosen])
    assert set(store.obs(["dataset_id"])["dataset_id"].cat.categories) == {"ds-lung-1", "ds-lung-2"}


def test_presence_of_the_data_sets(census: Path, truth: CensusTruth) -> None:
    store = open_store("census:homo_sapiens", census_uri=str(census))
    measured = store.measured()
    assert measured is not None
    assert measured.names == tuple(sorted(truth.datasets))
    assert [measured.names[code] for code in measured.group_n] == list(truth.obs["dataset_id"])
    genes = truth.presence_pg.any(axis=0)
    expected = [truth.presence_pg[truth.datasets.index(name)][genes] for name in measured.names]
    np.testing.assert_array_equal(measured.measured_pg, np.array(expected))
    assert measured.group_n.dtype == np.int32


def test_other_layers(census: Path, truth: CensusTruth) -> None:
    store = open_store("census:homo_sapiens", "normalized", census_uri=str(census))
    genes = truth.presence_pg.any(axis=0)
    np.testing.assert_array_equal(store.read(np.array([3])).toarray(), truth.x_ng[[3]][:, genes] / 10)
    with pytest.raises(StoreError, match=r"no layer 'nope'. Available: normalized, raw"):
        open_store("census:homo_sapiens", "nope", census_uri=str(census))


def test_provenance_and_notices(census: Path, truth: CensusTruth) -> None:
    store = open_store("census:homo_sapiens", census_uri=str(census), obs_filter=LUNG)
    ids = np.array([int(name) for name in store.cell_names], "<i8")
    facts = store.provenance()
    assert facts["soma_joinids_sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()
    assert (facts["census_build_date"], facts["census_schema_version"]) == ("2025-11-08", "2.1.0")
    assert facts["census_uri"].endswith(str(census))
    assert store.notices() == []
    everything = open_store("census:homo_sapiens", census_uri=str(census))
    copies = int((~truth.obs["is_primary_data"]).sum())
    assert len(everything.notices()) == 1
    assert everything.notices()[0].startswith(f"{copies} of 240 cells of census:homo_sapiens are copies")


def test_another_build_has_another_fingerprint(tmp_path: Path, truth: CensusTruth) -> None:
    prints = []
    for build in ("2025-11-08", "2025-11-09"):
        write_census(truth, tmp_path / "census", build)
        prints.append(open_store("census:homo_sapiens", census_uri=str(tmp_path / "census")).fingerprint())
    assert prints[0] != prints[1]


def test_the_presence_of_genes_is_of_the_time_of_the_cells(census: Path) -> None:
    before = int(time.time() * 1000)
    first = open_store("census:homo_sapiens", census_uri=str(census))
    time.sleep(0.01)
    uri = census / "census_data" / "homo_sapiens" / "ms" / "RNA" / "feature_dataset_presence_matrix"
    with tiledbsoma.SparseNDArray.open(str(uri), "w") as array:
        everywhere = np.indices(array.shape).reshape(2, -1).astype(np.int64)
        ones = pa.array(np.ones(everywhere.shape[1], np.uint8))
        array.write(pa.table({"soma_dim_0": everywhere[0], "soma_dim_1": everywhere[1], "soma_data": ones}))
    assert open_store("census:homo_sapiens", census_uri=str(census)).measured() is None
    then, was = open_store("census:homo_sapiens", census_uri=str(census), timestamp=before).measured(), first.measured()
    assert then is not None
    assert was is not None
    np.testing.assert_array_equal(then.measured_pg, was.measured_pg)


def test_a_census_is_opened_again_as_it_was(census: Path) -> None:
    options: dict[str, Any] = {"census_uri": str(census), "obs_filter": LUNG}
    store = open_store("census:homo_sapiens", "normalized", **options)
    recorded = {"uri": store.source, "layer": store.layer, **store.provenance()}
    again = open_recorded(json.loads(json.dumps(recorded)), DataConfig())
    assert (again.layer, again.fingerprint()) == ("normalized", store.fingerprint())


def test_what_is_refused(census: Path, tmp_path: Path) -> None:
    uri = str(census)
    for text, options, message in [
        ("census:mus_musculus", {}, r"no organism 'mus_musculus'. It has: homo_sapiens"),
        ("census:", {}, r"no organism .*without a name.*It has: homo_sapiens"),
        ("census:homo_sapiens", {"obs_filter": "tisue == 'lung'"}, r"filter .*tisue.* cannot be used: .*tisue"),
        ("census:homo_sapiens", {"obs_filter": "tissue_general =="}, r"cannot be used: "),
        ("census:homo_sapiens", {"measurement": "ATAC"}, r"no measurement 'ATAC'. It has: RNA"),
        ("census:homo_sapiens", {"census_uri": str(tmp_path / "nope")}, r"nope cannot be opened: .*--census-uri"),
        ("census:homo_sapiens", {"census_uri": f"{uri}/census_data"}, r"is no CELLxGENE Census: it has homo_sapiens"),
    ]:
        with pytest.raises(StoreError, match=message):
            open_store(text, **{"census_uri": uri, **options})
    with pytest.raises(DataError, match=r"leaves none of 240 cells.*tissue_general: .*lung"):
        open_store("census:homo_sapiens", census_uri=uri, obs_filter="tissue_general == 'liver'")


def test_without_internet_or_the_package_the_remedy_is_named(census: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(StoreError, match=r"list of census releases cannot be read .*internet connection.*--census-uri"):
        open_store("census:homo_sapiens")
    monkeypatch.setitem(sys.modules, "cellxgene_census", None)
    with pytest.raises(StoreError, match=r"pip install 'schelix-scale\[census\]'"):
        open_store("census:homo_sapiens", census_uri=str(census))


def test_a_damaged_census_is_named(census: Path, tmp_path: Path, truth: CensusTruth) -> None:
    with tiledbsoma.Measurement.open(str(census / "census_data" / "homo_sapiens" / "ms" / "RNA"), "d") as measurement:
        del measurement["feature_dataset_presence_matrix"]
    with pytest.raises(StoreError, match=r"measurement 'RNA' has no feature_dataset_presence_matrix"):
        open_store("census:homo_sapiens", census_uri=str(census))
    renamed = truth.obs.assign(dataset_id=truth.obs["dataset_id"].replace("ds-blood", "lost"))
    write_census(CensusTruth(truth.x_ng, renamed, truth.var, truth.datasets, truth.presence_pg), tmp_path / "other")
    with pytest.raises(StoreError, match=r"1 data sets of the cells \(first: lost\) are not in census_info/datasets"):
        open_store("census:homo_sapiens", census_uri=str(tmp_path / "other"))
    unmeasured = np.zeros_like(truth.presence_pg)
    write_census(CensusTruth(truth.x_ng, truth.obs, truth.var, truth.datasets, unmeasured), tmp_path / "empty")
    with pytest.raises(DataError, match="measured no gene at all"):
        open_store("census:homo_sapiens", census_uri=str(tmp_path / "empty"))


def test_the_settings_of_tiledb_reach_the_arrays(census: Path) -> None:
    store = open_store("census:homo_sapiens", census_uri=str(census), tiledb={"vfs.s3.region": "eu-west-1"})
    assert isinstance(store, CensusStore)
    settings = dict(store.address.settings)
    assert settings["vfs.s3.region"] == "eu-west-1"
    assert settings["vfs.s3.no_sign_request"] == "true"
    assert settings["soma.init_buffer_bytes"] == str(1 << 24)
    assert len(settings) < 10


def test_inspect_shows_the_copies(census: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", "census:homo_sapiens", "--census-uri", str(census), "-b", "donor_id"])
    assert "90 of 240 cells" in " ".join(shown.output.split())
    assert "census:homo_sapiens, not on this disk; layer raw of normalized, raw" in " ".join(shown.output.split())
    given = ["inspect", "census:homo_sapiens", "--census-uri", str(census), "-b", "donor_id", "--obs-filter", LUNG]
    assert "are copies" not in CliRunner().invoke(app, given).output
