"""What a search is made from -> a folder that holds a search of just that; what was left of another one is removed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from schelix_scale.errors import GraphError
from schelix_scale.graph.vectors import forget, row_blocks
from schelix_scale.publish import remove, write_json

SEARCH = 9  # raised when searches find something else
LIBRARIES = {
    "exact": ("numpy", "scikit-learn", "scipy"),
    "ivf": ("numpy", "scikit-learn", "scipy"),
    "pynndescent": ("llvmlite", "numba", "numpy", "pynndescent", "scikit-learn", "scipy"),
}
INDEX, FOUND, DONE, SEARCHED = "index", "found", "neighbours.json", "search.json"
MADE = (DONE, f"{FOUND}*", "indices.npy", "distances.npy", "weights.npy", "blended-*.npy", f"{INDEX}.json", INDEX)


def search_version(method: str) -> dict[str, Any]:
    """Return the version of the searches, and those of the libraries that a method uses."""
    return {"search": SEARCH, "libraries": {name: version(name) for name in LIBRARIES[method]}}


def content_hash(features_nd: np.ndarray) -> str:
    """Return the sha256 of (n, d) features: of their shape, type and values.

    Raises
    ------
    GraphError
        A value is not finite.
    """
    digest = hashlib.sha256(f"{features_nd.shape} {features_nd.dtype.str}".encode())
    for start, stop in row_blocks(len(features_nd)):
        block = np.ascontiguousarray(features_nd[start:stop])
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            raise GraphError(f"the features of cell {start + int(np.argmin(finite))} are not finite: check the source.")
        digest.update(block.tobytes())
        forget(features_nd)
    return digest.hexdigest()


def claim(folder: Path, made_from: Mapping[str, Any]) -> None:
    """Make ``folder`` that of the search that is ``made_from`` this: files of a search of anything else are removed."""
    path, wanted = folder / SEARCHED, json.loads(json.dumps(made_from))
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # first: what an interruption leaves is not taken for a whole one
    for pattern in MADE:
        for left in folder.glob(pattern):
            remove(left)
    write_json(path, wanted)
