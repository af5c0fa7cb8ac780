"""A store that passes everything on to another one; tests override what they want to watch or change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import sparse

from schelix_scale.stores import CellStore, Measured


class ForwardingStore(CellStore):
    def __init__(self, store: CellStore) -> None:
        self.store = store
        self.layer, self.available_layers, self.row_access = store.layer, store.available_layers, store.row_access

    @property
    def source(self) -> str:
        return self.store.source

    @property
    def n_cells(self) -> int:
        return self.store.n_cells

    @property
    def gene_names(self) -> pd.Index:
        return self.store.gene_names

    @property
    def cell_names(self) -> pd.Index:
        return self.store.cell_names

    @property
    def obs_columns(self) -> list[str]:
        return self.store.obs_columns

    @property
    def nonzeros_per_cell(self) -> float:
        return self.store.nonzeros_per_cell

    def obs(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        return self.store.obs(columns)

    def read(self, rows: np.ndarray, genes: np.ndarray | None = None) -> sparse.csr_matrix:
        return self.store.read(rows, genes)

    def measured(self) -> Measured | None:
        return self.store.measured()

    def fingerprint(self) -> str:
        return self.store.fingerprint()
