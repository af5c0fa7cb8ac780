"""Several paths or addresses: what a pattern matches, in a natural order, and a short name for each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from schelix_scale.errors import StoreError

_SUFFIXES = frozenset({".h5ad", ".h5", ".hdf5", ".zarr", ".soma", ".tiledb"})


def natural_key(text: str) -> tuple[list[str | int], str]:
    """Return a sorting key by which donor2 comes before donor10."""
    parts = re.split(r"(\d+)", text)
    return [int(part) if i % 2 else part.casefold() for i, part in enumerate(parts)], text


def labels_of(addresses: Sequence[str]) -> tuple[str, ...]:
    """Return a short name for each of several different files: the stem, with as many folders as tell them apart."""
    paths = [PurePosixPath(address.rstrip("/")) for address in addresses]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        for bare in (True, False):
            tails = ["/".join((*path.parts[-depth:-1], _stem(path) if bare else path.name)) for path in paths]
            if len(set(tails)) == len(tails):
                return tuple(tails)
    return tuple(addresses)


def matches(pattern: str) -> list[str]:
    """Return the paths that a pattern matches, sorted naturally.

    Raises
    ------
    StoreError
        It matches nothing, or is one of remote addresses.
    """
    pattern = local_path(pattern)
    if "://" in pattern:
        raise StoreError(f"{pattern} is a pattern of remote addresses; patterns match local files. List the addresses.")
    path = Path(pattern).expanduser()
    fixed = path
    while any(mark in str(fixed) for mark in "*?["):
        fixed = fixed.parent
    if not fixed.is_dir():
        raise StoreError(f"The pattern {pattern} matches nothing: there is no directory {fixed}. Check the path.")
    matched = (str(found) for found in fixed.glob(str(path.relative_to(fixed))) if not found.name.startswith("."))
    if found := sorted(matched, key=natural_key):
        return found
    some = sorted((entry.name for entry in fixed.iterdir()), key=natural_key)[:3]
    held = f"holds {', '.join(some)}" if some else "is empty"
    raise StoreError(f"The pattern {pattern} matches nothing; {fixed} {held}. Check it, and quote it in the shell.")


def local_path(address: str) -> str:
    """Return the path that a ``file://`` address names, and any other text as it is."""
    return address.removeprefix("file://")


def absolute(address: str) -> str:
    """Return one spelling of an address: the absolute path, links followed, of what is on this disk.

    Any other address is returned without slashes at its end.
    """
    path = Path(local_path(address)).expanduser()
    return str(path.resolve()) if path.exists() else address.rstrip("/")


def _stem(path: PurePosixPath) -> str:
    return path.stem if path.suffix.lower() in _SUFFIXES and path.stem else path.name
