"""The embedding of a finished run -> a copy of the file that its cells came from, or a light AnnData without X."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from schelix_scale.errors import RunError, StoreError
from schelix_scale.progress import QuietReporter, Reporter, Stage
from schelix_scale.publish import publish, size_of
from schelix_scale.records import refuse_mapped
from schelix_scale.run import Run
from schelix_scale.stores import open_store
from schelix_scale.stores.opening import is_soma

KEY = "X_schelix"
_PIECE = 1 << 24


def export_run(
    run: Run | str | Path, out: str | Path, overwrite: bool = False, reporter: Reporter | None = None
) -> Path:
    """Write the embedding into a copy of the run's source file, or with obs alone where there is none to copy.

    The copy has ``obsm["X_schelix"]``, and the streams ``obsm["X_schelix_*"]`` of a run with ``embed.streams``; such
    elements that the source has already are replaced in the copy. Everything else is as in the source, whose cells
    are matched by row and by name. The source is only read.

    Of cells of a SOMA experiment, the Census, several files or memory, a light AnnData is written: the obs columns of
    the run and the embedding, but no X; ``uns["schelix"]`` says where they come from. Such a source is not read, and
    need not be there. (Into a SOMA experiment: `schelix_scale.export_soma.export_into_source`.)

    Parameters
    ----------
    run
        A finished run or its directory.
    out
        The file to write, ``.h5ad`` for an ``.h5ad`` source and ``.zarr`` for a zarr directory, either for other
        sources; its folder is made.
    overwrite
        Replace ``out`` if it is there.
    reporter
        Told how much is copied; nothing is shown without one.

    Returns
    -------
    The path of ``out``.

    Raises
    ------
    RunError
        The run is not finished, the file to copy is gone or has changed, or ``out`` cannot be written: it is there,
        is the source or the run, or has the suffix of another format.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    refuse_mapped(run.path, run.manifest["source"])
    target = Path(out).expanduser()
    source = _source_of(run)
    if source is None:
        return _export_light(run, target, overwrite)
    _check_target(target, source, run, overwrite)
    _check_unchanged(run, source)
    try:
        with publish(target) as partial:
            with (reporter or QuietReporter()).stage(f"export {source.name}", size_of(source)[0], "bytes") as stage:
                _copy(source, partial, stage)
            (_add_to_zarr if source.is_dir() else _add_to_h5ad)(partial, run)
    except PermissionError as error:
        raise RunError(f"{target} cannot be written ({error}). Choose a file in a folder of yours.") from error
    return target


def _source_of(run: Run) -> Path | None:
    """Return the path of the file or directory that is copied; None if the cells were not read from one such."""
    recorded = run.manifest["source"]
    path = Path(recorded["uri"])
    if recorded.get("format") == "soma" or not path.is_absolute() or is_soma(str(path)):
        return None
    if not path.exists():
        raise RunError(
            f"{path}, from which the run {run.path} read its cells, is gone. Put it back, or take the embedding "
            f"from {run.path / 'embedding.zarr'} (anndata.read_zarr)."
        )
    return path


def _export_light(run: Run, target: Path, overwrite: bool) -> Path:
    """Write obs, obsm and uns of the run's own embedding, one element in memory at a time."""
    uri = run.manifest["source"]["uri"]
    there, home = target.resolve(), run.path.resolve()
    if str(there) == uri or there.is_relative_to(uri):
        raise RunError(
            f"{target} is (in) the SOMA experiment that the run read. To add the embedding to it, use --into-source; "
            "or name another file, .h5ad or .zarr."
        )
    if any(there.is_relative_to(Path(file).resolve()) for file in run.manifest["source"].get("files", ())):
        raise RunError(f"{target} is (in) one of the files that the run read; it is never changed. Name another file.")
    if there.is_relative_to(home) or home.is_relative_to(there):
        raise RunError(f"{target} is inside the run, or holds it; it is never changed. Name a file elsewhere.")
    suffix = target.suffix.lower()
    if suffix not in (".h5ad", ".zarr"):
        raise RunError(
            f"{target} has the suffix {target.suffix or 'none'!r}. The cells of {run.path} are those of {uri}, which "
            f"is not copied; obs and embedding are written as {target.with_suffix('.h5ad').name} or .zarr."
        )
    if target.exists():
        if not overwrite:
            raise RunError(f"{target} exists. Name another file, or replace it with --overwrite (overwrite=True).")
        if target.is_dir() != (suffix == ".zarr") or (target.is_dir() and not _is_zarr(target)):
            what = "a directory" if target.is_dir() else "a file"
            raise RunError(f"{target} is {what} and not cells in this format; it is kept. Name another file.")
    try:
        with publish(target) as partial:
            _write_light(run, partial)
    except PermissionError as error:
        raise RunError(f"{target} cannot be written ({error}). Choose a file in a folder of yours.") from error
    return target


def _write_light(run: Run, path: Path) -> None:
    import h5py
    import zarr
    from anndata.io import read_elem, write_elem

    embedded = embedding_group(run)
    uns = read_elem(embedded["uns"]) if "uns" in embedded else {}
    uns["schelix"] = {**uns.get("schelix", {}), "source_facts": json.dumps(run.manifest["source"])}
    if path.suffix == ".zarr":
        shutil.copytree(run.path / "embedding.zarr", path)
        root = zarr.open_group(str(path), mode="r+", use_consolidated=False)
        write_elem(root, "uns", uns)
        zarr.consolidate_metadata(str(path), zarr_format=root.metadata.zarr_format)
        return
    with h5py.File(path, "w") as root:
        root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name in ("obs", "var", "layers", "varm", "obsp", "varp"):
            write_elem(root, name, read_elem(embedded[name]) if name in embedded else {})
        write_elem(root, "uns", uns)
        _write_obsm(root, run)


def _check_target(target: Path, source: Path, run: Run, overwrite: bool) -> None:
    there, from_, home = target.resolve(), source.resolve(), run.path.resolve()
    if there == from_ or (target.exists() and target.samefile(source)):
        raise RunError(f"{target} is the file that the run read; it is never changed. Name another file.")
    if there.is_relative_to(home) or (source.is_dir() and there.is_relative_to(from_)):
        inside = home if there.is_relative_to(home) else source
        raise RunError(f"{target} is inside {inside}, which is never changed. Name a file elsewhere.")
    if from_.is_relative_to(there) or home.is_relative_to(there):
        raise RunError(f"{target} holds the run or the file that it read. Name another file.")
    allowed = (".zarr",) if source.is_dir() else tuple(dict.fromkeys((".h5ad", source.suffix.lower())))
    if target.suffix.lower() not in allowed:
        raise RunError(
            f"{target} has the suffix {target.suffix or 'none'!r}, but the export is a copy of {source} and has its "
            f"format. Name it {target.with_suffix(allowed[0]).name}."
        )
    if not target.exists():
        return
    if not overwrite:
        raise RunError(f"{target} exists. Name another file, or replace it with --overwrite (overwrite=True).")
    if target.is_dir() != source.is_dir() or (target.is_dir() and not _is_zarr(target)):
        what = "a directory" if target.is_dir() else "a file"
        raise RunError(f"{target} is {what} and not cells in the format of {source}; it is kept. Name another file.")


def _check_unchanged(run: Run, source: Path) -> None:
    """Raise unless the source is as it was when the run read it."""
    recorded = run.manifest["source"]
    remedy = f"Integrate it again, or take the embedding from {run.path / 'embedding.zarr'} (anndata.read_zarr)."
    try:
        store = open_store(source, recorded["layer"])
    except StoreError as error:
        raise RunError(f"{source} has changed since the run {run.path} read it: {error} {remedy}") from error
    if store.fingerprint() != recorded["fingerprint"]:
        raise RunError(f"{source} has changed since the run {run.path} read it, or is another copy of it. {remedy}")
    names, embedded = store.cell_names, embedded_names(run)
    if len(names) != len(embedded):
        raise RunError(f"{source} has {len(names)} cells but the embedding {len(embedded)}. {remedy}")
    differ = (names != embedded).nonzero()[0]
    if differ.size:
        row = int(differ[0])
        raise RunError(
            f"{differ.size} of {len(names)} cells of {source} have another name in the embedding (first: row {row}, "
            f"{names[row]} and {embedded[row]}). {remedy}"
        )


def embedded_names(run: Run) -> pd.Index:
    """Return the names of the cells of the embedding, n."""
    from anndata.io import read_elem

    obs = embedding_group(run)["obs"]
    return pd.Index(read_elem(obs[str(obs.attrs["_index"])])).astype(str)


def embedding_group(run: Run) -> Any:
    """Open embedding.zarr of a run for reading."""
    import zarr

    try:
        return zarr.open_group(str(run.path / "embedding.zarr"), mode="r", use_consolidated=False)
    except FileNotFoundError as error:
        raise RunError(
            f"the run {run.path} has lost embedding.zarr. Run the same `schelix integrate` command again to rebuild it."
        ) from error


def _add_to_h5ad(path: Path, run: Run) -> None:
    import h5py

    with h5py.File(path, "r+") as root:
        _write_obsm(root, run)


def _add_to_zarr(path: Path, run: Run) -> None:
    """Write in the zarr format of the copy; its consolidated metadata, if it has any, is made anew."""
    import anndata
    import zarr

    root = zarr.open_group(str(path), mode="r+", use_consolidated=False)
    with anndata.settings.override(auto_shard_zarr_v3=False):
        _write_obsm(root, run)
    if zarr.open_group(str(path), mode="r").metadata.consolidated_metadata is not None:
        zarr.consolidate_metadata(str(path), zarr_format=root.metadata.zarr_format)


def _write_obsm(root: Any, run: Run) -> None:
    """Write one array after the other, so that no more than one is in memory."""
    from anndata.io import read_elem, write_elem

    embedded = embedding_group(run)["obsm"]
    if "obsm" not in root:
        write_elem(root, "obsm", {})
    for stale in [name for name in root["obsm"] if name == KEY or name.startswith(f"{KEY}_")]:
        del root["obsm"][stale]
    for name in sorted(embedded.keys()):
        if name == KEY or name.startswith(f"{KEY}_"):
            write_elem(root["obsm"], name, read_elem(embedded[name]))


def _copy(source: Path, target: Path, stage: Stage) -> None:
    """Copy content without permissions: a read-only source makes a copy that can be written."""
    if not source.is_dir():
        _copy_file(source, target, stage)
        return
    for file in _walk(source):
        copied = target / file.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        _copy_file(file, copied, stage)


def _copy_file(source: Path, target: Path, stage: Stage) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        while piece := reader.read(_PIECE):
            writer.write(piece)
            stage.advance(len(piece))


def _walk(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder):
        yield from (Path(where, name) for name in names)


def _is_zarr(path: Path) -> bool:
    return any((path / name).exists() for name in ("zarr.json", ".zgroup"))
