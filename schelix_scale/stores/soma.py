"""Cells of a TileDB-SOMA experiment, local or in the cloud, filtered by obs, read in row blocks and never whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, final

import numpy as np
import pandas as pd
from scipy import sparse

from schelix_scale.config import DataConfig
from schelix_scale.errors import DataError, StoreError
from schelix_scale.stores._addresses import absolute
from schelix_scale.stores._rows import canonical, check_positions, stack
from schelix_scale.stores._soma import (
    OF_SOMA,
    Address,
    Kind,
    brief,
    context_of,
    fragment_names,
    last_writes,
    open_array,
    read_frame,
    settings_of,
    soma_errors,
    soma_module,
)
from schelix_scale.stores._soma_read import read_matrix
from schelix_scale.stores.base import CellStore, check_columns

CELL_IDS = ("obs_id", "index")
GENE_IDS = ("var_id", "feature_id", "gene_id", "index")
NAME_COLUMNS = ("feature_name",)
# Values that are decoded at a time, and cells whose values a remote fingerprint reads.
PIECE = 1 << 24
_SAMPLE = 64


def open_soma(text: str, data: DataConfig) -> SomaStore:
    """Open the SOMA experiment at ``text`` as the settings of the section ``data`` say.

    ``data.measurement`` is read, its layer ``data.layer`` ("X": the layer data, or the only one), of the cells that
    ``data.obs_filter`` selects, as of ``data.timestamp`` (now by default), under the TileDB settings ``data.tiledb``.

    Raises
    ------
    StoreError
        It is no SOMA experiment, lacks the measurement or layer, cannot be reached, the filter is wrong, or
        tiledbsoma is not installed.
    DataError
        No cell is left by the filter.
    """
    soma = soma_module(text)
    timestamp = now() if data.timestamp is None else data.timestamp
    settings = settings_of(data.tiledb)
    with soma_errors(text):
        experiment = soma.open(absolute(text), "r", context=context_of(settings), tiledb_timestamp=timestamp)
    with experiment:
        return store_of(experiment, text, data, timestamp, settings)


def now() -> int:
    """Return the time as TileDB writes it, in milliseconds since 1970."""
    return int(time.time() * 1000)


def store_of(
    experiment: Any, source: str, data: DataConfig, timestamp: int, settings: tuple[tuple[str, str], ...]
) -> SomaStore:
    """Return the store of an open experiment; its arrays are opened again by their own addresses."""
    if getattr(experiment, "soma_type", None) != "SOMAExperiment":
        kind, members = getattr(experiment, "soma_type", "?"), ", ".join(experiment.keys()) or "nothing"
        raise StoreError(
            f"{source} is a {kind} (of {members}), not a SOMA experiment. Give the address of an experiment."
        )
    with soma_errors(source):
        measurements = list(experiment.ms) if "ms" in experiment else []
        if data.measurement not in measurements:
            raise StoreError(
                f"{source} has no measurement {data.measurement!r}. It has: {', '.join(measurements) or 'none'} "
                "(--set data.measurement=NAME)."
            )
        measurement = experiment.ms[data.measurement]
        layers = sorted(measurement.X) if "X" in measurement else []
        layer = _layer(data.layer, layers, measurements, f"{source}: measurement {data.measurement!r}")
        matrix = measurement.X[layer]
        if matrix.soma_type != "SOMASparseNDArray":
            raise StoreError(
                f"{source}: layer {layer!r} is a {matrix.soma_type}; sparse layers are read. Write it with "
                "tiledbsoma.io.from_anndata(..., X_kind=tiledbsoma.SparseNDArray)."
            )
        address = Address(source, experiment.obs.uri, measurement.var.uri, matrix.uri, settings, timestamp)
    return SomaStore(address, layer, tuple(layers), data)


def _layer(asked: str, layers: list[str], measurements: list[str], what: str) -> str:
    """Return the name of the asked layer; X is data, or the only one."""
    if asked in layers:
        return asked
    if asked == "X" and "data" in layers:
        return "data"
    if asked == "X" and len(layers) == 1:
        return layers[0]
    listed = ", ".join(layers) or "none"
    if asked == "raw" and "raw" in measurements:
        listed += "; its raw values are a measurement of their own: --set data.measurement=raw"
    unclear = "no layer 'data' and not one layer alone" if asked == "X" else f"no layer {asked!r}"
    raise StoreError(f"{what} has {unclear}. Available: {listed} (--layer NAME).")


@final
class SomaStore(CellStore):
    """One sparse layer of a SOMA experiment.

    Cells are those of obs that the filter selects, in ascending order of soma_joinid; joinids may have gaps. Cell
    names are the obs column ``obs_id`` (or ``index``), else the soma_joinids as text; gene names the var column
    ``var_id``, ``feature_id``, ``gene_id`` or ``index``, else the soma_joinids as text. Everything is read as it was
    when the store was opened (``address.timestamp``), in every thread and process. Kept in memory: 8 bytes a cell
    (joinids), and gene names.

    Rows near each other are read as one range, unasked cells between them included (at most 16 in a row), since a
    range costs more than the cells; about 16 million values are decoded at a time.

    Parameters
    ----------
    address
        Where the arrays are.
    layer
        The name of the layer.
    available_layers
        The layers there are.
    data
        The settings it was opened with, of which ``obs_filter``, a value filter of TileDB-SOMA, as
        ``"tissue == 'lung' and n_genes > 500"``, selects cells.

    Raises
    ------
    StoreError
        The filter is wrong or the arrays cannot be read.
    DataError
        No cell is left by the filter.
    """

    def __init__(self, address: Address, layer: str, available_layers: tuple[str, ...], data: DataConfig) -> None:
        self.address, self.layer, self.available_layers = address, layer, available_layers
        self.measurement, self._filter = data.measurement, data.obs_filter
        self._opened = {"layer": layer, **data.model_dump(mode="json", include=set(OF_SOMA))}
        obs = open_array(address, "DataFrame", address.obs)
        self._columns, self._categorical = _columns(obs)
        self._cell_key = next((name for name in CELL_IDS if name in self._columns), None)
        total = int(obs.count)
        self._cell_ids = self._select(obs, total)
        var_columns, _ = _columns(open_array(address, "DataFrame", address.var))
        self._gene_key = next((name for name in GENE_IDS if name in var_columns), None)
        self._gene_columns = [name for name in NAME_COLUMNS if name in var_columns]
        asked = [] if self._gene_key is None else [self._gene_key]
        self._gene_ids, genes = read_frame(address, address.var, asked)
        self._gene_names = pd.Index(genes[self._gene_key] if asked else self._gene_ids).astype(str)
        with soma_errors(self.source):
            stored = int(open_array(address, "SparseNDArray", address.matrix).nnz)
        self._nonzeros = min(stored / max(total, 1), float(self._gene_ids.size))

    def _select(self, obs: Any, total: int) -> np.ndarray:
        """Return the ascending joinids of the cells that the filter selects, (n,) int64."""
        try:
            ids, _ = read_frame(self.address, self.address.obs, [], self._filter)
        except (StoreError, ValueError, KeyError) as error:
            if self._filter is None:
                raise
            raise StoreError(
                f"{self.source}: the filter of cells {self._filter!r} (--obs-filter) cannot be used: "
                f"{brief(error.__cause__ or error)}. Columns of obs: {', '.join(self._columns)}. "
                "Text is quoted: tissue == 'lung'."
            ) from error
        if ids.size == 0 and self._filter is not None:
            raise DataError(
                f"{self.source}: the filter {self._filter!r} leaves none of {total:,} cells. Check the spelling of its "
                f"values{self._examples(obs)}."
            )
        return ids

    def _examples(self, obs: Any) -> str:
        """Return the values that the categorical columns of the filter have, for a message."""
        named = [name for name in self._categorical if name in str(self._filter)]
        with soma_errors(self.source):
            values = {name: obs.get_enumeration_values([name])[name].to_pylist()[:5] for name in named}
        listed = "; ".join(f"{name}: {', '.join(map(str, some))}" for name, some in values.items())
        return f" (first values: {listed})" if listed else ""

    @property
    def source(self) -> str:
        """The address as it was given."""
        return self.address.source

    @property
    def n_cells(self) -> int:
        """Number of cells, n."""
        return int(self._cell_ids.size)

    @property
    def cell_ids(self) -> np.ndarray:
        """The soma_joinids of the cells, (n,) int64, ascending."""
        return self._cell_ids

    @property
    def gene_ids(self) -> np.ndarray:
        """The soma_joinids of the genes, (g,) int64, ascending."""
        return self._gene_ids

    @property
    def gene_names(self) -> pd.Index:
        """The g gene names; see the class for the column."""
        return self._gene_names

    @property
    def cell_names(self) -> pd.Index:
        """The n cell names, read at each access; see the class for the column."""
        if self._cell_key is None:
            return pd.Index(self._cell_ids).astype(str)
        return pd.Index(self._read_obs([self._cell_key])[self._cell_key]).astype(str)

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns, without soma_joinid and the column of cell names."""
        return [name for name in self._columns if name not in ("soma_joinid", self._cell_key)]

    @property
    def nonzeros_per_cell(self) -> float:
        """Mean number of stored values a cell, of all cells of the experiment and at most the number of genes."""
        return self._nonzeros

    def gene_table(self) -> pd.DataFrame | None:
        """Return the column ``feature_name`` of var, if there is one, indexed by gene name."""
        if not self._gene_columns:
            return None
        _, frame = read_frame(self.address, self.address.var, self._gene_columns)
        return frame.set_axis(self._gene_names, axis=0)

    def obs(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read obs ``columns`` (all by default) of every selected cell; see `CellStore.obs`."""
        wanted = check_columns(self, columns)
        key = [] if self._cell_key is None else [self._cell_key]
        frame = self._read_obs([*key, *wanted])
        names = pd.Index(frame[self._cell_key] if key else self._cell_ids).astype(str)
        return frame[wanted].set_axis(names.rename(None), axis=0)

    def _read_obs(self, columns: list[str]) -> pd.DataFrame:
        ids, frame = read_frame(self.address, self.address.obs, columns, self._filter)
        if not np.array_equal(ids, self._cell_ids):
            raise StoreError(f"{self.source}: obs has other cells than when it was opened. Open it again.")
        for name in frame.columns[frame.dtypes == "category"]:  # those of the cells that were left out
            frame[name] = frame[name].cat.remove_unused_categories()
        return frame

    def read(self, rows: np.ndarray, genes: np.ndarray | None = None) -> sparse.csr_matrix:
        """Read cells by position; see `CellStore.read`."""
        rows = check_positions(rows, self.n_cells, "row", self.source)
        cells, back = np.unique(rows, return_inverse=True)
        columns = order = np.arange(self._gene_ids.size)
        if genes is not None:
            columns, order = np.unique(
                check_positions(genes, self._gene_ids.size, "gene", self.source), return_inverse=True
            )
        if columns.size == 0 or rows.size == 0:
            return sparse.csr_matrix((rows.size, order.size), dtype=np.float32)
        step = max(int(PIECE / max(self._nonzeros, 1.0)), 1)
        parts = [
            read_matrix(self.address, self._cell_ids[cells[i : i + step]], self._gene_ids[columns])
            for i in range(0, cells.size, step)
        ]
        x_ng = stack(parts, columns.size)
        if not np.array_equal(order, np.arange(columns.size)):
            x_ng = x_ng[:, order]
        if not np.array_equal(back, np.arange(cells.size)):
            x_ng = x_ng[back]
        return canonical(x_ng)

    def provenance(self) -> dict[str, Any]:
        """Return the format, which the address does not tell when it cannot be reached, and how it was opened."""
        return {"format": "soma", "opened": self._opened}

    def fingerprint(self) -> str:
        """Hash what is cheap to get and changes with the content.

        The layer, the selected joinids, gene names, and what was written to obs, var and the layer: the names of
        their TileDB fragments if the experiment is local (they keep when it is copied), else when they were last
        written and how many cells their fragments hold (`last_write`), the number of stored values, the obs schema and
        the values of 64 cells. New obsm or other layers leave it as it is.
        """
        return self.content_hash()

    def content_hash(self, writes: bool = True) -> str:
        """Return the fingerprint, without ``writes`` as if nothing were written to what is remote once it is there."""
        digest = blake2b(digest_size=16)
        address = self.address
        arrays: list[tuple[Kind, str]] = [
            ("DataFrame", address.obs),
            ("DataFrame", address.var),
            ("SparseNDArray", address.matrix),
        ]
        local = [fragment_names(uri, address.timestamp) for _, uri in arrays]
        digest.update(repr((self.layer, self.n_cells, local)).encode())
        digest.update(self._cell_ids.tobytes() + self._gene_ids.tobytes())
        digest.update("\n".join(self._gene_names).encode())
        if None in local:
            found = last_writes(address, arrays) if writes else None
            obs = open_array(address, "DataFrame", address.obs)
            digest.update(repr((found, str(obs.schema), self._nonzeros)).encode())
            sample = self.read(np.linspace(0, self.n_cells - 1, min(_SAMPLE, self.n_cells)).astype(np.int64))
            for array in (sample.data, sample.indices, sample.indptr):
                digest.update(array.tobytes())
        return digest.hexdigest()


def _columns(frame: Any) -> tuple[list[str], list[str]]:
    """Return the columns of an open dataframe, and those that are categorical."""
    import pyarrow as pa

    schema = frame.schema
    categorical = [field.name for field in schema if pa.types.is_dictionary(field.type)]
    return [name for name in schema.names if name != "soma_joinid"], categorical
