"""Names, batches and blocks: each fault is named with numbers, examples and a remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from schelix_scale.errors import DataError
from schelix_scale.stores import MemoryStore
from schelix_scale.stores.checks import check_block, check_names, likely_batch_columns, read_batches

from .truth import make_truth, to_anndata


def store_of(x_ng: Any = None, **obs: Sequence[Any]) -> MemoryStore:
    n = len(next(iter(obs.values()))) if obs else len(x_ng)
    x_ng = np.ones((n, 3), np.float32) if x_ng is None else np.asarray(x_ng, np.float32)
    names = [f"c{i}" for i in range(n)]
    genes = pd.DataFrame(index=[f"g{i}" for i in range(x_ng.shape[1])])
    return MemoryStore(ad.AnnData(x_ng, obs=pd.DataFrame(obs, index=names), var=genes))


class TestNames:
    def test_good(self) -> None:
        check_names(MemoryStore(to_anndata(make_truth())))

    @pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
    def test_empty(self, shape: tuple[int, int]) -> None:
        with pytest.raises(DataError, match=rf"has {shape[0]} cells and {shape[1]} genes"):
            check_names(store_of(np.zeros(shape)))

    @pytest.mark.filterwarnings("ignore:.*names are not unique")
    def test_repeated(self) -> None:
        adata = to_anndata(make_truth())
        adata.var_names = ["a", "b", "a", "b", *adata.var_names[4:]]
        with pytest.raises(DataError, match=r"2 gene names that occur more than once \(first: a, b\).*var_names_make"):
            check_names(MemoryStore(adata))
        adata = to_anndata(make_truth())
        adata.obs_names = ["x", "x", "x", *adata.obs_names[3:]]
        with pytest.raises(DataError, match=r"1 cell names that occur .* \(first: x\), in 83.*obs_names_make_unique"):
            check_names(MemoryStore(adata))


class TestBatches:
    @pytest.mark.parametrize(
        "column",
        [
            ["10", "9", "9", "10", "1", "1"],
            [10, 9, 9, 10, 1, 1],
            pd.Categorical(["10", "9", "9", "10", "1", "1"], categories=["9", "unused", "10", "1"]),
            pd.array([10, 9, 9, 10, 1, 1], dtype="Int64"),
            pd.array(["10", "9", "9", "10", "1", "1"], dtype="string"),
        ],
    )
    def test_text_order(self, column: Any) -> None:
        batches = read_batches(store_of(batch=column), "batch")
        assert batches.names == ["1", "10", "9"]
        assert batches.codes.tolist() == [1, 2, 2, 1, 0, 0]
        assert batches.codes.dtype == np.int32
        assert batches.sizes.tolist() == [2, 2, 2]

    def test_bool_and_few_floats(self) -> None:
        assert read_batches(store_of(b=[True, False, True, False]), "b").names == ["False", "True"]
        assert read_batches(store_of(b=[1.0, 2.0, 1.0, 2.0]), "b").codes.tolist() == [0, 1, 0, 1]

    def test_missing_key(self) -> None:
        store = store_of(
            cluster=["a", "b"] * 4,
            donor_id=[1, 2] * 4,
            n_counts=np.linspace(0, 1, 8),
            barcode=[f"s{i}" for i in range(8)],
            same=["x"] * 8,
            clutser=["a", "b"] * 4,
        )
        assert likely_batch_columns(store, "batch")[0] == "donor_id"
        assert set(likely_batch_columns(store, "batch")) == {"donor_id", "cluster", "clutser"}
        with pytest.raises(DataError, match=r"no obs column 'Batch' \(batch_key\).*could name batches: donor_id, "):
            read_batches(store, "Batch")
        with pytest.raises(DataError, match=r"No other obs column looks like batches \(there are: same\)"):
            read_batches(store_of(same=["x"] * 4), "batch")

    def test_columns_of_lists(self) -> None:
        store = store_of(tags=[["a"], ["b"]] * 2, donor=["x", "y"] * 2)
        with pytest.raises(DataError, match=r"could name batches: donor \(--batch-key NAME\)"):
            read_batches(store, "batch")
        with pytest.raises(DataError, match=r"'tags' holds values that cannot name batches \(first: a list\)"):
            read_batches(store, "tags")

    @pytest.mark.parametrize(
        "column",
        [
            ["a", None, "b", np.nan, "a", "b"],
            ["a", "", "b", " ", "a", "b"],
            pd.Categorical(["a", None, "b", None, "a", "b"]),
            [1.0, np.nan, 2.0, np.nan, 1.0, 2.0],
        ],
    )
    def test_missing_values(self, column: Any) -> None:
        with pytest.raises(DataError, match=r"'batch' is missing or empty for 2 of 6 cells \(first: c1, c3\)"):
            read_batches(store_of(batch=column), "batch")

    def test_one_batch(self) -> None:
        store = store_of(batch=["a"] * 4, sample=["s", "t", "s", "t"])
        with pytest.raises(DataError, match=r"one batch only \(a\), so there is nothing to integrate.*batches: sample"):
            read_batches(store, "batch")

    def test_small_batches(self) -> None:
        with pytest.raises(DataError, match=r"1 of 3 batches of 'batch' have fewer than 2 cells \(b\)\. Merge"):
            read_batches(store_of(batch=["a", "a", "b", "c", "c"]), "batch")
        with pytest.raises(DataError, match=r"8 of 8 batches .* \.\.\. 3 more\).*looks like an identifier of cells"):
            read_batches(store_of(batch=[f"s{i}" for i in range(8)]), "batch")

    def test_continuous(self) -> None:
        with pytest.raises(DataError, match=r"looks continuous: 60 distinct values of type float64 \(first: 0, "):
            read_batches(store_of(batch=np.linspace(0, 1, 60)), "batch")


class TestBlock:
    def check(self, x_ng: Any, values: Any = None) -> None:
        store = store_of(np.ones((9, 3)))
        block = sparse.csr_matrix(np.asarray(x_ng, np.float32))
        check_block(block, np.array([4, 7, 2])[: block.shape[0]], store, values)

    def test_good(self) -> None:
        self.check([[1, 2, 0], [0, 0, 3], [1, 0, 0]], "counts")
        self.check([[1.5, 2, 0], [0, 0, 3], [1, 0, 0]], "linear")
        self.check(np.empty((0, 3)))

    @pytest.mark.parametrize(
        ("value", "match"),
        [
            (np.nan, r"layer 'X' has 1 NaN values among the 4 stored.*cell c7, gene g2, value nan\)\. Replace"),
            (np.inf, r"1 infinite values .*cell c7, gene g2, value inf.*raw counts"),
            (-np.inf, r"1 infinite values .*cell c7, gene g2, value -inf"),
            (-0.5, r"1 negative values .*cell c7, gene g2, value -0.5.*scaled or z-scored.*--layer counts"),
        ],
    )
    def test_bad_value(self, value: float, match: str) -> None:
        with pytest.raises(DataError, match=match):
            self.check([[1, 2, 0], [0, 0, value], [1, 0, 0]])

    def test_other_layers_are_named(self) -> None:
        adata = to_anndata(make_truth(), -np.ones((83, 37)), layers={"umi": make_truth().x_ng})
        store = MemoryStore(adata)
        with pytest.raises(DataError, match=r"3071 negative values.*--layer NAME with one of umi"):
            check_block(store.read(np.arange(83)), np.arange(83), store)

    def test_empty_cells(self) -> None:
        with pytest.raises(
            DataError, match=r"2 of the 3 cells just read have no counts .*\(first: c4, c2\).*min_counts=1"
        ):
            self.check([[0, 0, 0], [1, 0, 0], [0, 0, 0]])

    def test_contradictions(self) -> None:
        with pytest.raises(DataError, match=r'1 of those that are not integral .*g1, value 2.5\).*values are "counts"'):
            self.check([[1, 2.5, 0]], "counts")
        with pytest.raises(DataError, match=r'1 of those that are above 50 .*cell c4, gene g1, value 60.*"log"'):
            self.check([[1.5, 60, 0]], "log")
