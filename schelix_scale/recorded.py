"""The cells of a run that is prepared: what the run has recorded of them, and their source where a stage reads it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import final

import numpy as np
import pandas as pd
from scipy import sparse

from schelix_scale.context import BATCH, ROW
from schelix_scale.errors import RunError, SchelixError
from schelix_scale.run import RunDirectory
from schelix_scale.stores import CellStore, open_recorded
from schelix_scale.stores.base import check_columns
from schelix_scale.stores.batches import BETWEEN, Batches, batch_columns
from schelix_scale.stores.known_labels import KnownLabels, read_labels

MEMORY = "AnnData in memory"


@final
class RecordedStore(CellStore):
    """Names, batches and obs columns from ``cells.parquet`` and ``genes.parquet``; values from the source.

    The source is opened when it is first asked for, and must be unchanged then. Stages that read values get ``opened``.

    Parameters
    ----------
    directory
        A run whose stage ``genes`` is done.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.path, self.data, self.about = directory.path, directory.config.data, dict(directory.source)
        self.layer = self.about["layer"]
        self._cells = pd.read_parquet(self.path / "cells.parquet")
        self._genes = pd.Index(pd.read_parquet(self.path / "genes.parquet", columns=["role"]).index)

    @property
    def source(self) -> str:
        """The address that the run has recorded."""
        return str(self.about["uri"])

    @property
    def n_cells(self) -> int:
        """Number of cells, n."""
        return len(self._cells)

    @property
    def gene_names(self) -> pd.Index:
        """The g gene names."""
        return self._genes

    @property
    def cell_names(self) -> pd.Index:
        """The n cell names."""
        return self._cells.index

    @property
    def obs_columns(self) -> list[str]:
        """The obs columns that the run carries."""
        return [name for name in self._cells.columns if name not in (ROW, BATCH)]

    def obs(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return obs ``columns`` of every cell, as the run carries them."""
        return self._cells[check_columns(self, columns)]

    def fingerprint(self) -> str:
        """Return the fingerprint that the run has recorded."""
        return str(self.about["fingerprint"])

    def batches(self) -> Batches:
        """Return the batches that the run has recorded; they are named by the text of their columns."""
        codes = self._cells[BATCH].to_numpy(np.int32)
        first = self._cells.iloc[np.unique(codes, return_index=True)[1]]
        parts = [name.replace("/", "_") for name in batch_columns(self, self.data.batch_key)]
        names = first[parts].astype(str).agg(BETWEEN.join, axis=1).tolist()
        return Batches(codes, names, np.bincount(codes))

    def labels(self) -> KnownLabels | None:
        """Return the known labels, from the source if the run does not carry their column."""
        key = self.data.label_key
        return read_labels(self if key is None or key in self.obs_columns else self.opened, self.data)

    @cached_property
    def opened(self) -> CellStore:
        """The source, unchanged since the run was prepared.

        Raises
        ------
        RunError
            It was in memory, cannot be opened, or has changed.
        """
        if "extends" in self.about:
            raise RunError(
                f"the cells of {self.path} come from {len(self.about['parts'])} sources, those of the run and those it "
                'was extended by, which are not read again together. Train from the cache: --set train.input="cache". '
                "Learned loadings (train.loadings) stay as they are."
            )
        remedy = "Put it back as it was, or prepare another run from it with `schelix prepare`."
        if self.source == MEMORY:
            raise RunError(
                f"the cells of {self.path} were in memory and are not at hand. Call integrate(adata, out=...) with the "
                'same settings again, or train from the cache (train.input = "cache").'
            )
        try:
            store = open_recorded(self.about, self.data)
            now = store.fingerprint()
        except SchelixError as error:
            raise RunError(f"{self.path} reads its cells from {self.source} again: {error} {remedy}") from error
        if now != self.fingerprint():
            raise RunError(f"{self.source} is not what {self.path} was prepared from: its content differs. {remedy}")
        return store

    @property
    def nonzeros_per_cell(self) -> float:
        """Mean number of stored values a cell."""
        return float(self.about["nonzeros_per_cell"])

    def read(self, rows: np.ndarray, genes: np.ndarray | None = None) -> sparse.csr_matrix:
        """Read cells by position from the source."""
        return self.opened.read(rows, genes)
