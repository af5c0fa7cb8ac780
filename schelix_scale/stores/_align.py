"""What several files have in common: their genes and obs columns.

What comes in: gene names and obs columns of every file. What goes out: joined gene names with the place of each gene
in each file, one column of one type.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from schelix_scale.errors import DataError

MIN_SHARED = 20
_ENSEMBL = re.compile(r"ENS[A-Z]*\d{6,}(\.\d+)?$")
_NUMERIC = {"integer", "float"}


def join_genes(
    names: Sequence[pd.Index], sources: Sequence[str], how: Literal["intersection", "union"]
) -> tuple[pd.Index, list[np.ndarray | None]]:
    """Join genes by name.

    Parameters
    ----------
    names
        The gene names of each file.
    sources
        What to call the files in messages.
    how
        ``intersection``: the genes of all files, in the order of the first; ``union``: all genes, those of the first
        and then what each next file adds.

    Returns
    -------
    The g joined names, and for each file the (g,) int32 positions of its genes, -1 for one it does not have; None for
    a file whose genes are the joined ones in their order.

    Raises
    ------
    DataError
        A gene occurs twice in a file, or fewer than 20 genes are shared.
    """
    for index, source in zip(names, sources, strict=True):
        _check_unique(index, source)
    joined = names[0]
    for place, index in enumerate(names[1:], 1):
        shared = joined.isin(index)
        if shared.sum() < MIN_SHARED:
            raise _too_few(int(shared.sum()), joined, index, sources, place)
        joined = joined[shared] if how == "intersection" else joined.append(index[~index.isin(joined)])
    joined = pd.Index(joined, name=None)
    places = [None if joined.equals(index) else index.get_indexer(joined).astype(np.int32) for index in names]
    return joined, places


def align_column(pieces: Sequence[pd.Series | None], sizes: Sequence[int]) -> Any:
    """Return one array of the pieces of an obs column, one a file, None for a file that lacks it.

    A piece without any value is as good as none. Categories are united; integers of several sizes, and integers and
    floats, become the type that holds both; kinds that differ otherwise become text, 1 and 1.0 the same one. Where a
    file lacks the column the value is missing: NaN, NaT, None in text, NA among integers and truth values (pandas'
    Int64 and boolean).
    """
    filled = [piece if piece is not None and piece.notna().any() else None for piece in pieces]
    there = [piece for piece in filled if piece is not None]
    if not there:  # all missing: of the first type that was there
        there = [piece for piece in pieces if piece is not None][:1]
        filled = [piece if piece is there[0] else None for piece in pieces]
    kinds = {_kind(piece) for piece in there}
    if kinds == {"category"}:
        return _categories(filled, there, sizes)
    if kinds == {"bool"} or kinds == {"integer"}:
        return _whole(filled, there, sizes, kinds == {"bool"})
    if kinds <= _NUMERIC:
        return np.concatenate([_floats(piece, size) for piece, size in zip(filled, sizes, strict=True)])
    if len(kinds) == 1 and not kinds & {"text"}:  # dates and times
        dtype = there[0].dtype
        pieces = [
            pd.Series(pd.NaT, index=range(size), dtype=dtype) if piece is None else piece
            for piece, size in zip(filled, sizes, strict=True)
        ]
        return pd.concat(pieces, ignore_index=True).array
    return np.concatenate([_texts(piece, size) for piece, size in zip(filled, sizes, strict=True)])


def _check_unique(genes: pd.Index, source: str) -> None:
    if genes.is_unique:
        return
    repeated = genes[genes.duplicated()].unique()
    raise DataError(
        f"{source} has {len(repeated)} gene names that occur more than once (first: {', '.join(repeated[:3])}), so "
        "they cannot be joined by name with those of other files. Make them unique with "
        "adata.var_names_make_unique(), or use gene ids as var_names, and write it again."
    )


def _too_few(shared: int, joined: pd.Index, genes: pd.Index, sources: Sequence[str], place: int) -> DataError:
    before = sources[0] if place == 1 else f"the {place} files before it"
    ours, other = _kind_of_names(joined), _kind_of_names(genes)
    if ours != other:
        remedy = f"They name genes differently ({ours} and {other}): put the same kind of ids into var_names."
    elif any("." in str(name) for name in [*joined[:3], *genes[:3]]) and ours == "Ensembl ids":
        remedy = "Some ids carry a version (ENSG....5): drop it from var_names in all files."
    else:
        remedy = "Check that they are of one species and that var_names are the same kind of ids, or leave it out."
    return DataError(
        f"{sources[place]} shares {shared} of its {len(genes)} genes with {before}; {MIN_SHARED} are needed. It has "
        f"{_examples(genes)}; {sources[0]} has {_examples(joined)}. {remedy}"
    )


def _kind_of_names(genes: pd.Index) -> str:
    some = [str(name) for name in genes[:50]]
    matched = sum(_ENSEMBL.match(name) is not None for name in some)
    return "Ensembl ids" if some and 2 * matched > len(some) else "symbols"


def _examples(genes: pd.Index) -> str:
    return ", ".join(map(str, genes[:3])) + (", ..." if len(genes) > 3 else "") if len(genes) else "none"


def _kind(piece: pd.Series) -> str:
    kind = piece.dtype
    if isinstance(kind, pd.CategoricalDtype):
        return "category"
    if pd.api.types.is_bool_dtype(kind):
        return "bool"
    if pd.api.types.is_integer_dtype(kind):
        return "integer"
    if pd.api.types.is_float_dtype(kind):
        return "float"
    if kind.kind in "Mm":
        return str(kind)
    return "text"


def _categories(filled: Sequence[pd.Series | None], there: list[pd.Series], sizes: Sequence[int]) -> pd.Categorical:
    """Unite categories: kept as they are if all files have the same, else sorted and without an order."""
    first = there[0].cat.categories
    if all(piece.dtype == there[0].dtype for piece in there):
        dtype = there[0].dtype
    else:
        levels = [piece.cat.categories for piece in there]
        kinds = {pd.api.types.infer_dtype(index, skipna=False) for index in levels if len(index)}
        if len(kinds) > 1 or (first.dtype == object and kinds - {"string"}):
            texts = [_texts(piece, size) for piece, size in zip(filled, sizes, strict=True)]
            return pd.Categorical(np.concatenate(texts))
        united = levels[0]
        for index in levels[1:]:
            united = united.union(index, sort=False)
        dtype = pd.CategoricalDtype(united.sort_values())
    codes = [
        np.full(size, -1)
        if piece is None
        else np.r_[dtype.categories.get_indexer(piece.cat.categories), -1][piece.cat.codes]
        for piece, size in zip(filled, sizes, strict=True)
    ]
    return pd.Categorical.from_codes(np.concatenate(codes), dtype=dtype)


def _whole(filled: Sequence[pd.Series | None], there: list[pd.Series], sizes: Sequence[int], truth: bool) -> Any:
    """Join integers or truth values, exactly; those with missing values become pandas' nullable type."""
    plain = [np.dtype(str(piece.dtype).lower().replace("boolean", "bool")) for piece in there]
    kind = np.result_type(*plain)
    if kind.kind == "f":  # uint64 and int64
        return np.concatenate([_floats(piece, size) for piece, size in zip(filled, sizes, strict=True)])
    if len(there) == len(filled) and all(isinstance(piece.dtype, np.dtype) for piece in there):
        return np.concatenate([piece.to_numpy(kind) for piece in there])
    name = "boolean" if truth else ("UInt64" if kind.kind == "u" else "Int64")
    parts = [
        pd.Series(pd.NA, index=range(size), dtype=name) if piece is None else piece.astype(name)
        for piece, size in zip(filled, sizes, strict=True)
    ]
    return pd.concat(parts, ignore_index=True).array


def _floats(piece: pd.Series | None, size: int) -> np.ndarray:
    if piece is None:
        return np.full(size, np.nan, np.float32)
    kind = piece.dtype if isinstance(piece.dtype, np.dtype) and piece.dtype.kind == "f" else np.float64
    return np.asarray(piece.to_numpy(dtype=kind, na_value=np.nan))


def _texts(piece: pd.Series | None, size: int) -> np.ndarray:
    texts = np.full(size, None, dtype=object)
    if piece is not None:
        there = piece.notna().to_numpy()
        texts[there] = [_text(value) for value in piece.to_numpy(dtype=object)[there]]
    return texts


def _text(value: object) -> str:
    """Return the text of a value, that of a whole number without decimals: missing values make floats of integers."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return str(value)
