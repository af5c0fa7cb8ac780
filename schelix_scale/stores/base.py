"""The contract that every source of cells fulfils.

A store comes in as a description of where cells are (a path, a layer); what goes out are CSR row blocks,
obs columns and gene names. A store never holds an open handle, so it can be pickled to another process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from schelix_scale.errors import DataError


@dataclass(frozen=True)
class Block:
    """Consecutive cells ``start:stop`` of a store and their values, ``x_ng`` (stop - start, g) CSR float32."""

    start: int
    stop: int
    x_ng: sparse.csr_matrix


@dataclass(frozen=True)
class Measured:
    """Which genes were measured in which cells: a gene that was not is no zero, it is unknown.

    Attributes
    ----------
    group_n
        (n,) int32: the group (data set, file) of each cell.
    names
        The p names of the groups.
    measured_pg
        (p, g) bool: whether a group measured a gene.
    """

    group_n: np.ndarray
    names: tuple[str, ...]
    measured_pg: np.ndarray

    def of_cells(self, rows: np.ndarray) -> Measured:
        """Return the same of some cells, (m,) positions; the groups stay."""
        return replace(self, group_n=self.group_n[rows])

    def of_genes(self, genes: np.ndarray) -> Measured:
        """Return the same of some genes, (h,) positions."""
        return replace(self, measured_pg=self.measured_pg[:, genes])

    def cells_g(self) -> np.ndarray:
        """Count the cells in which each gene was measured, (g,) int64."""
        return np.asarray(np.bincount(self.group_n, minlength=len(self.names)) @ self.measured_pg.astype(np.int64))


class CellStore(ABC):
    """Cells by genes, read in row blocks and never whole.

    Implementations are final, picklable (they hold how to open, never a handle) and safe to use from a
    spawned process. Row numbers are positions 0..n_cells-1 in the stored order.

    Attributes
    ----------
    layer
        Which values of the source are read: ``"X"``, ``"raw"`` or the name of a layer.
    available_layers
        The layers that the source has, for messages; empty when not known.
    row_access
        A hint: ``"scan"`` when each `read` scans the whole source, so that few large reads are better than many.
    """

    layer: str = "X"
    available_layers: tuple[str, ...] = ()
    row_access: Literal["fast", "scan"] = "fast"

    @property
    @abstractmethod
    def source(self) -> str:
        """What to call this store in messages: usually its path."""

    @property
    @abstractmethod
    def n_cells(self) -> int:
        """Number of cells, n."""

    @property
    @abstractmethod
    def gene_names(self) -> pd.Index:
        """The g gene names (var_names), in the stored order."""

    @property
    @abstractmethod
    def cell_names(self) -> pd.Index:
        """The n cell names (obs_names), in the stored order."""

    @property
    @abstractmethod
    def obs_columns(self) -> list[str]:
        """Names of the obs columns that `obs` can return."""

    @property
    @abstractmethod
    def nonzeros_per_cell(self) -> float:
        """Mean number of stored values a cell, known without reading the matrix (g for a dense one)."""

    @abstractmethod
    def obs(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return obs ``columns`` (all by default) of every cell, indexed by cell name.

        Raises
        ------
        DataError
            A column is not there; the message lists those that are.
        """

    @abstractmethod
    def read(self, rows: np.ndarray, genes: np.ndarray | None = None) -> sparse.csr_matrix:
        """Read cells by position, in the asked order (duplicates allowed).

        Parameters
        ----------
        rows
            (m,) integer positions in 0..n_cells-1.
        genes
            (h,) integer positions of the genes to return, in the asked order; all by default.

        Returns
        -------
        (m, h) CSR matrix, float32, canonical (sorted indices, no duplicates, no stored zeros).
        """

    def obs_fingerprint(self) -> str:
        """Return a hash of obs, where `fingerprint` does not cover it; empty where it does."""
        return ""

    def measured(self) -> Measured | None:
        """Return which genes were measured in which cells; None: all genes in all cells."""
        return None

    def gene_table(self) -> pd.DataFrame | None:
        """Return what else is known of the genes (``feature_name``), g rows indexed by gene name; None: nothing."""
        return None

    def provenance(self) -> dict[str, Any]:
        """Return what identifies the source beyond its address (a release, a hash of the cells), JSON-able.

        ``opened`` holds the settings of the section ``data`` with which it was opened, keys to the cloud left out.
        """
        return {}

    def notices(self) -> list[str]:
        """Return what the user should be warned of before these cells are integrated."""
        return []

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a short hash that changes when the content, obs included, or the way of reading it (layer) changes."""

    def blocks(self, block_cells: int) -> Iterator[Block]:
        """Yield all cells once, in order, in blocks of at most ``block_cells``."""
        for start in range(0, self.n_cells, block_cells):
            stop = min(start + block_cells, self.n_cells)
            yield Block(start, stop, self.read(np.arange(start, stop)))


def partly_measured(store: CellStore) -> Measured | None:
    """Return which genes were measured in which cells, or None if all were in all, whether the store says so or not."""
    measured = store.measured()
    return None if measured is None or measured.measured_pg.all() else measured


def check_columns(store: CellStore, columns: Sequence[str] | None) -> list[str]:
    """Return the asked obs columns (all when None).

    Raises
    ------
    DataError
        Some are not there; the message lists those that are.
    """
    there = store.obs_columns
    if columns is None:
        return there
    missing = [name for name in columns if name not in there]
    if missing:
        listed = ", ".join(there) or "none"
        raise DataError(f"{store.source} has no obs column {', '.join(map(repr, missing))}. It has: {listed}.")
    return list(dict.fromkeys(columns))
