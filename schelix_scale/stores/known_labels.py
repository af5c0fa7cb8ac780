"""Cell types that are known for some cells: an obs column -> codes and names, or what is wrong with the column."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd

from schelix_scale.config import DataConfig
from schelix_scale.errors import DataError
from schelix_scale.stores.base import CellStore
from schelix_scale.stores.batches import batch_columns

UNKNOWN = -1
MISSING = frozenset({"", "nan", "na", "n/a", "none", "<na>"})


@dataclass(frozen=True)
class KnownLabels:
    """Label of each cell: ``codes`` (n,) int32 into ``names``, -1 where it is not known."""

    codes: np.ndarray
    names: list[str]

    @property
    def known(self) -> int:
        """Number of cells with a label."""
        return int((self.codes != UNKNOWN).sum())

    @property
    def digest(self) -> str:
        """Hash of which cells have which label."""
        return hashlib.sha256(self.codes.tobytes() + "\0".join(self.names).encode()).hexdigest()


def read_labels(store: CellStore, config: DataConfig) -> KnownLabels | None:
    """Read the labels of ``label_key``; None if the settings name no column.

    Missing values, empty text, "nan", "NA", "none" and ``unknown_label``, in any case, are cells whose label is not
    known.

    Raises
    ------
    DataError
        The column is not there, holds numbers, has fewer than two known labels, or names single cells.
    """
    key = config.label_key
    if key is None:
        return None
    if key not in store.obs_columns:
        raise DataError(
            f"{store.source} has no obs column {key!r} (label_key). Its columns: {', '.join(store.obs_columns)}."
        )
    if key in batch_columns(store, config.batch_key):
        raise DataError(f"label_key: {key!r} is the batch key; labels name cell types, not batches.")
    column = store.obs([key])[key]
    what = f"{store.source}: obs column {key!r} (label_key)"
    if pd.api.types.is_float_dtype(column.dtype) and column.notna().any():
        raise DataError(f"{what} holds numbers ({column.dtype}). Labels are text.")
    raw, values = pd.factorize(column)
    texts = [str(value).strip() for value in values]
    unknown = MISSING | {config.unknown_label.casefold()}
    names = sorted({text for text in texts if text.casefold() not in unknown})
    if len(names) < 2:
        raise DataError(
            f"{what} has {len(names)} known labels; two are needed to tell cells apart. Unknown are missing values, "
            f"empty text, nan, NA, none and {config.unknown_label!r} (data.unknown_label)."
        )
    if len(names) > max(2, store.n_cells // 2):
        raise DataError(f"{what} has {len(names)} labels for {store.n_cells} cells: it looks like names of cells.")
    place = {name: code for code, name in enumerate(names)}
    codes = np.array([*(place.get(text, UNKNOWN) for text in texts), UNKNOWN], dtype=np.int32)
    return KnownLabels(codes[raw], names)
