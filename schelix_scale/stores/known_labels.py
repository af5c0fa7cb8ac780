"""Cell types that are known for some cells: an obs column -> codes and names, or what is wrong with the column."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd

from schelix_scale.config import DataConfig
from schelix_scale.errors import DataError
from schelix_scale.stores.base import CellStore

UNKNOWN = -1


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

    Missing values, empty text and ``unknown_label`` (in any case) are cells whose label is not known.

    Raises
    ------
    DataError
        The column is not there, holds numbers that are no codes, or has fewer than two known labels.
    """
    key = config.label_key
    if key is None:
        return None
    if key not in store.obs_columns:
        raise DataError(
            f"{store.source} has no obs column {key!r} (label_key). Its columns: {', '.join(store.obs_columns)}."
        )
    if key == config.batch_key:
        raise DataError(f"label_key: {key!r} is the batch key; labels name cell types, not batches.")
    column = store.obs([key])[key]
    if pd.api.types.is_float_dtype(column.dtype):
        raise DataError(f"{store.source}: obs column {key!r} holds numbers ({column.dtype}). Labels are text.")
    text = column.astype("object").where(column.notna(), "").astype(str).str.strip()
    text[text.str.casefold() == config.unknown_label.casefold()] = ""
    names = sorted(set(text) - {""})
    if len(names) < 2:
        raise DataError(
            f"{store.source}: obs column {key!r} (label_key) has {len(names)} known labels; two are needed to tell "
            f"cells apart. Unknown are missing values, empty text and {config.unknown_label!r} (data.unknown_label)."
        )
    codes = pd.Categorical(text, categories=names).codes  # -1 for ""
    return KnownLabels(np.asarray(codes, dtype=np.int32), names)
