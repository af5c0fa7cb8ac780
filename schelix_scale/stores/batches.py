"""The batch of each cell: obs columns -> codes, names and sizes, or what is wrong with the columns.

A batch key is the name of a column, or the names of several with commas between: cells of one batch agree in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches

import numpy as np
import pandas as pd

from schelix_scale.config import DataConfig
from schelix_scale.errors import DataError
from schelix_scale.stores.base import CellStore
from schelix_scale.stores.joined import JoinedStore

_USUAL = (
    "batch", "sample", "donor", "patient", "library", "plate", "lane", "assay", "technology", "protocol", "dataset",
)  # fmt: skip
_MANY = 1000
BETWEEN = " | "


@dataclass(frozen=True)
class Batches:
    """Batch of each cell: ``codes`` (n,) int32 into ``names`` (b,), sorted as text, and ``sizes`` (b,) in cells."""

    codes: np.ndarray
    names: list[str]
    sizes: np.ndarray


def batch_columns(store: CellStore, batch_key: str) -> list[str]:
    """Return the obs columns that a batch key names, there or not: itself if it is there, else its parts."""
    if batch_key in store.obs_columns or "," not in batch_key:
        return [batch_key]
    return list(dict.fromkeys(part.strip() for part in batch_key.split(",") if part.strip())) or [batch_key]


def default_batch_key(store: CellStore, data: DataConfig) -> str:
    """Return the batch key of the settings, or of several files the column of file names.

    The latter only if the user has set no key and the files have no column of the default name.
    """
    unset = "batch_key" not in data.model_fields_set and data.batch_key not in store.obs_columns
    return store.file_column if unset and isinstance(store, JoinedStore) else data.batch_key


def read_batches(store: CellStore, batch_key: str, least: int = 2) -> Batches:
    """Read the batch of every cell; text, categorical, integer and boolean columns are all taken by their text.

    Parameters
    ----------
    store
        The cells.
    batch_key
        Name of the obs column, or of several (``"dataset_id,assay"``): their texts are joined by ``" | "``. A column
        whose own name has a comma is one column.
    least
        Batches, and cells of each, that there must be: 2 to integrate, 1 to map onto a reference.

    Raises
    ------
    DataError
        A column is not there, looks continuous or has cells without a value, there is one batch only, or there are
        batches of a single cell. The message gives numbers, examples and the remedy.
    """
    columns = batch_columns(store, batch_key)
    missing = [name for name in columns if name not in store.obs_columns]
    if missing:
        raise _no_column(store, missing, batch_key)
    table = store.obs(columns)
    codes, names = _encode(table[columns[0]], f"{store.source}: obs column {columns[0]!r}", store)
    for name in columns[1:]:
        codes, names = _cross(codes, names, *_encode(table[name], f"{store.source}: obs column {name!r}", store))
    sizes = np.bincount(codes, minlength=len(names))
    if len(names) < least:
        raise DataError(
            f"{store.source}: obs column {batch_key!r} has one batch only ({', '.join(names)}), so there is nothing to "
            f"integrate. {_suggest(store, batch_key)}"
        )
    single = np.flatnonzero(sizes < least)
    if single.size:
        identifiers = 2 * single.size > len(names)
        hint = f" It looks like an identifier of cells. {_suggest(store, batch_key)}" if identifiers else ""
        raise DataError(
            f"{store.source}: {single.size} of {len(names)} batches of {batch_key!r} have fewer than 2 cells "
            f"({_first([names[i] for i in single])}). Merge them with another batch or drop their cells.{hint}"
        )
    return Batches(codes, names, sizes)


def likely_batch_columns(store: CellStore, asked: str) -> list[str]:
    """Return the obs columns that could name batches, those with a usual name or one like ``asked`` first.

    A candidate is text, categorical, integer or boolean with 2 to min(n / 2, 1000) distinct values.
    """
    most = min(store.n_cells / 2, _MANY)
    found = []
    for name in store.obs_columns:
        column = store.obs([name])[name]
        if name != asked and not _is_float(column) and 2 <= _distinct(column) <= most:
            found.append(name)
    return sorted(found, key=lambda name: -_resemblance(name.lower(), asked.lower()))


def _cross(
    codes: np.ndarray, names: list[str], more: np.ndarray, more_names: list[str]
) -> tuple[np.ndarray, list[str]]:
    """Return codes and sorted names of the pairs of two codings that occur."""
    pairs, inverse = np.unique(codes.astype(np.int64) * len(more_names) + more, return_inverse=True)
    texts = [f"{names[pair // len(more_names)]}{BETWEEN}{more_names[pair % len(more_names)]}" for pair in pairs]
    joined = sorted(set(texts))
    if len(joined) < len(texts):
        twice = next(text for text in joined if texts.count(text) > 1)
        raise DataError(f"Two batches of the batch key would both be called {twice!r}: rename the values with a |.")
    place = {text: code for code, text in enumerate(joined)}
    return np.array([place[text] for text in texts], dtype=np.int32)[inverse], joined


def _no_column(store: CellStore, missing: list[str], batch_key: str) -> DataError:
    """Return the error for columns that are not there, each with one whose name is like it."""
    if missing == [batch_key]:
        return DataError(f"{store.source} has no obs column {batch_key!r} (batch_key). {_suggest(store, batch_key)}")
    near = {name: get_close_matches(name, store.obs_columns, 1) for name in missing}
    named = ", ".join(f"{name!r}{f' (did you mean {found[0]!r}?)' if found else ''}" for name, found in near.items())
    return DataError(
        f"{store.source} has no obs column {named} of the batch key {batch_key!r}. {_suggest(store, missing[0])}"
    )


def _encode(column: pd.Series, what: str, store: CellStore) -> tuple[np.ndarray, list[str]]:
    """Return codes (n,) int32 and sorted names, or raise for values that are missing or continuous."""
    if _is_float(column):
        _check_not_continuous(column, what)
    try:
        raw, values = pd.factorize(column)
    except TypeError as error:
        kind = type(column.iloc[0]).__name__
        raise DataError(
            f"{what} holds values that cannot name batches (first: a {kind}). Choose another column, or make it text."
        ) from error
    texts = np.array([str(value) for value in values], dtype=object)
    blank = np.array([not text.strip() for text in texts], dtype=bool)
    missing = np.flatnonzero(np.r_[blank, True][raw])
    if missing.size:
        cells = [str(name) for name in column.index[missing[:3]]]
        raise DataError(
            f"{what} is missing or empty for {missing.size} of {store.n_cells} cells (first: {', '.join(cells)}). "
            f"Fill it in, or drop these cells: adata[adata.obs[{str(column.name)!r}].notna()].{_files(store)}"
        )
    names = sorted(set(texts))
    place = {name: code for code, name in enumerate(names)}
    return np.array([place[text] for text in texts], dtype=np.int32)[raw], names


def _check_not_continuous(column: pd.Series, what: str) -> None:
    values = column.dropna().unique()
    integral = bool(np.all(values == np.round(values)))
    if len(values) > (min(len(column) / 2, _MANY) if integral else 20):
        examples = ", ".join(f"{value:g}" for value in values[:3])
        raise DataError(
            f"{what} looks continuous: {len(values)} distinct values of type {column.dtype} (first: {examples}). "
            f"A batch key names groups of cells; choose another column, or cut this one into groups as text."
        )


def _distinct(column: pd.Series) -> int:
    """Return the number of distinct values; 0 for values such as lists, which cannot name batches."""
    try:
        return int(column.nunique())
    except TypeError:
        return 0


def _is_float(column: pd.Series) -> bool:
    return bool(pd.api.types.is_float_dtype(column.dtype))


def _files(store: CellStore) -> str:
    """Return the remedy that only several files have."""
    return f" Or take each file as a batch (--batch-key {store.file_column})." if isinstance(store, JoinedStore) else ""


def _suggest(store: CellStore, asked: str) -> str:
    likely = likely_batch_columns(store, asked)
    if likely:
        return f"Columns that could name batches: {_first(likely, 10)} (--batch-key NAME)."
    return f"No other obs column looks like batches (there are: {_first(store.obs_columns, 10) or 'none'})."


def _resemblance(name: str, asked: str) -> float:
    usual = 1.0 if any(word in name for word in _USUAL) else 0.0
    return max(usual, SequenceMatcher(None, name, asked).ratio())


def _first(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f", ... {len(names) - count} more" if len(names) > count else "")
