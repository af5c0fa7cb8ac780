"""What is found of cells -> obs columns and an AnnData zarr that is filled block by block."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from schelix_scale.context import BATCH
from schelix_scale.errors import DataError
from schelix_scale.mapping.query import BLOCK, Query
from schelix_scale.transfer import UNKNOWN, Labels

PREFIX = "schelix_"
BETWEEN = "; "
PLAIN = ("string", "boolean", "empty")
NOVELTY, P_VALUE, DISTANCE = f"{PREFIX}novelty", f"{PREFIX}novelty_p", f"{PREFIX}distance"
OF_BATCH = f"{PREFIX}batch"
_WRITING = threading.Lock()  # anndata's settings and the filter of warnings are those of the whole process


def label_names(key: str) -> tuple[str, str, str]:
    """Return the obs columns of a label column: label, probability, set."""
    name = f"{PREFIX}{key.replace('/', '_')}"
    return name, f"{name}_probability", f"{name}_set"


def check_keys(keys: Sequence[str]) -> None:
    """Raise if obs columns of a mapping would have the same name.

    Raises
    ------
    DataError
        With the label columns to leave out.
    """
    taken = {NOVELTY, P_VALUE, DISTANCE, OF_BATCH}
    for key in keys:
        names = label_names(key)
        if taken & set(names):
            raise DataError(
                f"label_key {key!r} would be written to {names[0]}, which the mapping has for something else. Rename "
                "the column in the reference, or map it in a call of its own."
            )
        taken |= set(names)


class LabelColumns:
    """The labels, probabilities and sets of n cells, filled block by block."""

    def __init__(self, labels: Labels, n: int) -> None:
        self.labels = labels
        self.code_n = np.full(n, -1, np.int32)
        self.probability_n = np.zeros(n, np.float32)
        self.set_n = np.zeros((n, -(-len(labels.names) // 8)), np.uint8)

    def fill(
        self, start: int, probabilities: np.ndarray, sets: np.ndarray, novel: np.ndarray, voted: np.ndarray
    ) -> None:
        """Write a block of m cells: probabilities and sets (m, l), which are novel (m,), which have any vote (m,).

        A cell without a vote (no labelled neighbours, or none of its genes is known) is no more one label than another:
        ``unknown``, with all labels in its set.
        """
        rows = slice(start, start + len(novel))
        sets = sets | ~voted[:, None]
        probabilities = np.where(voted[:, None], probabilities, 1 / len(self.labels.names))
        self.code_n[rows] = np.where(novel | ~voted, -1, probabilities.argmax(axis=1))
        self.probability_n[rows] = probabilities.max(axis=1)
        self.set_n[rows] = np.packbits(sets & ~novel[:, None], axis=1)

    def table(self) -> dict[str, Any]:
        """Return the obs columns: label (``unknown`` for a cell that is novel or has no vote), probability, set."""
        names = [*self.labels.names, UNKNOWN]
        patterns, place = np.unique(self.set_n, axis=0, return_inverse=True)
        members = np.unpackbits(patterns, axis=1, count=len(self.labels.names)).astype(bool)
        texts = [BETWEEN.join(np.array(self.labels.names, object)[row]) or UNKNOWN for row in members]
        label, probability, members_of = label_names(self.labels.key)
        code = np.where(self.code_n < 0, len(names) - 1, self.code_n)
        return {
            label: pd.Categorical.from_codes(code, pd.Index(names)),
            probability: self.probability_n,
            members_of: pd.Categorical(np.array(texts, object)[place.ravel()]),
        }


def query_obs(query: Query) -> pd.DataFrame:
    """Return the query's own obs columns, in forms that zarr can hold."""
    table = query.store.obs().copy()
    for name in table.columns:
        table[name] = _holdable(table[name])
    table.columns = [str(name).replace("/", "_") for name in table.columns]
    table.index = pd.Index(query.store.cell_names, name=None)
    return table.drop(columns=[name for name in table.columns if name == BATCH or name.startswith(PREFIX)])


def _holdable(column: pd.Series) -> pd.Series:
    """Return a column as zarr can hold it: categories as they are, and what is neither text nor numbers as text."""
    values = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
    if values.dtype.kind == "O" and pd.api.types.infer_dtype(values, skipna=True) not in PLAIN:
        return column.astype(str)
    if isinstance(column.dtype, pd.StringDtype):  # missing text is None, which every version of AnnData writes
        return column.astype(object).where(column.notna(), None)
    return column


def create_mapped(path: Path, n: int, widths: dict[str, int]) -> dict[str, Any]:
    """Make a zarr with empty obsm arrays of n cells, a block a chunk; `finish_mapped` writes the cells' obs."""
    import anndata
    import zarr

    with _WRITING, _quiet(), anndata.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
        anndata.AnnData(obs=pd.DataFrame(index=pd.Index([], dtype=str))).write_zarr(path)
    obsm = zarr.open_group(path / "obsm", mode="r+")
    arrays = {}
    for key, width in widths.items():
        arrays[key] = obsm.create_array(key, shape=(n, width), chunks=(BLOCK, width), dtype="float32")
        arrays[key].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    return arrays


def finish_mapped(path: Path, obs: pd.DataFrame, uns: dict[str, Any]) -> None:
    """Write obs and uns, and the consolidated metadata."""
    import anndata
    import zarr
    from anndata.io import write_elem

    with _WRITING, _quiet(), anndata.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
        root = zarr.open_group(path, mode="r+", use_consolidated=False)
        write_elem(root, "obs", obs)
        write_elem(root, "uns", {"schelix": uns})
        zarr.consolidate_metadata(path)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        yield
