"""Several files as one source of cells: genes joined by name, obs columns aligned, rows one file after the other."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import pandas as pd
from scipy import sparse

from schelix_scale.stores._addresses import absolute, labels_of, local_path
from schelix_scale.stores._align import align_column, join_genes
from schelix_scale.stores._rows import check_positions, stack
from schelix_scale.stores.base import CellStore, Measured, check_columns

FILE_COLUMNS = ("file", "source_file", "schelix_file")


@final
class JoinedStore(CellStore):
    """The cells of several stores, one after the other.

    Reads only the parts that the asked rows need, each once a call. Besides what the parts hold, the place of each
    gene in each part is kept (4 bytes each; nothing for a part whose genes are the joined ones).

    - Genes are joined by name, see `join_genes`. A gene that a part does not have (only in a union) is zero there;
      `measured` says where that is so.
    - obs has the columns of all parts, in order of appearance, see `align_column`, and at the end the column
      `file_column`: the short name of the file of each cell, so that files can be batches.
    - Cell names are those of the files. Only if a name occurs in two files, all names get their file's short name,
      as ``anndata.concat(index_unique="-")`` does: ``AAACCTG-1`` becomes ``AAACCTG-1-donor2``.

    Parameters
    ----------
    parts
        The stores, each open in the layer ``layer``.
    addresses
        The path or address of each, all different; their stems (with folders, if stems repeat) are the short names.
    genes_join
        ``intersection`` (genes that all parts have) or ``union``.
    layer
        The layer that the parts were opened with (X may be called otherwise in a SOMA experiment).

    Attributes
    ----------
    addresses
        Absolute path, or address, of each part.
    labels
        Short name of each part.
    file_column
        The obs column that names the file of each cell: ``file``, or another name if a part has such a column.
    genes_join
        As given.

    Raises
    ------
    DataError
        A gene occurs twice in a part, or fewer than 20 genes are shared.
    """

    def __init__(
        self,
        parts: Sequence[CellStore],
        addresses: Sequence[str],
        genes_join: Literal["intersection", "union"] = "intersection",
        layer: str = "X",
    ) -> None:
        self._parts, self._given, self.genes_join = tuple(parts), tuple(addresses), genes_join
        self.addresses = tuple(absolute(address) for address in addresses)
        self.labels = labels_of([str(Path(local_path(address)).expanduser().absolute()) for address in addresses])
        self.layer = layer
        common = [name for name in parts[0].available_layers if all(name in part.available_layers for part in parts)]
        self.available_layers = tuple(dict.fromkeys([layer, *common]))
        self.row_access = "scan" if any(part.row_access == "scan" for part in self._parts) else "fast"
        sizes = [part.n_cells for part in self._parts]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        names = [part.gene_names for part in self._parts]
        self._gene_names, self._places = join_genes(names, [part.source for part in self._parts], genes_join)
        columns = dict.fromkeys(name for part in self._parts for name in part.obs_columns)
        self.file_column = _free_name(columns)
        self._obs_columns = [*columns, self.file_column]
        self._clash: bool | None = None

    @property
    def source(self) -> str:
        """The number of files and the first: ``3 files: donors/a.h5ad, ...``."""
        shown = self._given if len(self._given) < 3 else (self._given[0], "...")
        return f"{len(self._given)} files: {', '.join(shown)}"

    @property
    def n_cells(self) -> int:
        """Number of cells of all parts, n."""
        return int(self._starts[-1])

    @property
    def gene_names(self) -> pd.Index:
        """The g joined gene names."""
        return self._gene_names

    @property
    def cell_names(self) -> pd.Index:
        """The n cell names, with the file's short name if names occur in two files; read from them at each access."""
        return self._named([part.cell_names for part in self._parts])

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns of all parts, and at the end `file_column`."""
        return list(self._obs_columns)

    @property
    def nonzeros_per_cell(self) -> float:
        """Mean number of stored values a cell, at most the number of joined genes that its part has."""
        total = 0.0
        for part, place in zip(self._parts, self._places, strict=True):
            width = len(self._gene_names) if place is None else int((place >= 0).sum())
            total += part.n_cells * min(part.nonzeros_per_cell, width)
        return total / max(self.n_cells, 1)

    @property
    def notes(self) -> list[str]:
        """What a user should know of the join, as sentences: its genes, and cell names that were changed."""
        g, genes = len(self._gene_names), [part.gene_names for part in self._parts]
        everywhere = sum(int((place >= 0).sum()) == g if place is not None else True for place in self._places)
        if self.genes_join == "intersection":
            smallest, largest = min(map(len, genes)), max(map(len, genes))
            has = f"{largest:,}" if smallest == largest else f"{smallest:,} to {largest:,}"
            found = [f"{len(genes)} files are joined by the {g:,} genes that all have, of {has} in each"]
        else:
            found = [
                f"{len(genes)} files are joined by all their {g:,} genes; {everywhere} of the files have all of them"
            ]
        self._check_clash(None)
        if self._clash:
            found.append(f"cell names occur in several files: all get their file's name, as {self.cell_names[0]}")
        return found

    def obs(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return obs ``columns`` (all by default) of every cell; see the class for how they are aligned."""
        wanted = check_columns(self, columns)
        frames = []
        for part in self._parts:
            there = set(part.obs_columns)
            frames.append(part.obs([name for name in wanted if name in there and name != self.file_column]))
        sizes = [len(frame) for frame in frames]
        table = {}
        for name in wanted:
            if name == self.file_column:
                codes = np.repeat(np.arange(len(sizes)), sizes)
                table[name] = pd.Categorical.from_codes(codes, categories=list(self.labels))
            else:
                table[name] = align_column([frame[name] if name in frame else None for frame in frames], sizes)
        return pd.DataFrame(table, index=self._named([frame.index for frame in frames]), columns=wanted)

    def read(self, rows: np.ndarray, genes: np.ndarray | None = None) -> sparse.csr_matrix:
        """Read cells by position, from the parts that have them; see `CellStore.read`."""
        rows = check_positions(rows, self.n_cells, "row", self.source)
        width = len(self._gene_names)
        if genes is not None:
            genes = check_positions(genes, width, "gene", self.source)
            width = genes.size
        part_m = np.searchsorted(self._starts, rows, side="right") - 1
        blocks = [self._read_part(p, rows[part_m == p] - self._starts[p], genes) for p in np.unique(part_m)]
        x_ng = stack(blocks, width)
        if (part_m[1:] >= part_m[:-1]).all():
            return x_ng
        back = np.empty(rows.size, np.int64)
        back[np.argsort(part_m, kind="stable")] = np.arange(rows.size)
        return x_ng[back]

    def measured(self) -> Measured | None:
        """Return which genes were measured in which cells: a group a file, or those that a part knows of itself."""
        groups: list[np.ndarray] = []
        names: list[str] = []
        rows: list[np.ndarray] = []
        for part, place, label in zip(self._parts, self._places, self.labels, strict=True):
            own = part.measured()
            knows = np.ones((1, len(part.gene_names)), bool) if own is None else own.measured_pg
            groups.append((0 if own is None else own.group_n) + np.full(part.n_cells, len(names), np.int32))
            names += [label] if own is None else [f"{label}: {name}" for name in own.names]
            rows.append(knows if place is None else knows[:, place] & (place >= 0))
        measured_pg = np.concatenate(rows)
        if measured_pg.all():
            return None
        return Measured(np.concatenate(groups).astype(np.int32), tuple(names), measured_pg)

    def fingerprint(self) -> str:
        """Hash the parts' fingerprints and short names in their order, and how genes are joined."""
        parts = [part.fingerprint() for part in self._parts]
        return blake2b(repr((self.genes_join, self.labels, parts)).encode(), digest_size=16).hexdigest()

    def gene_table(self) -> pd.DataFrame | None:
        """Return what the parts know of the genes; of each gene, what the first part says that knows it."""
        known = [table for part in self._parts if (table := part.gene_table()) is not None]
        if not known:
            return None
        joined = known[0].reindex(self._gene_names)
        for table in known[1:]:
            joined = joined.combine_first(table.reindex(self._gene_names))
        return joined

    def provenance(self) -> dict[str, Any]:
        """Return where the files are, how they are joined and opened, and what identifies them beyond that."""
        known = {label: part.provenance() for label, part in zip(self.labels, self._parts, strict=True)}
        opened: dict[str, Any] = {}
        for about in known.values():
            opened |= about.get("opened", {})
        opened |= {"layer": self.layer, "genes_join": self.genes_join}
        parts = {label: about for label, about in known.items() if about}
        return {"files": list(self.addresses), "opened": opened, **({"parts": parts} if parts else {})}

    def notices(self) -> list[str]:
        """Return what the user should be warned of, part by part."""
        labelled = zip(self.labels, self._parts, strict=True)
        return [f"{label}: {notice}" for label, part in labelled for notice in part.notices()]

    def source_of(self, row: int) -> str:
        """Return what to call the file that a cell is in."""
        return self._parts[int(np.searchsorted(self._starts, row, side="right")) - 1].source

    def _read_part(self, part: int, rows: np.ndarray, genes: np.ndarray | None) -> sparse.csr_matrix:
        """Read rows of one part and put its genes in their places."""
        place = self._places[part]
        if place is None:
            return self._parts[part].read(rows, genes)
        wanted = place if genes is None else place[genes]
        there = np.flatnonzero(wanted >= 0)
        x_ng = self._parts[part].read(rows, wanted[there])
        if there.size == wanted.size:
            return x_ng
        columns = there[x_ng.indices].astype(x_ng.indices.dtype)
        return sparse.csr_matrix((x_ng.data, columns, x_ng.indptr), shape=(rows.size, wanted.size))

    def _named(self, names: list[pd.Index]) -> pd.Index:
        """Concatenate the names of the parts, with their short names if some occur in two parts."""
        self._check_clash(names)
        if self._clash:
            names = [index + f"-{label}" for index, label in zip(names, self.labels, strict=True)]
        return pd.Index(np.concatenate([index.to_numpy(object) for index in names]), dtype=object)

    def _check_clash(self, names: list[pd.Index] | None) -> None:
        """Find out, once, whether cell names occur in two parts."""
        if self._clash is None:
            names = [part.cell_names for part in self._parts] if names is None else names
            alone = sum(index.nunique() for index in names)
            self._clash = len(pd.unique(np.concatenate([index.to_numpy(object) for index in names]))) < alone


def addresses_of(store: CellStore) -> tuple[str, ...]:
    """Return where the cells of a store are: of several files each, of another store its one source."""
    return store.addresses if isinstance(store, JoinedStore) else (absolute(store.source),)


def source_address(store: CellStore) -> str:
    """Return what a run records of where its cells are: an absolute path or an address; of several files a summary."""
    return store.source if isinstance(store, JoinedStore) else absolute(store.source)


def _free_name(columns: dict[str, None]) -> str:
    numbered = (f"file_{number}" for number in range(2, len(columns) + 3))
    return next(name for name in (*FILE_COLUMNS, *numbered) if name not in columns)
