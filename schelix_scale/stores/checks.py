"""Checks of names, batches and values, each a `DataError` with numbers, the first examples and the remedy.

What comes in: a store, or a block that was read from it. What goes out: nothing, or `Batches`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import sparse

from schelix_scale.errors import DataError
from schelix_scale.stores.base import CellStore
from schelix_scale.stores.batches import Batches, likely_batch_columns, read_batches
from schelix_scale.stores.joined import JoinedStore
from schelix_scale.stores.values import LOG_LIMIT, ValueKind

__all__ = ["Batches", "check_block", "check_names", "likely_batch_columns", "read_batches"]


def check_names(store: CellStore) -> None:
    """Check that there are cells and genes, and that their names are unique.

    Raises
    ------
    DataError
        The store is empty, or gene or cell names repeat.
    """
    genes = store.gene_names
    if store.n_cells == 0 or len(genes) == 0:
        raise DataError(
            f"{store.source} has {store.n_cells} cells and {len(genes)} genes (layer {store.layer!r}); both must be "
            f"there. Check the filters with which it was written."
        )
    _check_unique(genes, "gene", "adata.var_names_make_unique()", store)
    _check_unique(store.cell_names, "cell", "adata.obs_names_make_unique()", store)


def check_block(x_ng: sparse.csr_matrix, rows: np.ndarray, store: CellStore, values: ValueKind | None = None) -> None:
    """Check a block as it was read: all genes, canonical. Costs one pass; details are looked up on failure only.

    Parameters
    ----------
    x_ng
        (m, g) values of ``rows``.
    rows
        (m,) positions of the cells in the store.
    store
        Where the block was read.
    values
        What the values were decided to be from a sample; a block that contradicts it is an error. No such check
        when None.

    Raises
    ------
    DataError
        Values are NaN, infinite or negative, contradict ``values``, or cells are all zero.
    """
    data = x_ng.data
    low, high = (data.min(), data.max()) if data.size else (0.0, 0.0)
    # Written so that NaN, which compares as False, fails.
    if not (low >= 0 and high < np.inf):
        raise _bad_values(x_ng, rows, store)
    empty = np.flatnonzero(np.diff(x_ng.indptr) == 0)
    if empty.size:
        raise _empty_cells(empty, rows, store)
    if values == "counts" and (data != np.rint(data)).any():
        where = np.flatnonzero(data != np.rint(data))
        raise _contradiction("are not integral", 'values are "counts"', where, x_ng, rows, store)
    if values == "log" and high > LOG_LIMIT:
        where = np.flatnonzero(data > LOG_LIMIT)
        raise _contradiction(f"are above {LOG_LIMIT:g}", 'values are "log"', where, x_ng, rows, store)


def _check_unique(names: pd.Index, what: str, remedy: str, store: CellStore) -> None:
    if names.is_unique:
        return
    repeated = names[names.duplicated()].unique()
    raise DataError(
        f"{store.source} has {len(repeated)} {what} names that occur more than once (first: "
        f"{', '.join(repeated[:3])}), in {len(names)}. Make them unique with {remedy} and write it again."
    )


def _bad_values(x_ng: sparse.csr_matrix, rows: np.ndarray, store: CellStore) -> DataError:
    data = x_ng.data
    nan, infinite = np.isnan(data), np.isinf(data)
    if nan.any():
        kind, bad = "NaN", nan
        remedy = "Replace or drop them before writing the file; expression has no missing values."
    elif infinite.any():
        kind, bad = "infinite", infinite
        remedy = "They come from a logarithm of zero or from values above 3.4e38 (float32); start from the raw counts."
    else:
        kind, bad = "negative", data < 0
        remedy = f"The values look scaled or z-scored. Point to the raw counts: {_other_layers(store)}."
    return DataError(f"{_where(np.flatnonzero(bad), kind, x_ng, rows, store)} {remedy}")


def _contradiction(
    kind: str, belief: str, where: np.ndarray, x_ng: sparse.csr_matrix, rows: np.ndarray, store: CellStore
) -> DataError:
    remedy = (
        f"So {belief}, as decided from a sample or asked, does not hold. Say what they are: --set data.values=linear."
    )
    return DataError(f"{_where(where, f'of those that {kind}', x_ng, rows, store)} {remedy}")


def _where(where: np.ndarray, kind: str, x_ng: sparse.csr_matrix, rows: np.ndarray, store: CellStore) -> str:
    first = int(where[0])
    row = int(np.searchsorted(x_ng.indptr, first, side="right")) - 1
    cell, gene = store.cell_names[int(rows[row])], store.gene_names[int(x_ng.indices[first])]
    return (
        f"{store.source}: layer {store.layer!r} has {where.size} {kind} values among the {x_ng.nnz} stored values of "
        f"{x_ng.shape[0]} cells just read (first: cell {cell}{_of_file(store, int(rows[row]))}, gene {gene}, value "
        f"{x_ng.data[first]:g})."
    )


def _empty_cells(empty: np.ndarray, rows: np.ndarray, store: CellStore) -> DataError:
    names = store.cell_names
    first = ", ".join(f"{names[int(rows[i])]}{_of_file(store, int(rows[i]))}" for i in empty[:3])
    return DataError(
        f"{store.source}: {empty.size} of the {len(rows)} cells just read have no counts at all in layer "
        f"{store.layer!r} (first: {first}). Drop them: sc.pp.filter_cells(adata, min_counts=1)."
    )


def _of_file(store: CellStore, row: int) -> str:
    """Return which of several files a cell is in, nothing if there are not several."""
    return f" of {store.source_of(row)}" if isinstance(store, JoinedStore) else ""


def _other_layers(store: CellStore) -> str:
    others = [name for name in store.available_layers if name != store.layer]
    if others:
        return f"--layer NAME with one of {', '.join(others)}"
    return "--layer counts (or raw), once the file has them"
