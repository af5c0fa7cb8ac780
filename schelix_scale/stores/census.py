"""Cells of the CELLxGENE Census: organism, release and filter come in, a store of the selected cells goes out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, final

import numpy as np
import pandas as pd
from scipy import sparse

from schelix_scale.config import DataConfig
from schelix_scale.errors import DataError, StoreError
from schelix_scale.stores._rows import check_positions
from schelix_scale.stores._soma import BOUNDS, Address, Settings, brief, soma_errors
from schelix_scale.stores.base import CellStore, Measured, check_columns
from schelix_scale.stores.soma import SomaStore, now, store_of

PREFIX = "census:"
PRIMARY = "is_primary_data"
PRESENCE = "feature_dataset_presence_matrix"


def open_census(text: str, data: DataConfig) -> CensusStore:
    """Open the cells of ``census:ORGANISM`` that ``data.obs_filter`` selects.

    Of the release ``data.census_version``, or of the census at ``data.census_uri``; the layer is ``raw`` for
    ``data.layer = "X"``.

    Raises
    ------
    StoreError
        The census, organism, measurement or layer is not there, cannot be reached, the filter is wrong, or
        cellxgene_census is not installed.
    DataError
        No cell is left by the filter, or its data sets measured no gene.
    """
    organism = re.sub(r"[ -]+", "_", text.removeprefix(PREFIX).strip()).lower()
    where = data.census_uri or data.census_version
    source = f"{PREFIX}{organism}"
    chosen = data.model_copy(update={"layer": "raw"}) if data.layer == "X" else data
    timestamp = now() if data.timestamp is None else data.timestamp
    with _open(data, f"the census {where}", timestamp) as census, soma_errors(f"the census {where}"):
        for part in ("census_info", "census_data"):
            if part not in census:
                raise StoreError(
                    f"{where} is no CELLxGENE Census: it has {', '.join(census.keys()) or 'nothing'}, not {part}. A "
                    "SOMA experiment is opened by its address alone, without census:."
                )
        organisms = sorted(census["census_data"].keys())
        if organism not in organisms:
            raise StoreError(
                f"the census {where} has no organism {organism or 'without a name'!r}. It has: {', '.join(organisms)} "
                f"(such as {PREFIX}{organisms[0] if organisms else 'homo_sapiens'})."
            )
        experiment = census["census_data"][organism]
        settings = _settings(census.context.tiledb_config, data)
        inner = store_of(experiment, source, chosen, timestamp, settings)
        facts = _facts(census, data)
        return CensusStore(inner, data, facts, *_presence(census, experiment, inner, data.measurement))


@contextmanager
def _open(data: DataConfig, what: str, timestamp: int) -> Iterator[Any]:
    """Open the release or the census at an address, all of it as of one time."""
    try:
        import cellxgene_census
        import requests
    except ImportError as error:
        raise StoreError(
            f"{what} is read with cellxgene_census, which cannot be imported ({error}): "
            "pip install 'schelix-scale[census]'"
        ) from error
    try:
        context = cellxgene_census.get_default_soma_context({**BOUNDS, **data.tiledb})
        context = context.replace(tiledb_config={}, timestamp=timestamp)  # without {} its settings would be lost
        if data.census_uri is not None:
            census = cellxgene_census.open_soma(uri=_address(data.census_uri), context=context)
        else:
            census = cellxgene_census.open_soma(census_version=data.census_version, context=context)
    except requests.RequestException as error:
        raise StoreError(
            f"the list of census releases cannot be read ({error}). Check the internet connection, or give the address "
            "of a local or mirrored census: --census-uri (data.census_uri)."
        ) from error
    except Exception as error:  # tiledbsoma and cellxgene_census raise many kinds
        raise StoreError(
            f"{what} cannot be opened: {brief(error)}. Give a release date (--census-version 2025-11-08), stable or "
            "latest, or the address of a census (--census-uri)."
        ) from error
    with census:
        yield census


def _address(uri: str) -> str:
    """Return a full address: a local path may be relative."""
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def _settings(opened: dict[str, Any], data: DataConfig) -> Settings:
    """Return the TileDB settings with which the census was opened, as far as they are not TileDB's own."""
    from cellxgene_census import get_default_soma_context

    names = {*get_default_soma_context().tiledb_config, *BOUNDS, *data.tiledb, "vfs.s3.region"}
    return tuple(sorted((name, str(value)) for name, value in opened.items() if name in names and value is not None))


def _facts(census: Any, data: DataConfig) -> dict[str, str]:
    """Return which census this is: its build date and schema version, and where it is."""
    summary = census["census_info"]["summary"].read(column_names=["label", "value"]).concat().to_pandas()
    said = dict(zip(summary["label"].astype(str), summary["value"].astype(str), strict=True))
    facts = {name: said[name] for name in ("census_build_date", "census_schema_version") if name in said}
    if "census_build_date" not in facts:
        raise StoreError("the census does not say when it was built (census_info/summary). Use a complete copy.")
    return facts | {"census_uri": census.uri}


def _presence(
    census: Any, experiment: Any, inner: SomaStore, measurement: str
) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    """Return the data set of each selected cell, (n,) int32, the p names, and what they measured, (p, g) bool."""
    datasets = census["census_info"]["datasets"].read(column_names=["soma_joinid", "dataset_id"]).concat().to_pandas()
    joinid_of = dict(zip(datasets["dataset_id"].astype(str), datasets["soma_joinid"], strict=True))
    codes, names = pd.factorize(inner.obs(["dataset_id"])["dataset_id"].astype(str), sort=True)
    unknown = [name for name in names if name not in joinid_of]
    if unknown:
        raise StoreError(
            f"{inner.source}: {len(unknown)} data sets of the cells (first: {unknown[0]}) are not in "
            "census_info/datasets. The census is damaged or incomplete; use a complete copy."
        )
    rows = np.array([joinid_of[name] for name in names], np.int64)
    members = experiment.ms[measurement]
    if PRESENCE not in members:
        raise StoreError(f"{inner.source}: measurement {measurement!r} has no {PRESENCE}. Use a complete copy.")
    measured_pg = np.zeros((rows.size, inner.gene_ids.size), dtype=bool)
    row_of, column_of = pd.Index(rows), pd.Index(inner.gene_ids)
    for table in members[PRESENCE].read((np.sort(rows),)).tables():
        i = row_of.get_indexer(table["soma_dim_0"].to_numpy())
        j = column_of.get_indexer(table["soma_dim_1"].to_numpy())
        there = (j >= 0) & (table["soma_data"].to_numpy() != 0)
        measured_pg[i[there], j[there]] = True
    return codes.astype(np.int32), tuple(map(str, names)), measured_pg


@final
class CensusStore(CellStore):
    """Selected cells of one organism of a census, and the genes that at least one of their data sets measured.

    Gene names are ``feature_id`` (Ensembl ids), cell names the soma_joinids of the census as text. Kept in memory:
    12 bytes a cell, and one byte for each gene of each data set.

    Parameters
    ----------
    inner
        The experiment of the organism, with all genes.
    data
        The settings it was opened with.
    facts
        What identifies the census.
    group_n, names, measured_pg
        As of `Measured`, for all genes.

    Raises
    ------
    DataError
        The data sets measured no gene.
    """

    def __init__(
        self,
        inner: SomaStore,
        data: DataConfig,
        facts: dict[str, str],
        group_n: np.ndarray,
        names: tuple[str, ...],
        measured_pg: np.ndarray,
    ) -> None:
        self._inner, self._facts = inner, facts
        self._released = data.census_uri is None
        where = (
            {"census_version": facts["census_build_date"]} if self._released else {"census_uri": facts["census_uri"]}
        )
        self._opened = {**inner.provenance()["opened"], **where}
        self._genes = np.flatnonzero(measured_pg.any(axis=0))
        if self._genes.size == 0:
            raise DataError(
                f"{inner.source}: the {len(names)} data sets of the selected cells measured no gene at all."
            )
        self._measured = Measured(group_n, names, measured_pg[:, self._genes])
        self.layer, self.available_layers = inner.layer, inner.available_layers
        self.row_access = inner.row_access

    @property
    def address(self) -> Address:
        """Where the arrays of the organism are."""
        return self._inner.address

    @property
    def source(self) -> str:
        """``census:`` and the organism."""
        return self._inner.source

    @property
    def n_cells(self) -> int:
        """Number of selected cells, n."""
        return self._inner.n_cells

    @property
    def gene_names(self) -> pd.Index:
        """The g gene ids (feature_id) that were measured."""
        return self._inner.gene_names[self._genes]

    @property
    def cell_names(self) -> pd.Index:
        """The soma_joinids of the n cells, as text."""
        return self._inner.cell_names

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns of the census, without soma_joinid."""
        return self._inner.obs_columns

    @property
    def nonzeros_per_cell(self) -> float:
        """Mean number of stored values a cell, of all cells of the organism."""
        return min(self._inner.nonzeros_per_cell, float(self._genes.size))

    def obs(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Read obs ``columns`` (all by default) of every selected cell; see `CellStore.obs`."""
        return self._inner.obs(check_columns(self, columns))

    def gene_table(self) -> pd.DataFrame | None:
        """Return ``feature_name``, the gene symbols, g rows indexed by gene id."""
        table = self._inner.gene_table()
        return None if table is None else table.iloc[self._genes]

    def measured(self) -> Measured | None:
        """Return which genes each data set measured, from the presence matrix; None if all measured all of them."""
        return None if self._measured.measured_pg.all() else self._measured

    def read(self, rows: np.ndarray, genes: np.ndarray | None = None) -> sparse.csr_matrix:
        """Return cells by position; see `CellStore.read`."""
        rows = check_positions(rows, self.n_cells, "row", self.source)
        if genes is not None:
            genes = check_positions(genes, self._genes.size, "gene", self.source)
        return self._inner.read(rows, self._genes if genes is None else self._genes[genes])

    def provenance(self) -> dict[str, Any]:
        """Return the census' build date, schema version and address, and the sha256 of the cells' soma_joinids.

        And how it was opened: the release by its build date, which ``stable`` and ``latest`` are not for long.
        """
        ids = self._inner.cell_ids.astype("<i8")
        return {**self._facts, "opened": self._opened, "soma_joinids_sha256": sha256(ids.tobytes()).hexdigest()}

    def notices(self) -> list[str]:
        """Warn of cells that are in the census more than once."""
        if PRIMARY not in self.obs_columns:
            return []
        copies = int((~self.obs([PRIMARY])[PRIMARY].to_numpy(dtype=bool)).sum())
        if copies == 0:
            return []
        return [
            f"{copies:,} of {self.n_cells:,} cells of {self.source} are copies of cells of another data set "
            f"({PRIMARY} is False), and may count twice. Leave them out: add `and {PRIMARY} == True` to --obs-filter"
        ]

    def fingerprint(self) -> str:
        """Hash the build date of the census, the presence of genes, and what `SomaStore.fingerprint` hashes.

        What was written when is asked of a census at an address of its own only: a release does not change.
        """
        digest = blake2b(self._inner.content_hash(writes=not self._released).encode(), digest_size=16)
        digest.update(repr((self._facts["census_build_date"], self._measured.names)).encode())
        digest.update(self._genes.tobytes() + np.packbits(self._measured.measured_pg).tobytes())
        return digest.hexdigest()
