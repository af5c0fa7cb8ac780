"""What every `CellStore` must do. A backend's test class inherits this and gives `store`, `truth` and `changed`."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from schelix_scale.errors import DataError
from schelix_scale.stores import CellStore

from .truth import Truth


def _read_elsewhere(store: CellStore, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
    return store.read(rows).toarray(), list(store.obs(["batch"])["batch"])


def assert_canonical(x_ng: Any) -> None:
    assert isinstance(x_ng, sparse.csr_matrix)
    assert x_ng.dtype == np.float32
    fresh = sparse.csr_matrix((x_ng.data, x_ng.indices, x_ng.indptr), shape=x_ng.shape)
    fresh.check_format(full_check=True)
    assert fresh.has_canonical_format
    assert np.all(fresh.data != 0)


ROWS = {
    "empty": [],
    "one": [7],
    "contiguous": list(range(20, 45)),
    "all": list(range(83)),
    "reversed": list(range(82, -1, -1)),
    "duplicated": [3, 3, 80, 3, 0, 80],
    "random": np.random.default_rng(1).permutation(83)[:30].tolist(),
    "without values": [5, 4, 5],
}


class CellStoreContract:
    """Fixtures to give: `store`, `truth`, `changed` (the store of other content at the same place)."""

    @pytest.fixture
    def store(self) -> CellStore:
        raise NotImplementedError

    @pytest.fixture
    def truth(self) -> Truth:
        raise NotImplementedError

    def test_shape_and_names(self, store: CellStore, truth: Truth) -> None:
        assert store.n_cells == truth.x_ng.shape[0]
        assert list(store.gene_names) == truth.genes
        assert list(store.cell_names) == list(truth.obs.index)
        assert store.obs_columns == list(truth.obs.columns)
        assert 0 < store.nonzeros_per_cell <= truth.x_ng.shape[1]
        assert store.layer in store.available_layers

    def test_obs(self, store: CellStore, truth: Truth) -> None:
        pd.testing.assert_frame_equal(
            store.obs(), truth.obs, check_dtype=False, check_categorical=False, check_names=False
        )
        some = store.obs(["score", "batch"])
        pd.testing.assert_frame_equal(some, truth.obs[["score", "batch"]], check_names=False)
        assert store.obs([]).shape == (store.n_cells, 0)

    def test_missing_obs_column(self, store: CellStore) -> None:
        with pytest.raises(DataError, match=r"no obs column 'nope'.*batch, donor, score, note"):
            store.obs(["batch", "nope"])

    @pytest.mark.parametrize("name", ROWS)
    def test_read_rows(self, store: CellStore, truth: Truth, name: str) -> None:
        rows = np.array(ROWS[name], dtype=np.int64)
        x_ng = store.read(rows)
        assert_canonical(x_ng)
        np.testing.assert_array_equal(x_ng.toarray(), truth.x_ng[rows])

    @pytest.mark.parametrize("name", ["contiguous", "duplicated", "empty"])
    def test_read_genes(self, store: CellStore, truth: Truth, name: str) -> None:
        rows = np.array(ROWS[name], dtype=np.int64)
        for genes in ([], [0], [30, 2, 17], [4], [9, 9, 1], list(range(36, -1, -1))):
            columns = np.array(genes, dtype=np.int64)
            x_ng = store.read(rows, columns)
            assert_canonical(x_ng)
            np.testing.assert_array_equal(x_ng.toarray(), truth.x_ng[rows][:, columns])

    def test_read_out_of_range(self, store: CellStore) -> None:
        with pytest.raises(IndexError, match=r"2 of 3 asked row positions are outside 0\.\.82 \(first: \[83, -1\]\)"):
            store.read(np.array([83, 0, -1]))
        with pytest.raises(IndexError, match=r"1 of 1 asked gene positions are outside 0\.\.36"):
            store.read(np.array([0]), np.array([37]))
        with pytest.raises(TypeError, match="must be one-dimensional integers"):
            store.read(np.ones(store.n_cells, dtype=bool))

    def test_blocks_cover_every_cell_once(self, store: CellStore, truth: Truth) -> None:
        blocks = list(store.blocks(20))
        assert [(block.start, block.stop) for block in blocks] == [(0, 20), (20, 40), (40, 60), (60, 80), (80, 83)]
        np.testing.assert_array_equal(sparse.vstack([block.x_ng for block in blocks]).toarray(), truth.x_ng)

    def test_pickle(self, store: CellStore, truth: Truth) -> None:
        copy = pickle.loads(pickle.dumps(store))
        assert copy.fingerprint() == store.fingerprint()
        np.testing.assert_array_equal(copy.read(np.array([9, 2])).toarray(), truth.x_ng[[9, 2]])

    def test_spawned_process(self, store: CellStore, truth: Truth, spawned: ProcessPoolExecutor) -> None:
        x_ng, batch = spawned.submit(_read_elsewhere, store, np.array([40, 1])).result()
        np.testing.assert_array_equal(x_ng, truth.x_ng[[40, 1]])
        assert batch == list(truth.obs["batch"])

    def test_threads(self, store: CellStore, truth: Truth) -> None:
        asked = [np.random.default_rng(i).permutation(83)[:9] for i in range(24)]
        with ThreadPoolExecutor(4) as pool:
            for rows, x_ng in zip(asked, pool.map(store.read, asked), strict=True):
                np.testing.assert_array_equal(x_ng.toarray(), truth.x_ng[rows])

    def test_fingerprint(self, store: CellStore, request: pytest.FixtureRequest) -> None:
        before = store.fingerprint()
        assert store.fingerprint() == before
        assert request.getfixturevalue("changed").fingerprint() != before
