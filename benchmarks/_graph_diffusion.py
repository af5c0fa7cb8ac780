"""Diffusion of two streams over a found graph: schelix from memory maps against SciPy in memory, results compared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from _graph_run import run_task
from _graph_scores import others
from _watch import CommandFailed

HOPS, RESTART = [0, 1, 3], 0.3
BLOCK = 100_000
CLOSE = 1e-4  # of the largest value, in float32


def measure_diffusion(features: Path, graph: Path, scratch: Path, base: dict[str, Any]) -> list[dict[str, Any]]:
    """Diffuse ``features`` and as many random columns over the neighbours in ``graph``, ours first; return two rows.

    Raises
    ------
    CommandFailed
        There is no graph, a process failed, or the results differ.
    """
    if not graph.exists():
        raise CommandFailed(f"there is no {graph.name} in {graph.parent}; name a search before diffusion in --methods")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        files = write_operator(graph, base["k"], scratch, base["seed"])
        streams = [str(features), str(random_stream(features, scratch, base["seed"]))]
        task = {**files, "streams": streams, "hops": HOPS, "restart": RESTART, "threads": base["threads"]}
        task["order"] = str(order_of(graph)) if order_of(graph).exists() else None
        ours, our_cost = run_task("diffuse-schelix", task, scratch / "schelix")
        theirs, their_cost = run_task("diffuse-scipy", task, scratch / "scipy")
        difference = largest_difference(ours["diffused"], theirs["diffused"])
    finally:
        shutil.rmtree(scratch)
    if difference > CLOSE:
        raise CommandFailed(f"the diffused features differ by {difference:.1e} of the largest value")
    settings = {"columns": 2 * base["dims"], "hops": HOPS, "restart": RESTART}
    row = {"what": "diffusion", **base, "search": None, "budget": None, "settings": settings}
    return [
        {**row, "method": "schelix", **our_cost, "difference": difference},
        {**row, "method": "scipy in memory", **their_cost},
    ]


def order_of(graph: Path) -> Path:
    """Return the file of the order of cells that a search of schelix has found with a graph, as a run keeps it."""
    return graph.with_name(f"order-{graph.name}")


def write_operator(graph: Path, k: int, scratch: Path, seed: int) -> dict[str, str]:
    """Write the neighbours as int32 and random weights, whose rows sum to 1: times do not depend on their values."""
    found_nk, rng = np.load(graph, mmap_mode="r"), np.random.default_rng([seed, 4])
    n = len(found_nk)
    files = {name: str(scratch / f"{name}.npy") for name in ("indices", "weights")}
    indices, weights = (
        np.lib.format.open_memmap(files[name], mode="w+", dtype=dtype, shape=(n, k))
        for name, dtype in (("indices", np.int32), ("weights", np.float32))
    )
    for start in range(0, n, BLOCK):
        rows = np.arange(start, min(start + BLOCK, n))
        near = others(np.asarray(found_nk[rows]), rows, k)
        indices[rows] = np.where(near < 0, rows[:, None], near)
        drawn = rng.random((len(rows), k), dtype=np.float32) + np.float32(0.01)
        weights[rows] = drawn / drawn.sum(axis=1, keepdims=True)
    for array in (indices, weights):
        array.flush()
    return files


def random_stream(features: Path, scratch: Path, seed: int) -> Path:
    """Write random columns of the shape of the features; return the file."""
    shape, rng = np.load(features, mmap_mode="r").shape, np.random.default_rng([seed, 5])
    path = scratch / "second.npy"
    result = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, shape[0], BLOCK):
        block = result[start : start + BLOCK]
        block[:] = rng.standard_normal(block.shape, dtype=np.float32)
    result.flush()
    return path


def largest_difference(ours: list[str], theirs: list[str]) -> float:
    """Return the largest difference over the largest value: (n, hops, d) a stream against (n, streams x d) a hop."""
    streams, hops = ([np.load(file, mmap_mode="r") for file in files] for files in (ours, theirs))
    differences, values = [0.0], [1e-12]
    for start in range(0, len(hops[0]), BLOCK):
        for number, hop in enumerate(hops):
            ours_md = np.hstack([np.asarray(stream[start : start + BLOCK, number]) for stream in streams])
            theirs_md = np.asarray(hop[start : start + BLOCK])
            differences.append(float(np.abs(ours_md - theirs_md).max()))
            values.append(float(np.abs(theirs_md).max()))
    return max(differences) / max(values)
