"""A small census on disk, by the published schema of the CELLxGENE Census (2.x), written with tiledbsoma alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from scipy import sparse

TEXT = ("dataset_id", "assay", "cell_type", "donor_id", "tissue_general", "disease")


@dataclass(frozen=True)
class CensusTruth:
    """What is in a small census: dense values (N, G), obs, var, and which data sets measured which genes (P, G)."""

    x_ng: np.ndarray
    obs: pd.DataFrame
    var: pd.DataFrame
    datasets: list[str]
    presence_pg: np.ndarray


def make_census(n: int = 240, g: int = 60, seed: int = 0) -> CensusTruth:
    """Three data sets; the last one is of blood, and no data set measured the last two genes."""
    rng = np.random.default_rng(seed)
    datasets = ["ds-lung-1", "ds-lung-2", "ds-blood"]
    dataset_n = rng.integers(0, 3, n)
    presence = rng.random((3, g)) < 0.8
    presence[:, :20] = True
    presence[:, -2:] = False
    presence[:, 20] = [False, False, True]  # in blood alone
    x_ng = (rng.poisson(0.8, (n, g)) * presence[dataset_n]).astype(np.float32)
    obs = pd.DataFrame(
        {
            "soma_joinid": np.arange(n, dtype=np.int64),
            "dataset_id": [datasets[i] for i in dataset_n],
            "assay": rng.choice(["10x 3' v3", "10x 5' v1"], n),
            "cell_type": rng.choice(["T cell", "macrophage", "fibroblast"], n),
            "donor_id": [f"donor{i}-{j}" for i, j in zip(dataset_n, rng.integers(0, 2, n), strict=True)],
            "is_primary_data": rng.random(n) < 0.7,
            "tissue_general": ["blood" if i == 2 else "lung" for i in dataset_n],
            "disease": "normal",
            "raw_sum": x_ng.sum(1).astype(np.float64),
            "nnz": (x_ng != 0).sum(1).astype(np.int64),
        }
    )
    var = pd.DataFrame(
        {
            "soma_joinid": np.arange(g, dtype=np.int64),
            "feature_id": [f"ENSG{i:011d}" for i in range(g)],
            "feature_name": [f"GENE{i}" for i in range(g)],
            "feature_length": rng.integers(500, 5000, g).astype(np.int64),
            "nnz": (x_ng != 0).sum(0).astype(np.int64),
            "n_measured_obs": presence[dataset_n].sum(0).astype(np.int64),
        }
    )
    return CensusTruth(x_ng, obs, var, datasets, presence)


def write_census(truth: CensusTruth, path: Path, build_date: str = "2025-11-08") -> Path:
    """Write the census to ``path``, which is replaced."""
    shutil.rmtree(path, ignore_errors=True)
    # rows of census_info/datasets are in another order than the names: the matrix is indexed by their joinids
    order = np.random.default_rng(4).permutation(len(truth.datasets))
    datasets = pd.DataFrame(
        {
            "soma_joinid": np.arange(len(order), dtype=np.int64),
            "dataset_id": [truth.datasets[i] for i in order],
            "dataset_title": "a title",
            "dataset_total_cell_count": [int((truth.obs["dataset_id"] == truth.datasets[i]).sum()) for i in order],
        }
    )
    labels = ["census_schema_version", "census_build_date", "total_cell_count"]
    values = ["2.1.0", build_date, str(len(truth.obs))]
    summary = pd.DataFrame({"soma_joinid": np.arange(3), "label": labels, "value": values})
    organisms = pd.DataFrame({"soma_joinid": np.arange(1), "organism": ["homo_sapiens"], "organism_label": ["Homo"]})
    with soma.Collection.create(str(path)) as census:
        info = census.add_new_collection("census_info")
        for name, frame in (("summary", summary), ("datasets", datasets), ("organisms", organisms)):
            _frame(info, name, frame)
        experiment = census.add_new_collection("census_data").add_new_collection("homo_sapiens", soma.Experiment)
        _frame(experiment, "obs", truth.obs, TEXT)
        measurement = experiment.add_new_collection("ms").add_new_collection("RNA", soma.Measurement)
        _frame(measurement, "var", truth.var)
        layers = measurement.add_new_collection("X")
        for name, values_ng in (("raw", truth.x_ng), ("normalized", truth.x_ng / 10)):
            _matrix(layers, name, values_ng, pa.float32())
        _matrix(measurement, "feature_dataset_presence_matrix", truth.presence_pg[order].astype(np.uint8), pa.uint8())
    return path


def _frame(parent: soma.Collection, name: str, frame: pd.DataFrame, categorical: tuple[str, ...] = ()) -> None:
    columns = {
        key: frame[key].astype("category") if key in categorical else frame[key] for key in frame.columns if len(frame)
    }
    table = pa.Table.from_pandas(pd.DataFrame(columns), preserve_index=False)
    schema = pa.schema([(field.name, _plain(field.type)) for field in table.schema])
    parent.add_new_dataframe(name, schema=schema, domain=[[0, len(frame) - 1]]).close()
    with soma.DataFrame.open(parent[name].uri, "w") as opened:  # at a time of its own, as it extends the categories
        opened.write(table.cast(schema))


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return pa.dictionary(pa.int8(), pa.large_string())
    return pa.large_string() if pa.types.is_string(kind) else kind


def _matrix(parent: soma.Collection, name: str, dense: np.ndarray, kind: pa.DataType) -> None:
    values = sparse.coo_matrix(dense)
    array = parent.add_new_sparse_ndarray(name, type=kind, shape=dense.shape)
    array.write(
        pa.Table.from_pydict(
            {
                "soma_dim_0": values.row.astype(np.int64),
                "soma_dim_1": values.col.astype(np.int64),
                "soma_data": pa.array(values.data.astype(dense.dtype)).cast(kind),
            }
        )
    )
