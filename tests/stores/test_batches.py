"""Batch keys of one and of several columns."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from schelix_scale.config import DataConfig
from schelix_scale.errors import DataError
from schelix_scale.stores import CellStore, MemoryStore
from schelix_scale.stores.batches import default_batch_key, read_batches
from schelix_scale.stores.joined import JoinedStore
from schelix_scale.stores.known_labels import read_labels

DATASETS = ["d1", "d1", "d2", "d2", "d1", "d1", "d2", "d2", "d1", "d2"]
ASSAYS = ["b", "a", "a", "a", "b", "a", "a", "a", "b", "a"]


def store(names: str = "cell", **more: object) -> CellStore:
    obs = pd.DataFrame({"dataset_id": pd.Categorical(DATASETS), "assay": ASSAYS, **more})
    obs.index = pd.Index([f"{names}{i}" for i in range(10)])
    return MemoryStore(ad.AnnData(np.ones((10, 25), np.float32), obs=obs))


@pytest.mark.parametrize(
    "key", ["dataset_id,assay", " dataset_id , assay", "dataset_id,assay,", "dataset_id,lane,assay"]
)
def test_several_columns_make_one_key(key: str) -> None:
    found = read_batches(store(lane=np.ones(10, np.int64)), key)
    lane = " | 1" if "lane" in key else ""
    expected = [f"{dataset}{lane} | {assay}" for dataset, assay in zip(DATASETS, ASSAYS, strict=True)]
    assert [found.names[code] for code in found.codes] == expected
    assert found.names == [f"d1{lane} | a", f"d1{lane} | b", f"d2{lane} | a"]
    assert found.sizes.tolist() == [2, 3, 5]
    assert found.codes.dtype == np.int32


def test_the_order_of_the_columns_is_that_of_the_key() -> None:
    assert read_batches(store(), "assay,dataset_id").names == ["a | d1", "a | d2", "b | d1"]


def test_a_column_with_a_comma_in_its_name_is_one_column() -> None:
    found = read_batches(store(**{"dataset_id,assay": ["x", "y"] * 5}), "dataset_id,assay")
    assert found.names == ["x", "y"]


def test_one_column_twice_is_one_column() -> None:
    assert read_batches(store(), "assay,assay").names == ["a", "b"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "datset_id,assy",
            r"no obs column 'datset_id' \(did you mean 'dataset_id'\?\), 'assy' \(did you mean 'assay'\?\) of the "
            r"batch key 'datset_id,assy'. Columns that could name batches: dataset_id, assay",
        ),
        ("dataset_id,zzz", r"no obs column 'zzz' of the batch key 'dataset_id,zzz'"),
        ("datset", r"no obs column 'datset' \(batch_key\). Columns"),
        (",", r"no obs column ',' \(batch_key\)"),
        ("dataset_id,hole", r"obs column 'hole' is missing or empty for 1 of 10 cells \(first: cell3\)"),
        ("dataset_id,score", r"obs column 'score' looks continuous"),
        ("dataset_id,number", r"10 of 10 batches of 'dataset_id,number' have fewer than 2 cells"),
        ("one,same", r"obs column 'one,same' has one batch only \(1 \| x\)"),
        ("bar,rest", r"Two batches of the batch key would both be called 'a \| b \| c'"),
    ],
)
def test_what_is_wrong_with_several_columns(key: str, message: str) -> None:
    hole = np.array(["x"] * 10, dtype=object)
    hole[3] = None
    cells = store(
        hole=hole,
        score=np.arange(10.0),
        number=[f"n{i}" for i in range(10)],
        one=np.ones(10, int),
        same="x",
        bar=["a", "a | b"] * 5,
        rest=["b | c", "c"] * 5,
    )
    with pytest.raises(DataError, match=message):
        read_batches(cells, key)


def test_labels_cannot_be_one_of_the_columns() -> None:
    with pytest.raises(DataError, match="'assay' is the batch key"):
        read_labels(store(), DataConfig(batch_key="dataset_id,assay", label_key="assay"))
    known = read_labels(store(), DataConfig(batch_key="dataset_id", label_key="assay"))
    assert known is not None


def test_files_are_batches_only_if_no_key_is_there_or_given() -> None:
    files = JoinedStore([store("x"), store("y")], ["one.h5ad", "two.h5ad"])
    assert default_batch_key(files, DataConfig()) == "file"
    assert default_batch_key(files, DataConfig(batch_key="batch")) == "batch"
    assert default_batch_key(files, DataConfig(batch_key="assay")) == "assay"
    assert default_batch_key(store(), DataConfig()) == "batch"
    partly = JoinedStore([store("x", batch="b"), store("y")], ["one.h5ad", "two.h5ad"])
    assert default_batch_key(partly, DataConfig()) == "batch"
    with pytest.raises(
        DataError, match=r"missing or empty for 10 of 20 cells.*take each file as a batch \(--batch-key file\)"
    ):
        read_batches(partly, "batch")
    assert read_batches(files, "file").names == ["one", "two"]
    assert read_batches(files, "file,assay").names == ["one | a", "one | b", "two | a", "two | b"]
