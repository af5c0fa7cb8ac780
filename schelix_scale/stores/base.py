"""The contract that every source of cells fulfils.

A store comes in as a description of where cells are (a path, a layer); what goes out are CSR row blocks,
obs columns and gene names. A store never holds an open handle, so it can be pickled to another process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

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

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a short hash that changes when the content or the way of reading it (layer) changes."""

    def blocks(self, block_cells: int) -> Iterator[Block]:
        """Yield all cells once, in order, in blocks of at most ``block_cells``."""
        for start in range(0, self.n_cells, block_cells):
            stop = min(start + block_cells, self.n_cells)
            yield Block(start, stop, self.read(np.arange(start, stop)))


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
