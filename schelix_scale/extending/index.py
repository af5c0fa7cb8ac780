"""The stored index of a graph -> the same with new cells in its lists: those whose centroid is nearest to them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from schelix_scale.arrays import create_array
from schelix_scale.graph.lists import CellIndex
from schelix_scale.graph.vectors import cell_dtype, row_blocks, unit_rows

KEPT = ("centroids", "groups")


def append_index(source: Path, features_md: np.ndarray, target: Path) -> None:
    """Write an index of the cells of ``source`` and, numbered after them, the new cells with (m, d) features."""
    old = CellIndex.open(source)
    n, m = old.n_cells, len(features_md)
    sizes = np.diff(old.starts)
    parts = [old.lists.assign(unit_rows(features_md[start:stop])) for start, stop in row_blocks(m)]
    list_n = np.concatenate([np.repeat(np.arange(len(sizes), dtype=np.int32), sizes), *parts])
    order = np.argsort(list_n, kind="stable")  # positions of the index, and from n on new cells
    cells = np.concatenate([old.cells, np.arange(n, n + m)])[order].astype(cell_dtype(n + m))
    starts = np.searchsorted(list_n[order], np.arange(len(sizes) + 1))
    target.mkdir()
    vectors = create_array(target / "vectors.npy", (n + m, features_md.shape[1]), np.float32)
    for start, stop in row_blocks(n + m):
        rows = order[start:stop]
        new = rows >= n
        block = np.empty((len(rows), vectors.shape[1]), np.float32)
        block[~new] = old.vectors_nd[rows[~new]]
        block[new] = unit_rows(features_md[rows[new] - n])
        vectors[start:stop] = block
    vectors.flush()
    for name in KEPT:
        shutil.copyfile(source / f"{name}.npy", target / f"{name}.npy")
    np.save(target / "starts.npy", starts)
    np.save(target / "cells.npy", cells)
