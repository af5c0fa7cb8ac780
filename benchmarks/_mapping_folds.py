"""Labelled data -> folds: which cells are the reference, which the query, and which type the reference lacks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

LEAST = 10


@dataclass(frozen=True)
class Fold:
    """One left-out value of the column ``by`` (a donor, a technology): its cells are the query.

    Attributes
    ----------
    data, by, value
        The file, the column and the left-out value.
    reference, query
        Rows of the file.
    lacking
        A type of the query that the reference has no cells of; None: it has all that it can have.
    """

    data: Path
    by: str
    value: str
    reference: np.ndarray
    query: np.ndarray
    lacking: str | None = None

    @property
    def name(self) -> str:
        """What to call the fold."""
        return f"{self.value}{f' without {self.lacking}' if self.lacking else ''}"


def folds(data: Path, by: str, label_key: str, novel: bool = True) -> Iterator[Fold]:
    """Yield the folds of a file: each value of a column left out, and with ``novel`` again with a type left out too.

    That type is one that has 10 cells or more in the query and is in the reference; another one in each fold.
    """
    obs = read_obs(data)
    groups, labels = obs[by].astype(str).to_numpy(), obs[label_key].astype(str).to_numpy()
    for number, value in enumerate(sorted(set(groups))):
        query, reference = np.flatnonzero(groups == value), np.flatnonzero(groups != value)
        yield Fold(data, by, value, reference, query)
        counts = pd.Series(labels[query]).value_counts()
        types = sorted(name for name in counts.index[counts >= LEAST] if (labels[reference] == name).any())
        if novel and len(types) > 1:
            lacking = types[number % len(types)]
            yield Fold(data, by, value, reference[labels[reference] != lacking], query, lacking)


def read_obs(data: Path) -> pd.DataFrame:
    """Read obs of an .h5ad file."""
    import h5py
    from anndata.io import read_elem

    with h5py.File(data) as file:
        return read_elem(file["obs"])


def write_fold(fold: Fold, batch_key: str, label_key: str, folder: Path) -> tuple[Path, Path]:
    """Write reference and query as .h5ad files, without batches of a single cell and without the query's labels."""
    import anndata

    adata = anndata.read_h5ad(fold.data)
    batches = adata.obs[batch_key].astype(str)
    reference = adata[fold.reference]
    sizes = batches.iloc[fold.reference].value_counts()
    kept = batches.iloc[fold.reference].map(sizes).to_numpy() > 1
    paths = folder / "reference.h5ad", folder / "query.h5ad"
    reference[kept].copy().write_h5ad(paths[0])
    query = adata[fold.query].copy()
    query.obs = query.obs.drop(columns=[label_key])
    query.write_h5ad(paths[1])
    return paths
