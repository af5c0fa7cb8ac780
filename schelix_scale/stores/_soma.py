"""Opening TileDB-SOMA arrays: addresses that can be pickled come in, open arrays of this thread go out.

Opening an array costs milliseconds (a second in the cloud), so the last few stay open, one set a thread. They belong
to the process: they are never pickled, and a forked child starts without them.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from schelix_scale.errors import StoreError

# Settings of the section data that only SOMA experiments and the Census, and that only the Census, are read by.
OF_SOMA = ("obs_filter", "measurement", "timestamp", "tiledb")
OF_CENSUS = ("census_version", "census_uri")
# Bounds of TileDB: bytes of each column of a table that it returns, and of all that it holds for a query.
BOUNDS = {"soma.init_buffer_bytes": str(1 << 24), "sm.mem.total_budget": str(2 << 30)}
OPEN_ARRAYS = 8
# Earlier times at which a remote array is opened at once.
PROBES = 7
_NOT_YET = "Object is not a "  # says TileDB of an array whose type is not written yet
_STAMP = re.compile(r"__(\d+)_(\d+)_")

Settings = tuple[tuple[str, str], ...]
Kind = Literal["DataFrame", "SparseNDArray"]


@dataclass(frozen=True)
class Address:
    """Where an experiment's tables and one of its matrices are, and how they are opened.

    Attributes
    ----------
    source
        What the experiment is called in messages.
    obs, var, matrix
        Full addresses of the arrays.
    settings
        Settings of TileDB.
    timestamp
        Milliseconds since 1970: the arrays are read as they were then.
    """

    source: str
    obs: str
    var: str
    matrix: str
    settings: Settings
    timestamp: int


class _Process:
    """What belongs to this process: contexts, shared by its threads, and the open arrays of each thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.contexts: dict[Settings, Any] = {}
        self.threads = threading.local()


_process = _Process()
_of_parents: list[_Process] = []


def _start_anew() -> None:
    """Forget what a fork has copied; it is kept, since closing it would wait for threads that are not here."""
    global _process
    _of_parents.append(_process)
    _process = _Process()


os.register_at_fork(after_in_child=_start_anew)


def soma_module(what: str) -> Any:
    """Import tiledbsoma, or raise a `StoreError` that says how to install it."""
    try:
        import tiledbsoma
    except ImportError as error:
        raise StoreError(
            f"{what} is read with tiledbsoma, which cannot be imported ({error}): pip install 'schelix-scale[soma]'"
        ) from error
    return tiledbsoma


def settings_of(given: Mapping[str, str]) -> Settings:
    """Return the settings of TileDB: the bounds of memory, and what was given, which wins."""
    return tuple(sorted({**BOUNDS, **given}.items()))


def context_of(settings: Settings) -> Any:
    """Return this process' TileDB context of these settings."""
    soma = soma_module("a SOMA experiment")
    with _process.lock:
        if settings not in _process.contexts:
            _process.contexts[settings] = soma.SOMATileDBContext(tiledb_config=dict(settings))
        return _process.contexts[settings]


def open_array(address: Address, kind: Kind, uri: str) -> Any:
    """Return an array that is open in this thread as of ``address.timestamp``."""
    soma = soma_module(address.source)
    threads = _process.threads
    arrays: OrderedDict[tuple[str, Settings, int], Any] = threads.__dict__.setdefault("arrays", OrderedDict())
    key = (uri, address.settings, address.timestamp)
    if key in arrays:
        arrays.move_to_end(key)
        return arrays[key]
    with soma_errors(address.source):
        context = context_of(address.settings)
        array = getattr(soma, kind).open(uri, "r", tiledb_timestamp=address.timestamp, context=context)
    arrays[key] = array
    if len(arrays) > OPEN_ARRAYS:
        arrays.popitem(last=False)[1].close()
    return array


@contextmanager
def soma_errors(source: str) -> Iterator[None]:
    """Turn errors of TileDB into a `StoreError` that names the source."""
    soma = soma_module(source)
    try:
        yield
    except soma.DoesNotExistError as error:
        raise StoreError(
            f"{source} is not there, or not as of the asked time ({brief(error)}). Check the address and "
            "data.timestamp."
        ) from error
    except (soma.SOMAError, OSError, RuntimeError) as error:
        remote = "://" in source.removeprefix("file://") or source.startswith("census:")
        hint = " Check the connection, and the settings data.tiledb, such as --set data.tiledb.vfs.s3.region=us-west-2."
        raise StoreError(f"{source} cannot be read: {brief(error)}.{hint if remote else ''}") from error


def brief(error: BaseException) -> str:
    """Return what an error of TileDB says, without its stack and its quotes."""
    text = str(error).split("\n")[0].removeprefix("SOMAError: ").rstrip(".:")
    return text[1:-1] if text[:1] == text[-1:] == "'" else text


def read_frame(
    address: Address, uri: str, columns: list[str], value_filter: str | None = None
) -> tuple[np.ndarray, pd.DataFrame]:
    """Return (m,) ascending soma_joinids and the ``columns`` (m rows) of a SOMA dataframe, filtered."""
    table = open_array(address, "DataFrame", uri)
    asked = list(dict.fromkeys(["soma_joinid", *columns]))
    with soma_errors(address.source):
        found = table.read(column_names=asked, value_filter=value_filter).concat()
    frame = found.unify_dictionaries().to_pandas()
    ids = np.array(frame["soma_joinid"], dtype=np.int64)
    if ids.size and not (np.diff(ids) > 0).all():
        order = np.argsort(ids, kind="stable")
        ids, frame = ids[order], frame.iloc[order]
    return ids, frame[columns].reset_index(drop=True)


def last_writes(address: Address, arrays: Sequence[tuple[Kind, str]]) -> list[tuple[int, int]]:
    """Return what `last_write` does of several arrays, which are asked at once."""
    with ThreadPoolExecutor(len(arrays)) as pool:
        return list(pool.map(lambda array: last_write(address, *array), arrays))


def last_write(address: Address, kind: Kind, uri: str) -> tuple[int, int]:
    """Return how many cells the fragments of an array hold, those written again included, and when it became that.

    That is what tells a remote array from an earlier or later one, since TileDB-SOMA does not list its files. The time,
    in milliseconds since 1970, is found by opening the array as of earlier times, `PROBES` at once: 41 bits are 14
    rounds.
    """
    total = _fragment_cells(address, kind, uri, address.timestamp)
    if not total:
        return 0, 0
    before, after = 0, address.timestamp  # the fragments hold less before, and the total at after
    with ThreadPoolExecutor(PROBES) as pool:
        while after - before > 1:
            times = np.unique(np.linspace(before, after, PROBES + 2).astype(np.int64)[1:-1]).tolist()
            times = [time for time in times if before < time < after]
            cells = list(pool.map(lambda time: _fragment_cells(address, kind, uri, time), times))
            there = [time for time, count in zip(times, cells, strict=True) if count == total]
            after = min([after, *there])
            before = max([before, *(time for time in times if time < after)])
    return total, after


def _fragment_cells(address: Address, kind: Kind, uri: str, timestamp: int) -> int:
    """Return how many cells the fragments of an array held at a time; 0 before it was made."""
    soma, context = soma_module(address.source), context_of(address.settings)
    with soma_errors(address.source):
        try:
            with getattr(soma, kind).open(uri, tiledb_timestamp=timestamp, context=context) as array:
                return int(array._handle.fragment_cell_count())
        except soma.SOMAError as error:
            if timestamp < address.timestamp and (isinstance(error, soma.DoesNotExistError) or _NOT_YET in str(error)):
                return 0
            raise
        except AttributeError as error:
            raise StoreError(
                f"tiledbsoma {soma.__version__} cannot tell whether {address.source} was changed. Install tiledbsoma "
                "2.3 (pip install -U tiledbsoma), or copy the experiment to a local disk."
            ) from error


def fragment_names(uri: str, timestamp: int) -> list[str] | None:
    """Return the names of what was written to a local array until ``timestamp``; None if it is remote."""
    folder = Path(uri.removeprefix("file://"))
    if "://" in str(uri.removeprefix("file://")) or not folder.is_dir():
        return None
    names = []
    for part in (folder, folder / "__commits", folder / "__fragments", folder / "__schema"):
        for name in sorted(entry.name for entry in part.iterdir()) if part.is_dir() else ():
            stamp = _STAMP.match(name)
            if stamp is not None and int(stamp[1]) <= timestamp:
                names.append(f"{part.name if part != folder else ''}/{name}")
    return names
