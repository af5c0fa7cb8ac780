"""Cells of an AnnData object that is already in memory."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pandas as pd
from scipy import sparse

from schelix_scale.errors import StoreError
from schelix_scale.stores._layout import missing_layer, text_columns
from schelix_scale.stores._matrix import PIECE
from schelix_scale.stores._rows import check_positions, select_genes, stack, to_float32
from schelix_scale.stores.base import CellStore, check_columns

if TYPE_CHECKING:
    from anndata import AnnData


@final
class MemoryStore(CellStore):
    """One matrix of an in-memory AnnData.

    Matrix, obs and names are referred to, not copied (a view is copied once); pickling ships them whole. Values
    changed in place are seen; a matrix or obs assigned to the AnnData later is not.

    Parameters
    ----------
    adata
        Cells by genes, not backed; values NumPy or scipy sparse.
    layer
        ``"X"``, ``"raw"`` or a name in ``adata.layers``.

    Raises
    ------
    StoreError
        There is no such layer, the AnnData is backed, or the matrix is of a kind that is not read.
    """

    def __init__(self, adata: AnnData, layer: str = "X") -> None:
        if adata.isbacked:
            raise StoreError(f"This AnnData is backed by {adata.filename}; open it with open_store(adata).")
        raw = adata.raw
        has = {"X": adata.X is not None, "raw": raw is not None, **{str(k): True for k in adata.layers}}
        self.available_layers = tuple(name for name, there in has.items() if there)
        self.layer = layer
        if layer not in self.available_layers:
            raise missing_layer(layer, self.available_layers, self.source)
        x_ng = adata.X if layer == "X" else raw.X if layer == "raw" else adata.layers[layer]
        self._x_ng = _known_kind(x_ng, f"{self.source}: layer {layer!r}")
        self.row_access = "scan" if sparse.issparse(self._x_ng) and self._x_ng.format == "csc" else "fast"
        self._gene_names = pd.Index((raw if layer == "raw" else adata).var_names).astype(str)
        self._obs = adata.obs
        self._var = (raw if layer == "raw" else adata).var

    @property
    def source(self) -> str:
        """``"AnnData in memory"``."""
        return "AnnData in memory"

    @property
    def n_cells(self) -> int:
        """Number of cells, n."""
        return int(self._x_ng.shape[0])

    @property
    def gene_names(self) -> pd.Index:
        """The g gene names."""
        return self._gene_names

    @property
    def cell_names(self) -> pd.Index:
        """The n cell names."""
        return pd.Index(self._obs.index).astype(str)

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns."""
        return [str(name) for name in self._obs.columns]

    @property
    def nonzeros_per_cell(self) -> float:
        """Mean number of stored values a cell."""
        stored = self._x_ng.nnz if sparse.issparse(self._x_ng) else self._x_ng.size
        return float(stored) / max(self.n_cells, 1)

    def obs(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return a copy of obs ``columns`` (all by default); see `CellStore.obs`."""
        there = self.obs_columns
        positions = [there.index(name) for name in check_columns(self, columns)]
        return self._obs.iloc[:, positions].set_axis(self.cell_names, axis=0).copy()

    def read(self, rows: np.ndarray, genes: np.ndarray | None = None) -> sparse.csr_matrix:
        """Return cells by position; see `CellStore.read`."""
        n, g = self._x_ng.shape
        rows = check_positions(rows, n, "row", self.source)
        if genes is not None:
            genes = check_positions(genes, g, "gene", self.source)
        if sparse.issparse(self._x_ng):
            x_ng = self._x_ng[rows].tocsr()
            part = sparse.csr_matrix((to_float32(x_ng.data), x_ng.indices, x_ng.indptr), shape=x_ng.shape)
            return select_genes(part, genes)
        step = max(PIECE // max(g, 1), 1)
        parts = [
            select_genes(sparse.csr_matrix(to_float32(self._x_ng[rows[i : i + step]])), genes)
            for i in range(0, rows.size, step)
        ]
        return stack(parts, g if genes is None else genes.size)

    def gene_columns(self) -> pd.DataFrame:
        """Return the text columns of var (raw.var for the layer raw), g rows: other names that genes may go by."""
        return text_columns(self._var)

    def fingerprint(self) -> str:
        """Hash the layer, the shape, the names and every stored value; `obs_fingerprint` is for obs."""
        x_ng = self._x_ng
        digest = blake2b(repr((self.layer, x_ng.shape, str(x_ng.dtype))).encode(), digest_size=16)
        for names in (self.gene_names, self.cell_names):
            digest.update("\n".join(names).encode())
        arrays = (x_ng.data, x_ng.indices, x_ng.indptr) if sparse.issparse(x_ng) else (x_ng,)
        for array in arrays:
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def obs_fingerprint(self) -> str:
        """Hash all obs columns, which users change between runs of the same cells."""
        digest = blake2b(digest_size=16)
        for name, column in self._obs.items():
            digest.update(str(name).encode() + hashed(column))
        return digest.hexdigest()


def hashed(column: pd.Series) -> bytes:
    """Return hashes of the values of a column; text and its categories, which anndata makes of it, have the same."""
    kind = column.dtype
    missing = column.isna().to_numpy()
    if kind.kind == "O" and not isinstance(kind, pd.CategoricalDtype) and pd.api.types.infer_dtype(column) != "string":
        column = column.map(str)  # lists and the like, which pandas does not hash
    hashes: np.ndarray = pd.util.hash_pandas_object(column, index=False).to_numpy().copy()
    hashes[missing] = 0
    if isinstance(kind, pd.CategoricalDtype):
        ranks: np.ndarray = column.cat.codes.to_numpy()[: None if kind.ordered else 0]
        return ranks.tobytes() + hashes.tobytes()
    return (b"" if kind.kind == "O" else str(kind).encode()) + hashes.tobytes()


def _known_kind(x_ng: Any, what: str) -> Any:
    """Return a CSR or CSC matrix or a 2-d array of numbers, the same data, or raise."""
    if sparse.issparse(x_ng) and x_ng.format in ("csr", "csc"):
        kept = x_ng
    elif isinstance(x_ng, np.ndarray) and not isinstance(x_ng, np.ma.MaskedArray) and x_ng.ndim == 2:
        kept = np.asarray(x_ng)
    else:
        raise StoreError(
            f"{what} is a {type(x_ng).__module__}.{type(x_ng).__qualname__}; scipy CSR or CSC and NumPy arrays are "
            f"read. Convert it (dask: adata.to_memory(); cupy: .get()) or write it to an .h5ad file."
        )
    if kept.dtype.kind not in "biuf":
        raise StoreError(f"{what} holds values of type {kept.dtype}; only numbers can be integrated.")
    return kept
