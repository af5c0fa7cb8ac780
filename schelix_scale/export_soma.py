"""The embedding of a finished run -> obsm of the SOMA experiment that its cells came from."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from schelix_scale.errors import RunError, StoreError
from schelix_scale.export import KEY, embedded_names, embedding_group
from schelix_scale.progress import QuietReporter, Reporter, Stage
from schelix_scale.run import Run
from schelix_scale.stores import open_recorded
from schelix_scale.stores._addresses import absolute
from schelix_scale.stores._soma import brief, context_of, open_array, soma_module
from schelix_scale.stores.soma import SomaStore

# Values of the embedding that are written at a time; each piece is a fragment of TileDB.
_PIECE = 1 << 22


def export_into_source(
    run: Run | str | Path, out: str | Path, overwrite: bool = False, reporter: Reporter | None = None
) -> str:
    """Add the embedding to the SOMA experiment that the run has read: the one export that changes the source.

    Written are ``ms[measurement].obsm["X_schelix"]``, and ``X_schelix_*`` of a run with ``embed.streams``, each a
    SparseNDArray (soma_joinid, dimension) of the cells of the run; cells that its filter left out have no values. The
    new arrays are complete before the old ones, if any, are replaced, all in one step: an export that is stopped
    leaves the old ones or the new ones. Their metadata ``schelix`` says how they were made. obs, var and X stay as
    they are.

    Parameters
    ----------
    run
        A finished run or its directory.
    out
        The address of the experiment: it must be the source of the run.
    overwrite
        Replace an embedding that is there.
    reporter
        Told how many cells are written, and of old arrays that cannot be removed; nothing is shown without one.

    Returns
    -------
    The address of the experiment.

    Raises
    ------
    RunError
        The run is not of a SOMA experiment, ``out`` is another one, it has changed, it cannot be written, or it has an
        embedding already.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    store = _open_source(run, out)
    embedded = embedding_group(run)["obsm"]
    names = sorted(name for name in embedded if name == KEY or name.startswith(f"{KEY}_"))
    soma, context = soma_module(store.source), context_of(store.address.settings)
    uri = str(run.manifest["source"]["uri"])
    with _write_errors(soma, uri):
        with soma.Experiment.open(uri, "r", context=context) as experiment:
            measurement_uri, has_obsm = _measurement(experiment, store.measurement)
        if not has_obsm:
            with soma.Measurement.open(measurement_uri, "w", context=context) as measurement:
                measurement.add_new_collection("obsm").close()
        with soma.Measurement.open(measurement_uri, "r", context=context) as measurement:
            obsm_uri = measurement.obsm.uri
            old = {
                name: measurement.obsm[name].uri
                for name in measurement.obsm
                if name == KEY or name.startswith(f"{KEY}_")
            }
    if old and not overwrite:
        raise RunError(
            f"{uri} has obsm {', '.join(sorted(old))} already. Replace it with --overwrite (overwrite=True)."
        )
    config = run.config.model_dump(mode="json")
    notes = json.dumps({"run": str(run.path), "source": run.manifest["source"], "config": config})
    reporter = reporter or QuietReporter()
    stamp = time.time_ns()  # of no other array, not even of one that a killed export has left
    made = {name: f"{obsm_uri.rstrip('/')}/{name}_{stamp}" for name in names}
    ours = [array for name, array in old.items() if array.rpartition("/")[2].removeprefix(f"{name}_").isdigit()]
    with _write_errors(soma, uri):
        try:
            with reporter.stage(f"export into {uri}", store.n_cells * len(names)) as stage:
                for name in names:
                    _write(soma, made[name], context, store, embedded[name], notes, stage)
            # Ctrl-C is raised in the main thread only; it leaves this context when the thread is done.
            with ThreadPoolExecutor(1) as swap:
                swap.submit(_replace, soma, obsm_uri, context, old, made).result()
        finally:
            left = _remove_unused(soma, obsm_uri, context, [*made.values(), *ours])
    for array in left:
        reporter.warn(f"{array} is not part of {uri} any more, but cannot be removed")
    return uri


def _open_source(run: Run, out: str | Path) -> SomaStore:
    """Return the store of the run's source, which must be ``out`` and unchanged."""
    recorded = run.manifest["source"]
    uri, asked = recorded["uri"], str(out)
    if absolute(asked) != absolute(uri):
        raise RunError(
            f"--into-source adds the embedding to the SOMA experiment that the run {run.path} has read, {uri}, but "
            f"{out} was named. Name that one, or leave --into-source out."
        )
    remedy = f"Integrate it again, or take the embedding from {run.path / 'embedding.zarr'} (anndata.read_zarr)."
    try:
        store = open_recorded(recorded, run.config.data)
    except StoreError as error:
        raise RunError(f"{uri} cannot be opened as the run {run.path} read it: {error} {remedy}") from error
    if not isinstance(store, SomaStore):
        raise RunError(f"{uri} is not a SOMA experiment; --into-source is for those. Leave it out to write a copy.")
    if store.fingerprint() != recorded["fingerprint"] or not store.cell_names.equals(embedded_names(run)):
        raise RunError(f"{uri} has changed since the run {run.path} read it. {remedy}")
    return store


@contextmanager
def _write_errors(soma: Any, uri: str) -> Iterator[None]:
    try:
        yield
    except (soma.SOMAError, OSError, RuntimeError) as error:
        raise RunError(
            f"{uri} cannot be written: {brief(error)}. Its obsm arrays are as they were. You need the "
            "right to write there (data.tiledb holds the keys of a remote one); or export to an .h5ad or .zarr file."
        ) from error


def _measurement(experiment: Any, name: str) -> tuple[str, bool]:
    measurement = experiment.ms[name]
    return measurement.uri, "obsm" in measurement


def _write(soma: Any, uri: str, context: Any, store: SomaStore, z_nd: Any, notes: str, stage: Stage) -> None:
    """Write an array of (soma_joinid, dimension) in pieces."""
    import pyarrow as pa

    ids, (n, d) = store.cell_ids, z_nd.shape
    rows = int(open_array(store.address, "SparseNDArray", store.address.matrix).shape[0])  # cells left out included
    soma.SparseNDArray.create(uri, type=pa.float32(), shape=(rows, d), context=context).close()
    step = max(_PIECE // d, 1)
    with soma.SparseNDArray.open(uri, "w", context=context) as array:
        array.metadata["schelix"] = notes
        for start in range(0, n, step):
            part = np.asarray(z_nd[start : start + step], np.float32)
            table = {
                "soma_dim_0": np.repeat(ids[start : start + step], d),
                "soma_dim_1": np.tile(np.arange(d), len(part)),
                "soma_data": part.reshape(-1),
            }
            array.write(pa.Table.from_pydict(table))
            stage.advance(len(part))


def _replace(soma: Any, obsm_uri: str, context: Any, old: dict[str, str], made: dict[str, str]) -> None:
    """Let the names of obsm stand for the new arrays alone, in one write of the group.

    ``Collection.set`` refuses a name that is there, and to delete it before is a write of its own; TileDB takes both
    in one (TileDB pull request 3928), so its group is told directly.
    """
    with soma.Collection.open(obsm_uri, "w", context=context) as obsm:
        if not old:
            for name, uri in made.items():
                with soma.SparseNDArray.open(uri, "r", context=context) as array:
                    obsm.set(name, array)
            return
        try:
            remove, add, kinds = obsm._handle.remove, obsm._handle.add, soma.pytiledbsoma.URIType
        except AttributeError as error:
            raise RunError(
                f"tiledbsoma {soma.__version__} cannot replace obsm {', '.join(sorted(old))} in one step; they are as "
                "they were. Install tiledbsoma 2.3 (pip install -U tiledbsoma), or delete them before the export."
            ) from error
        whole = obsm_uri.startswith("tiledb://")  # where members have no relative addresses
        kind = kinds.absolute if whole else kinds.relative
        for name in old:
            remove(name)
        for name, uri in made.items():
            address = uri if whole else uri.rpartition("/")[2]
            add(uri=address, uri_type=kind, name=name, soma_type="SOMASparseNDArray")


def _remove_unused(soma: Any, obsm_uri: str, context: Any, uris: Iterable[str]) -> list[str]:
    """Remove arrays on this disk that are not in obsm; return those that could not be."""
    folders = [folder for uri in uris if (folder := Path(uri.removeprefix("file://"))).is_dir()]
    if not folders:
        return []
    with soma.Collection.open(obsm_uri, "r", context=context) as obsm:
        used = {uri.rstrip("/").rpartition("/")[2] for uri, _ in obsm.members().values()}
    unused = [folder for folder in folders if folder.name not in used]
    for folder in unused:
        shutil.rmtree(folder, ignore_errors=True)
    return [str(folder) for folder in unused if folder.exists()]
