from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma
import tiledbsoma.io
from scipy import sparse

from schelix_scale.errors import DataError, StoreError
from schelix_scale.stores import CellStore, _soma, open_store
from schelix_scale.stores._addresses import absolute
from schelix_scale.stores.joined import source_address
from schelix_scale.stores.soma import SomaStore

from .contract import CellStoreContract
from .truth import Truth, make_truth, to_anndata


def write_soma(truth: Truth, path: Path, layer: str = "data", measurement: str = "RNA") -> Path:
    shutil.rmtree(path, ignore_errors=True)
    tiledbsoma.io.from_anndata(str(path), to_anndata(truth), measurement, X_layer_name=layer)
    return path


def with_gaps(truth: Truth, path: Path, keep: np.ndarray, genes: np.ndarray) -> Path:
    """Write the cells and genes of ``truth`` at joinids ``keep`` and ``genes``; the others are of something else."""
    rng = np.random.default_rng(9)
    n, g = keep[-1] + 3, genes[-1] + 2
    x_ng = rng.poisson(2.0, (n, g)).astype(np.float32)
    x_ng[np.ix_(keep, genes)] = truth.x_ng
    obs = pd.DataFrame({name: np.zeros(n, truth.obs[name].dtype) for name in ("donor", "score")})
    obs.insert(0, "batch", pd.Categorical(["other"] * n, ["b1", "b2", "b3", "other"]))
    obs["note"] = "other"
    obs.index = [f"other{i}" for i in range(n)]
    for name in obs.columns:
        obs.loc[obs.index[keep], name] = truth.obs[name].astype(obs[name].dtype).to_numpy()
    names = obs.index.to_numpy().copy()
    names[keep] = truth.obs.index
    all_genes = np.array([f"other{i}" for i in range(g)], object)
    all_genes[genes] = truth.genes
    write_soma(Truth(x_ng, obs.set_axis(names, axis=0), list(all_genes)), path)
    with tiledbsoma.Experiment.open(str(path), "d") as experiment:
        gone = np.setdiff1d(np.arange(g), genes)
        experiment.ms["RNA"].var.delete_cells((gone.tolist(),))
    return path


def plain(truth: Truth, folder: Path) -> CellStore:
    return open_store(write_soma(truth, folder / "cells.soma"))


def filtered(truth: Truth, folder: Path) -> CellStore:
    keep = np.sort(np.random.default_rng(2).permutation(400)[:83])
    genes = np.sort(np.random.default_rng(3).permutation(80)[:37])
    path = with_gaps(truth, folder / "cells.soma", keep, genes)
    return open_store(path, obs_filter="note != 'other'")


def deleted(truth: Truth, folder: Path) -> CellStore:
    keep = np.r_[np.arange(40), 2000 + 40 * np.arange(43)]
    path = with_gaps(truth, folder / "cells.soma", keep, np.arange(37))
    with tiledbsoma.Experiment.open(str(path), "d") as experiment:
        experiment.obs.delete_cells(value_filter="note == 'other'")
    return open_store(path)


def one_other_layer(truth: Truth, folder: Path) -> CellStore:
    return open_store(write_soma(truth, folder / "cells.soma", "counts", "gene"), measurement="gene")


def write_table(
    parent: tiledbsoma.Collection, name: str, frame: pd.DataFrame, index: list[str], domain: list[tuple[int, int]]
) -> None:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    large = {
        pa.string(): pa.large_string(),
        pa.dictionary(pa.int8(), pa.string()): pa.dictionary(pa.int8(), pa.large_string()),
    }
    schema = pa.schema([(field.name, large.get(field.type, field.type)) for field in table.schema])
    parent.add_new_dataframe(name, schema=schema, index_column_names=index, domain=domain).close()
    with tiledbsoma.DataFrame.open(parent[name].uri, "w") as opened:
        opened.write(table.cast(schema))


BACKENDS = {"plain": plain, "filtered": filtered, "deleted": deleted, "one other layer": one_other_layer}


@pytest.fixture(params=list(BACKENDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestSomaStore(CellStoreContract):
    @pytest.fixture
    def truth(self) -> Truth:
        return make_truth()

    @pytest.fixture
    def store(self, truth: Truth, kind: str, tmp_path: Path) -> CellStore:
        return BACKENDS[kind](truth, tmp_path)

    @pytest.fixture
    def changed(self, kind: str, tmp_path: Path) -> CellStore:
        return BACKENDS[kind](make_truth(seed=1), tmp_path)


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    return write_soma(make_truth(), tmp_path / "cells.soma")


def read_all(store: CellStore) -> np.ndarray:
    return store.read(np.arange(store.n_cells)).toarray()


def test_an_address_is_as_good_as_a_path(experiment: Path) -> None:
    store = open_store(f"file://{experiment}")
    np.testing.assert_array_equal(read_all(store), make_truth().x_ng)
    assert store.fingerprint() == open_store(experiment).fingerprint()
    assert isinstance(store, SomaStore)
    assert store.source == f"file://{experiment}"


def test_tables_of_other_order_and_integer_values(tmp_path: Path) -> None:
    """Obs is sorted by donor, joinids start at 1000 and those of genes have gaps, values are int32."""
    truth = make_truth()
    n, g = truth.x_ng.shape
    obs = truth.obs.assign(obs_id=truth.obs.index, soma_joinid=np.arange(1000, 1000 + n))
    var = pd.DataFrame({"gene_id": truth.genes, "soma_joinid": np.arange(g) * 2})
    with tiledbsoma.Experiment.create(str(tmp_path / "cells.soma")) as experiment:
        write_table(experiment, "obs", obs, ["donor", "soma_joinid"], [(0, 9), (0, 5000)])
        measurement = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        write_table(measurement, "var", var, ["soma_joinid"], [(0, 2 * g)])
        layers = measurement.add_new_collection("X")
        array = layers.add_new_sparse_ndarray("counts", type=pa.int32(), shape=(5000, 2 * g))
        values = sparse.coo_matrix(truth.x_ng.astype(np.int32))
        columns = {"soma_dim_0": values.row + 1000, "soma_dim_1": values.col * 2, "soma_data": values.data}
        array.write(pa.table({name: pa.array(part, array.schema.field(name).type) for name, part in columns.items()}))
    store = open_store(tmp_path / "cells.soma", "counts")
    assert list(store.cell_names) == list(truth.obs.index)
    assert list(store.gene_names) == truth.genes
    pd.testing.assert_frame_equal(store.obs(list(truth.obs.columns)), truth.obs, check_names=False)
    assert read_all(store).dtype == np.float32
    np.testing.assert_array_equal(read_all(store), truth.x_ng)


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [("_soma_read", "_TABLE", 0), ("_soma_read", "BRIDGE", 0), ("_soma_read", "BRIDGE", 1000), ("soma", "PIECE", 60)],
)
def test_ways_of_reading_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, value: int
) -> None:
    truth = make_truth()
    store = filtered(truth, tmp_path)
    monkeypatch.setattr(f"schelix_scale.stores.{module}.{name}", value)
    for rows in (np.arange(83), np.array([80, 3, 3, 41, 0]), np.arange(0, 83, 7)):
        np.testing.assert_array_equal(store.read(rows).toarray(), truth.x_ng[rows])
        genes = np.array([30, 2, 17])
        np.testing.assert_array_equal(store.read(rows, genes).toarray(), truth.x_ng[rows][:, genes])


def test_buffers_of_tiledb_are_bounded_by_its_settings(experiment: Path) -> None:
    store = open_store(experiment, tiledb={"soma.init_buffer_bytes": "512"})
    np.testing.assert_array_equal(read_all(store), make_truth().x_ng)
    assert dict(store.address.settings)["soma.init_buffer_bytes"] == "512"
    assert dict(open_store(experiment).address.settings)["soma.init_buffer_bytes"] == str(1 << 24)
    with pytest.raises(StoreError, match=r"cannot be read: .*soma\.init_buffer_bytes"):
        open_store(experiment, tiledb={"soma.init_buffer_bytes": "much"})


def test_a_store_is_a_snapshot_and_can_be_of_an_earlier_time(experiment: Path) -> None:
    store = open_store(experiment)
    before, shipped, fingerprint = int(time.time() * 1000), pickle.dumps(store), store.fingerprint()
    time.sleep(0.05)
    with tiledbsoma.Experiment.open(str(experiment), "d") as opened:
        opened.obs.delete_cells(([0, 7],))
    now = open_store(experiment)
    assert (now.n_cells, open_store(experiment, timestamp=before).n_cells) == (81, 83)
    assert store.fingerprint() == open_store(experiment, timestamp=before).fingerprint() == fingerprint
    assert now.fingerprint() != fingerprint
    np.testing.assert_array_equal(read_all(now), np.delete(make_truth().x_ng, [0, 7], axis=0))
    for kept in (store, pickle.loads(shipped)):
        assert list(kept.obs(["note"])["note"]) == list(make_truth().obs["note"])
    with pytest.raises(StoreError, match="not as of the asked time"):
        open_store(experiment, timestamp=1000)


def test_what_changes_the_fingerprint(experiment: Path, tmp_path: Path) -> None:
    first = open_store(experiment).fingerprint()
    shutil.copytree(experiment, tmp_path / "copy.soma")
    assert open_store(tmp_path / "copy.soma").fingerprint() == first
    with tiledbsoma.Experiment.open(str(experiment), "w") as opened:
        tiledbsoma.io.add_matrix_to_collection(opened, "RNA", "obsm", "X_pca", np.ones((83, 2), np.float32))
        tiledbsoma.io.add_X_layer(opened, "RNA", "half", sparse.csr_matrix(make_truth().x_ng / 2))
    prints = {first, open_store(experiment).fingerprint()}
    assert len(prints) == 1
    prints.add(open_store(experiment, "half").fingerprint())
    prints.add(open_store(experiment, obs_filter="donor < 2").fingerprint())
    obs = make_truth().obs.assign(obs_id=make_truth().obs.index, note="z")
    with tiledbsoma.Experiment.open(str(experiment), "w") as opened:
        tiledbsoma.io.update_obs(opened, obs.reset_index(drop=True))
    prints.add(open_store(experiment).fingerprint())
    assert len(prints) == 4


# In a process of its own, as others write: tiledbsoma 2.3.0 can crash, rarely, in what reads after it in the same one.
WRITE = """
import sys
import pyarrow as pa
import tiledbsoma
with tiledbsoma.Experiment.open(sys.argv[1], "w") as opened:
    cell, gene, value = [int(sys.argv[2])], [int(sys.argv[3])], pa.array([77.0], pa.float32())
    opened.ms["RNA"].X["data"].write(pa.table({"soma_dim_0": cell, "soma_dim_1": gene, "soma_data": value}))
"""


def test_what_changes_the_fingerprint_of_a_remote_experiment(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment is made remote by taking it as one whose files cannot be listed."""
    monkeypatch.setattr("schelix_scale.stores.soma.fragment_names", lambda uri, timestamp: None)
    address, store = f"file://{experiment}", open_store(experiment)
    prints = [store.fingerprint()]
    assert open_store(address).fingerprint() == prints[0]
    sampled = np.linspace(0, 82, 64).astype(int)
    cell = next(i for i in range(83) if i not in sampled)
    gene = int(np.flatnonzero(make_truth().x_ng[cell])[0])
    subprocess.run([sys.executable, "-c", WRITE, str(experiment), str(cell), str(gene)], check=True)
    assert open_store(address).read(np.array([cell])).toarray()[0, gene] == 77
    prints.append(open_store(address).fingerprint())
    obs = make_truth().obs.assign(obs_id=make_truth().obs.index)
    obs.loc[obs.index[cell], "note"] = "z"
    with tiledbsoma.Experiment.open(str(experiment), "w") as opened:
        tiledbsoma.io.update_obs(opened, obs.reset_index(drop=True))
    prints.append(open_store(address).fingerprint())
    assert store.fingerprint() == prints[0], "a store is as of the time it was opened"
    write_soma(make_truth(), experiment)  # replaced by one of the same content
    prints.append(open_store(address).fingerprint())
    assert len(set(prints)) == 4


def test_the_last_write_is_that_of_the_youngest_fragment(experiment: Path) -> None:
    table = pa.table({"soma_dim_0": [0, 1], "soma_dim_1": [3, 3], "soma_data": pa.array([77.0, 1.0], pa.float32())})
    stored = int((make_truth().x_ng != 0).sum())
    for written in (0, 2, 4):
        store = open_store(f"file://{experiment}")
        assert isinstance(store, SomaStore)
        for kind, uri, cells in (("DataFrame", store.address.obs, 83), ("SparseNDArray", store.address.matrix, stored)):
            fragments = Path(uri.removeprefix("file://")) / "__fragments"
            youngest = max(int(path.name.split("_")[3]) for path in fragments.iterdir())
            more = written if kind == "SparseNDArray" else 0
            assert _soma.last_write(store.address, kind, uri) == (cells + more, youngest)
        with tiledbsoma.Experiment.open(str(experiment), "w") as opened:
            opened.ms["RNA"].X["data"].write(table)


def test_one_experiment_has_one_address(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(experiment.parent)
    spellings = [str(experiment), f"{experiment}/", f"file://{experiment}", f"file://{experiment}/", "./cells.soma"]
    for spelling in spellings:
        store = open_store(spelling)
        assert (source_address(store), store.n_cells) == (str(experiment), 83)
    for other in spellings[1:]:
        with pytest.raises(StoreError, match="is given twice"):
            open_store([str(experiment), other])
    assert absolute("s3://bucket/cells.soma/") == absolute("s3://bucket/cells.soma")


def test_layers_and_measurements(experiment: Path, tmp_path: Path) -> None:
    with tiledbsoma.Experiment.open(str(experiment), "w") as opened:
        tiledbsoma.io.add_X_layer(opened, "RNA", "half", sparse.csr_matrix(make_truth().x_ng / 2))
    assert open_store(experiment).layer == "data"
    store = open_store(experiment, "half")
    assert store.available_layers == ("data", "half")
    np.testing.assert_array_equal(read_all(store), make_truth().x_ng / 2)
    with pytest.raises(StoreError, match=r"'RNA' has no layer 'nope'\. Available: data, half \(--layer NAME"):
        open_store(experiment, "nope")
    with pytest.raises(StoreError, match=r"no measurement 'ATAC'\. It has: RNA"):
        open_store(experiment, measurement="ATAC")
    two = to_anndata(make_truth(), layers={"b": sparse.csr_matrix(make_truth().x_ng)})
    two.raw = two.copy()
    tiledbsoma.io.from_anndata(str(tmp_path / "two.soma"), two, "RNA", X_layer_name="a")
    with pytest.raises(StoreError, match=r"no layer 'data' and not one layer alone\. Available: a, b"):
        open_store(tmp_path / "two.soma")
    with pytest.raises(StoreError, match=r"no layer 'raw'.*--set data\.measurement=raw"):
        open_store(tmp_path / "two.soma", "raw")
    np.testing.assert_array_equal(read_all(open_store(tmp_path / "two.soma", measurement="raw")), make_truth().x_ng)
    dense = tmp_path / "dense.soma"
    tiledbsoma.io.from_anndata(
        str(dense), to_anndata(make_truth(), make_truth().x_ng), "RNA", X_kind=tiledbsoma.DenseNDArray
    )
    with pytest.raises(StoreError, match="is a SOMADenseNDArray; sparse layers are read"):
        open_store(dense)


def test_filters(experiment: Path) -> None:
    obs = make_truth().obs
    store = open_store(experiment, obs_filter="batch in ['b1', 'b3'] and donor >= 1")
    chosen = (obs["batch"].isin(["b1", "b3"]) & (obs["donor"] >= 1)).to_numpy()
    assert list(store.cell_names) == list(obs.index[chosen])
    assert list(store.obs(["batch"])["batch"].cat.categories) == ["b1", "b3"]
    np.testing.assert_array_equal(read_all(store), make_truth().x_ng[chosen])
    for text in ("nope == 'a'", "batch = 'b1'", "batch == b1", "batch > 3"):
        with pytest.raises(StoreError, match=r"\(--obs-filter\) cannot be used: .*Columns of obs: .*batch, donor"):
            open_store(experiment, obs_filter=text)
    with pytest.raises(StoreError, match="Column nope does not exist"):
        open_store(experiment, obs_filter="nope == 'a'")
    with pytest.raises(DataError, match=r"leaves none of 83 cells.*first values: batch: b1, b2, b3"):
        open_store(experiment, obs_filter="batch == 'b9'")


def test_what_is_no_experiment(experiment: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is a SOMACollection \(of RNA\), not a SOMA experiment"):
        open_store(experiment / "ms")
    with pytest.raises(StoreError, match="is not there"):
        open_store(f"file://{tmp_path}/nope")
    with pytest.raises(StoreError, match=r"data\.timestamp|timestamp"):
        open_store(experiment, timestamp=-1)


def test_without_tiledbsoma_the_remedy_is_named(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    with pytest.raises(StoreError, match=r"pip install 'schelix-scale\[soma\]'"):
        open_store(experiment)


def test_few_arrays_stay_open_and_none_is_pickled(tmp_path: Path) -> None:
    truth = make_truth()
    path = write_soma(truth, tmp_path / "cells.soma")
    stores = []
    for _ in range(5):  # each of its own time: other arrays
        stores.append(open_store(path))
        time.sleep(0.002)
    for store in stores:
        np.testing.assert_array_equal(store.read(np.array([9, 2])).toarray(), truth.x_ng[[9, 2]])
    assert len(_soma._process.threads.arrays) == _soma.OPEN_ARRAYS
    assert len(pickle.dumps(stores[0])) < 3000


def test_a_forked_process_opens_its_own(experiment: Path) -> None:
    store = open_store(experiment)
    expected = read_all(store)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(read_all(store), expected) else 1)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0)
