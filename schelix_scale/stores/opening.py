"""`open_store`: whatever describes cells -> a `CellStore`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import ValidationError

from schelix_scale.config import DataConfig
from schelix_scale.errors import StoreError
from schelix_scale.stores._addresses import absolute, local_path, matches
from schelix_scale.stores._soma import OF_CENSUS, OF_SOMA
from schelix_scale.stores.anndata import AnnDataStore
from schelix_scale.stores.base import CellStore
from schelix_scale.stores.joined import JoinedStore
from schelix_scale.stores.memory import MemoryStore, hashed

if TYPE_CHECKING:
    from anndata import AnnData

READING = frozenset({*OF_SOMA, *OF_CENSUS, "genes_join"})
FILES = (".h5ad", ".h5", ".hdf5", ".zarr")
SOMA_SCHEMES = ("tiledb://", "s3://", "gs://", "azure://", "file://")

Source: TypeAlias = "str | Path | AnnData | CellStore | Sequence[str | Path]"


def open_store(source: Source, layer: str = "X", **options: Any) -> CellStore:
    """Open a source of cells.

    Parameters
    ----------
    source
        An ``.h5ad`` file, an anndata ``.zarr`` directory, a TileDB-SOMA experiment (directory or address), several of
        these (a list, or a pattern such as ``"donors/*.h5ad"``), a part of the CELLxGENE Census
        (``"census:homo_sapiens"``), an AnnData (a backed one is re-opened from its file), or a store, which is
        returned as it is.
    layer
        ``"X"``, ``"raw"`` or the name of a layer.
    **options
        Settings of the section ``data`` that say what is read: ``obs_filter``, ``measurement``, ``timestamp``,
        ``tiledb``, ``census_version``, ``census_uri``, ``genes_join``.

    Raises
    ------
    StoreError
        The source cannot be read as cells; the message names it, says what is wrong and the remedy.
    """
    try:
        data = DataConfig(layer=layer, **options)
    except ValidationError as error:
        raise StoreError(f"{source} cannot be opened like that: {error}") from error
    return open_configured(source, data)


def open_configured(source: Source, data: DataConfig) -> CellStore:
    """Open a source of cells as the settings of the section ``data`` say; see `open_store`."""
    if isinstance(source, CellStore):
        if data.layer not in ("X", source.layer):
            raise StoreError(
                f"{source.source} is open with layer {source.layer!r}; {data.layer!r} was asked. "
                "Open it with that layer."
            )
        ignored = sorted(READING & data.model_fields_set)
        if ignored:
            raise StoreError(
                f"{source.source} is open already, so {', '.join(ignored)} would not be applied. Give it to "
                "open_store, or give the address instead of the open store."
            )
        return source
    if isinstance(source, str | Path):
        return _open_address(source, data)
    anndata = sys.modules.get("anndata")
    if anndata is not None and isinstance(source, anndata.AnnData):
        _refuse_ignored("An AnnData", data)
        return _reopen(source, data.layer) if source.isbacked else MemoryStore(source, data.layer)
    if isinstance(source, Sequence):
        return _open_joined(list(source), data)
    raise StoreError(
        f"Cells cannot be read from a {type(source).__qualname__}. Give a path, several paths, an AnnData or a "
        "CellStore."
    )


def open_recorded(recorded: Mapping[str, Any], data: DataConfig) -> CellStore:
    """Open the source that a run has recorded as it was open then, whether by settings or as a store.

    Parameters
    ----------
    recorded
        The description of the cells in run.json or manifest.json.
    data
        The settings of the run.

    Raises
    ------
    StoreError
        It cannot be opened; see `open_store`.
    """
    opened = {"layer": recorded["layer"], **recorded.get("opened", {})}
    opened["tiledb"] = {**opened.get("tiledb", {}), **data.tiledb}  # keys to the cloud are not recorded
    return open_configured(recorded.get("files", recorded["uri"]), DataConfig(**{**dict(data), **opened}))


def _open_address(source: str | Path, data: DataConfig) -> CellStore:
    """Open what a text or a path names."""
    text = str(source)
    if text.startswith("census:"):
        from schelix_scale.stores.census import open_census

        return open_census(text, data)
    local = local_path(text)
    if is_pattern(local):
        return _open_joined([local], data)
    if "://" in local and local.rstrip("/").endswith(FILES):
        raise StoreError(
            f"{text} is a remote address; h5ad and zarr are read from local paths. Copy it to a local disk."
        )
    if is_soma(text):
        from schelix_scale.stores.soma import open_soma

        _refuse_ignored(text, data, OF_CENSUS)
        return open_soma(text, data)
    if "://" in local:
        raise StoreError(f"{text} is a remote address of no kind that is read. Copy it to a local disk.")
    _refuse_ignored(local, data)
    return AnnDataStore(local, data.layer)


def _open_joined(sources: Sequence[object], data: DataConfig) -> CellStore:
    """Open several sources as one; a single one is opened as it is.

    Parameters
    ----------
    sources
        Paths, addresses and patterns, taken as given; the files that a pattern matches are sorted naturally (donor2
        before donor10).
    data
        Settings that each of them is opened with, and ``genes_join``. What only SOMA or the Census read must be of use
        to one of the sources; ``obs_filter``, which selects cells, to each.

    Raises
    ------
    StoreError
        A source cannot be opened or is given twice, a pattern matches nothing, or there is nothing at all.
    DataError
        Genes cannot be joined, see `JoinedStore`.
    """
    addresses: list[str] = []
    for source in sources:
        if not isinstance(source, str | Path):
            raise StoreError(
                f"Several sources are given as paths; one is a {type(source).__qualname__}. Write it to a file, or "
                "join the objects first (anndata.concat)."
            )
        text = str(source)
        addresses += matches(text) if is_pattern(local_path(text)) else [text]
    if not addresses:
        raise StoreError("An empty list of files holds no cells. Give at least one path.")
    first: dict[str, str] = {}
    for address in addresses:
        place = absolute(address)
        if place in first:
            raise StoreError(f"{address} is given twice (first as {first[place]}). Leave one out.")
        first[place] = address
    shared = _shared(addresses, data)
    parts = [open_configured(address, own) for address, own in zip(addresses, shared, strict=True)]
    return parts[0] if len(parts) == 1 else JoinedStore(parts, addresses, data.genes_join, data.layer)


def _shared(addresses: Sequence[str], data: DataConfig) -> list[DataConfig]:
    """Return the settings for each source: without those that only others of them read."""
    default, reads = DataConfig(), [_readable(address) for address in addresses]
    needless = {name for name in (*OF_SOMA, *OF_CENSUS) if name != "obs_filter" and any(name in read for read in reads)}
    return [data.model_copy(update={name: getattr(default, name) for name in needless - read}) for read in reads]


def _readable(address: str) -> frozenset[str]:
    """Return which of the settings of SOMA and the Census are read by the kind of source that is at an address."""
    if address.startswith("census:"):
        return frozenset((*OF_SOMA, *OF_CENSUS))
    return frozenset(OF_SOMA if is_soma(address) else ())


def _refuse_ignored(what: str, data: DataConfig, names: Sequence[str] = (*OF_SOMA, *OF_CENSUS)) -> None:
    """Raise a `StoreError` for settings ``names`` of SOMA and the Census that a source would not be read by."""
    default = DataConfig()
    given = [name for name in names if getattr(data, name) != getattr(default, name)]
    if "obs_filter" in given:
        raise StoreError(
            f"{what} is no SOMA experiment; obs_filter ({data.obs_filter!r}) selects cells of those and of the Census "
            "only. Leave it out, or write the wanted cells to a file: adata[...].write_h5ad."
        )
    if given:
        of_census = [name for name in given if name in OF_CENSUS]
        listed = ", ".join(f"data.{name}" for name in of_census or given)
        kind = "part of the Census (census:homo_sapiens)" if of_census else "SOMA experiment"
        raise StoreError(f"{what} is no {kind}, so {listed} would not be applied. Leave it out, or give such a source.")


def is_pattern(text: str) -> bool:
    """Whether a text is a pattern of paths and not a path that is there."""
    return any(mark in text for mark in "*?[") and not Path(text).expanduser().exists()


def is_soma(text: str) -> bool:
    """Whether a text is the address of a TileDB group, or a directory that is one."""
    path = Path(local_path(text)).expanduser()
    if text.startswith("file://") and (path.exists() or path.suffix.lower() in FILES):
        return (path / "__group").is_dir()
    return text.startswith(SOMA_SCHEMES) or (path / "__group").is_dir()


def _reopen(adata: AnnData, layer: str) -> CellStore:
    """Open the file behind a backed AnnData, or raise when the object in memory says something else."""
    remedy = "Use adata.to_memory(), or write it to a file and open that."
    if adata.is_view:
        raise StoreError(f"This AnnData is a view of part of {adata.filename}, which cannot be opened alone. {remedy}")
    store = AnnDataStore(Path(adata.filename), layer)
    unsaved = [str(name) for name in adata.obs.columns if name not in store.obs_columns]
    if unsaved:
        raise StoreError(f"obs columns {unsaved[:5]} of this backed AnnData are not in {adata.filename}. {remedy}")
    saved = store.obs([str(name) for name in adata.obs.columns])
    changed = [str(name) for name in adata.obs.columns if hashed(adata.obs[name]) != hashed(saved[str(name)])]
    if changed:
        raise StoreError(f"obs columns {changed[:5]} of this backed AnnData differ from {adata.filename}. {remedy}")
    return store
