from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest

from schelix_scale.config import DataConfig
from schelix_scale.errors import DataError
from schelix_scale.stores import open_store
from schelix_scale.stores.known_labels import read_labels


def codes(values: object, **changed: object) -> tuple[list[int], list[str]]:
    obs = pd.DataFrame({"type": values, "batch": ["a", "b"] * 3}, index=[f"c{i}" for i in range(6)])
    store = open_store(anndata.AnnData(np.ones((6, 3), np.float32), obs=obs))
    found = read_labels(store, DataConfig(label_key="type", **changed))
    assert found is not None
    assert found.known == sum(code >= 0 for code in found.codes)
    return found.codes.tolist(), found.names


@pytest.mark.parametrize(
    "values",
    [
        ["T", "B", None, "T", "Unknown", ""],
        ["T", "B", "nan", "T", "NA", "None"],
        pd.Categorical(["T", "B", None, "T", "UNKNOWN", " "], categories=["UNKNOWN", "T", "B", " ", "never"]),
        pd.array(["T", "B", pd.NA, "T", "unknown ", ""], dtype="string"),
    ],
)
def test_unknown_in_every_form(values: object) -> None:
    assert codes(values) == ([1, 0, -1, 1, -1, -1], ["B", "T"])


def test_another_word_for_unknown() -> None:
    assert codes(["T", "B", "?", "T", "unknown", "B"], unknown_label="?") == (
        [1, 0, -1, 1, 2, 0],
        ["B", "T", "unknown"],
    )


def test_integer_labels_are_taken_by_their_text() -> None:
    assert codes([3, 10, 3, 3, 10, 10]) == ([1, 0, 1, 1, 0, 0], ["10", "3"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["T", None, "unknown", "T", "T", ""], r"has 1 known labels; two are needed .*data\.unknown_label"),
        ([0.5, 1, 2, 3, 4, 5], "holds numbers"),
        ([np.nan] * 6, "has 0 known labels"),
        (["a", "b", "c", "d", "e", "f"], "6 labels for 6 cells: it looks like names of cells"),
    ],
)
def test_columns_that_are_no_labels(values: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        codes(values)


def test_key_that_is_not_there_or_is_the_batch() -> None:
    obs = pd.DataFrame({"batch": ["a", "b"]}, index=["x", "y"])
    store = open_store(anndata.AnnData(np.ones((2, 3), np.float32), obs=obs))
    assert read_labels(store, DataConfig()) is None
    with pytest.raises(DataError, match="no obs column 'type'"):
        read_labels(store, DataConfig(label_key="type"))
    with pytest.raises(DataError, match="is the batch key"):
        read_labels(store, DataConfig(label_key="batch"))
