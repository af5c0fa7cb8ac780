"""Atomic files: what comes in is written beside its target and renamed into place when it is complete and on disk.

A reader sees the old artifact or the new one, never half of one. A full disk is a `RunError` that says where.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from schelix_scale.errors import RunError

_OLD = ".old.partial"
_PARTIAL = re.compile(r"\.partial(\.[^.]+)?$")
_FULL = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than allowed (ulimit -f, or the file system)",
}
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # all that NumPy says of any of these
_NEARLY_FULL = 1 << 20  # libraries that hide the errno fail with less free space than this


def partial_path(target: Path) -> Path:
    """Return the sibling to write to; it keeps the suffix, which some writers (np.save, parquet) act on."""
    return target.with_name(f"{target.stem}.partial{target.suffix}")


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yield a path to write a file or directory to, and rename it to ``target`` when the context succeeds.

    Raises
    ------
    RunError
        The disk is full, over quota, or nothing was written; the partial file is gone and the target untouched.
    """
    partial = partial_path(target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _put_back(target)
        remove(partial)
    try:
        with disk_errors(target):
            yield partial
            if not partial.exists():
                raise RunError(f"nothing was written to {partial}, so {target} cannot be published.")
            _sync_tree(partial)
            _move_into_place(partial, target)
    except BaseException:
        remove(partial)
        _put_back(target)
        raise


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON, atomically."""
    with publish(target) as partial:
        partial.write_text(json.dumps(content, indent=2, default=jsonable) + "\n", encoding="utf-8")


def remove_partials(directory: Path) -> None:
    """Remove what an interrupted `publish` left anywhere in ``directory``; what it moved aside is put back."""
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            if name.endswith(_OLD):
                _put_back(Path(folder, name.removesuffix(_OLD)))
        for name in [name for name in (*folders, *files) if _PARTIAL.search(name)]:
            remove(Path(folder, name))
        folders[:] = [name for name in folders if not _PARTIAL.search(name) and not name.endswith(".zarr")]


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory; nothing if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_of(path: Path) -> tuple[int, int]:
    """Return (bytes, files) of a file or a directory tree."""
    sizes = [file.stat().st_size for file in _files(path)]
    return sum(sizes), len(sizes)


def checksum(path: Path) -> str:
    """Return the sha256 of a file, or of the sorted relative names and sha256s of the files in a directory."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    tree = hashlib.sha256()
    for name, file_path in sorted((file.relative_to(path).as_posix(), file) for file in _files(path)):
        tree.update(f"{name}\0{checksum(file_path)}\n".encode())
    return tree.hexdigest()


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn the errors of a full disk, also those whose errno a library has hidden, into a `RunError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = _full_reason(error, target)
        if reason is None:
            raise
        folder = _existing(target)
        free = shutil.disk_usage(folder).free / 1e9
        raise RunError(
            f"{reason} on {_mount(folder)} ({free:.3f} GB free) while writing {target}. "
            "Free some space there, or raise the limit, and run the same command again: finished stages are kept."
        ) from error


def jsonable(value: Any) -> Any:
    """Return what JSON can hold for settings, paths and NumPy numbers (a ``default`` of json.dumps)."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written as JSON")


def _full_reason(error: BaseException, target: Path) -> str | None:
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in _FULL:
            return _FULL[link.errno]
        link = link.__cause__ or link.__context__
    if getattr(error, "errno", None) is None and shutil.disk_usage(_existing(target)).free < _NEARLY_FULL:
        return _FULL[errno.ENOSPC]
    return "not all could be written (disk full, quota or file size limit)" if _SHORT_WRITE.search(str(error)) else None


def _existing(path: Path) -> Path:
    return next(folder for folder in path.absolute().parents if folder.exists())


def _mount(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.is_mount())


def _move_into_place(partial: Path, target: Path) -> None:
    """Rename; a directory cannot replace another in one step, so the old one steps aside first."""
    if target.is_dir() or (partial.is_dir() and target.exists()):
        old = _old_path(target)
        remove(old)
        target.rename(old)
        partial.rename(target)
        sync(target.parent)
        remove(old)
    else:
        partial.replace(target)
        sync(target.parent)


def _put_back(target: Path) -> None:
    """Undo the first rename of `_move_into_place` if its second one never came."""
    old = _old_path(target)
    if os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)
        sync(target.parent)


def _old_path(target: Path) -> Path:
    return target.with_name(target.name + _OLD)


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    for folder, _, files in os.walk(path):
        yield from (Path(folder, name) for name in files)


def _sync_tree(path: Path) -> None:
    for file in _files(path):
        sync(file)
    for folder, _, _ in os.walk(path):
        sync(Path(folder))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
