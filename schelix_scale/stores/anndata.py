"""Cells of an ``.h5ad`` file or an anndata ``.zarr`` directory, read in row blocks and never whole."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import final

import numpy as np
import pandas as pd
from scipy import sparse

from schelix_scale.errors import StoreError
from schelix_scale.stores._layout import (
    frame_columns,
    index_length,
    layer_paths,
    missing_layer,
    open_root,
    read_frame,
    read_index,
    text_columns,
)
from schelix_scale.stores._matrix import describe, read_rows
from schelix_scale.stores._rows import check_positions
from schelix_scale.stores.base import CellStore, check_columns

_METADATA = frozenset({"zarr.json", ".zgroup", ".zattrs", ".zarray", ".zmetadata"})


@final
class AnnDataStore(CellStore):
    """One matrix of an ``.h5ad`` file or ``.zarr`` directory (zarr v2 and v3, sharded or not).

    The file is opened for the time of each call and closed again, so the store can be pickled and read from
    threads and spawned processes. Kept in memory: gene names, obs column names and the shape.

    Row access by encoding:

    - CSR and row-chunked dense: ``row_access = "fast"``. Asked rows are sorted, and rows stored near each other
      are read together, so contiguous blocks and random rows both cost about what they hold (plus whole chunks).
    - CSC: ``row_access = "scan"``. Rows of a CSC matrix are spread over the whole file, so **each read scans all
      stored values** of the asked genes (all genes by default), at most 8 million at a time plus one column. One
      pass in blocks scans the file once per block: use large blocks, or re-write X once with
      ``adata.X = adata.X.tocsr()``. Besides its result, a read holds 4 bytes for each cell of the store.

    Parameters
    ----------
    path
        The file or directory.
    layer
        ``"X"``, ``"raw"`` (raw/X, with the genes of raw/var) or a name under layers/.

    Raises
    ------
    StoreError
        The path cannot be read, is not an anndata file, or has no such layer; the message says which and the remedy.
    """

    def __init__(self, path: str | Path, layer: str = "X") -> None:
        self._source = str(path)
        self._path = Path(path).expanduser().absolute()
        self.layer = layer
        with open_root(self._path, self._source) as root:
            paths = layer_paths(root)
            if layer not in paths:
                raise missing_layer(layer, list(paths), self._source)
            self.available_layers = tuple(paths)
            self._matrix = paths[layer]
            self._frame = "raw/var" if layer == "raw" else "var"
            self._info = describe(root[self._matrix], self._what)
            n_cells = index_length(root["obs"], f"{self._source}: obs")
            self._obs_columns = frame_columns(root["obs"])
            self._gene_names = read_index(root[self._frame], f"{self._source}: {self._frame}")
        if (n_cells, len(self._gene_names)) != (self._info.n, self._info.g):
            raise StoreError(
                f"{self._what} is {self._info.n} x {self._info.g} but obs has {n_cells} rows and {self._frame} "
                f"{len(self._gene_names)}. The file is damaged or incomplete; write it again."
            )
        self.row_access = "scan" if self._info.encoding == "csc" else "fast"

    @property
    def _what(self) -> str:
        return f"{self._source}: layer {self.layer!r}"

    @property
    def source(self) -> str:
        """The path as it was given."""
        return self._source

    @property
    def n_cells(self) -> int:
        """Number of cells, n."""
        return self._info.n

    @property
    def gene_names(self) -> pd.Index:
        """The g gene names of var, or of raw/var for the layer raw."""
        return self._gene_names

    @property
    def cell_names(self) -> pd.Index:
        """The n cell names, read from the file at each access."""
        with open_root(self._path, self._source) as root:
            return read_index(root["obs"], f"{self._source}: obs")

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns."""
        return list(self._obs_columns)

    @property
    def nonzeros_per_cell(self) -> float:
        """Mean number of stored values a cell."""
        return self._info.stored / max(self._info.n, 1)

    def obs(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read obs ``columns`` (all by default) of every cell; see `CellStore.obs`."""
        wanted = check_columns(self, columns)
        with open_root(self._path, self._source) as root:
            return read_frame(root["obs"], wanted, f"{self._source}: obs")

    def gene_columns(self) -> pd.DataFrame:
        """Read the text columns of var (raw/var for the layer raw), g rows: other names that genes may go by."""
        with open_root(self._path, self._source) as root:
            what = f"{self._source}: {self._frame}"
            table = read_frame(root[self._frame], frame_columns(root[self._frame]), what)
        return text_columns(table)

    def read(self, rows: np.ndarray, genes: np.ndarray | None = None) -> sparse.csr_matrix:
        """Read cells by position; see `CellStore.read` and the cost by encoding in the class."""
        rows = check_positions(rows, self._info.n, "row", self._source)
        if genes is not None:
            genes = check_positions(genes, self._info.g, "gene", self._source)
        with open_root(self._path, self._source) as root:
            return read_rows(root[self._matrix], self._info, rows, genes, self._what)

    def fingerprint(self) -> str:
        """Hash what is cheap to get and changes with the content; values are not read.

        File: size and modification time. Directory: the same of its metadata files, and the number, total size and
        newest modification time of the files of the matrix, obs and var. Both: layer, n, g and gene names. It does
        not depend on the path, but a copy that does not keep the modification time has another fingerprint.
        """
        digest = blake2b(digest_size=16)
        facts: object
        if self._path.is_dir():
            facts = _directory_facts(self._path, (self._matrix, "obs", self._frame))
        else:
            facts = _file_facts(self._path, self._source)
        digest.update(repr((facts, self.layer, self._info.n, self._info.g)).encode())
        digest.update("\n".join(self._gene_names).encode())
        return digest.hexdigest()


def _file_facts(path: Path, source: str) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise StoreError(f"{source} cannot be read any more: {error}. Put it back or open its new path.") from error
    return stat.st_size, stat.st_mtime_ns


def _directory_facts(path: Path, groups: Sequence[str]) -> list[object]:
    facts: list[object] = [
        (name, *_file_facts(path / name, str(path))) for name in sorted(_METADATA) if (path / name).exists()
    ]
    for group in groups:
        count = total = newest = 0
        for file in _files(path / group):
            stat = file.stat()
            count, total, newest = count + 1, total + stat.st_size, max(newest, stat.st_mtime_ns)
            if file.name in _METADATA:
                facts.append((str(Path(file.path).relative_to(path)), stat.st_size, stat.st_mtime_ns))
        facts.append((group, count, total, newest))
    return sorted(facts, key=repr)


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(Path(entry.path))
            else:
                yield entry
