"""Real features of some cells -> an .npy of any number of rows whose neighbourhoods are like theirs, block by block.

The constants were chosen on features of a run of 1,000,000 cells (30 dimensions). The median distance to neighbour 30
(of unit rows) and the local dimension (maximum likelihood, Levina & Bickel 2004) were .272 and 14.5 among 50,000 of
these and .225 and 18.3 among all; among 50,000 and 1,000,000 rows that are made of them, .259 and 15.0, and .219 and
19.3.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SOURCE_ROWS = 100_000  # of the real features: their neighbours are found exactly
NEAR = 8
SPREAD = 0.5  # concentration of the weights: below 1 a new row stays nearer to one real row than to the middle of all
NOISE = 0.85  # standard deviation of the noise's length, in distances to the nearest real neighbour
BLOCK = 1 << 16


@dataclass(frozen=True)
class Source:
    """Real rows (s, d), their nearest rows by cosine, themselves first (s, 1 + m), and each one's noise (s,)."""

    rows_sd: np.ndarray
    near_sm: np.ndarray
    noise_s: np.ndarray


def source_of(like_nd: np.ndarray, seed: int) -> Source:
    """Choose real rows at random and find their neighbours among each other.

    Raises
    ------
    ValueError
        They are too few.
    """
    from sklearn.neighbors import NearestNeighbors

    if like_nd.ndim != 2 or len(like_nd) <= NEAR:
        raise ValueError(f"real features are a matrix of more than {NEAR} cells, got shape {like_nd.shape}.")
    chosen = np.random.default_rng([seed, 1]).choice(len(like_nd), min(len(like_nd), SOURCE_ROWS), replace=False)
    rows = np.asarray(like_nd[np.sort(chosen)], np.float32)
    unit = unit_rows(rows)
    distances, near = NearestNeighbors(n_neighbors=1 + NEAR, algorithm="brute").fit(unit).kneighbors(unit)
    near[:, 0] = np.arange(len(rows))
    lengths = distances[:, 1] * np.linalg.norm(rows, axis=1)  # from the unit sphere back to the rows' own
    return Source(rows, near, (NOISE * lengths / np.sqrt(rows.shape[1])).astype(np.float32))


def blocks(source: Source, n: int, seed: int) -> Iterator[np.ndarray]:
    """Yield n rows in blocks, float32; the first rows are the same whatever n is.

    Each is a real row drawn with replacement, moved to a random convex combination of it and its neighbours
    (Dirichlet), and disturbed by Gaussian noise.
    """
    members, d = source.near_sm.shape[1], source.rows_sd.shape[1]
    for number, start in enumerate(range(0, n, BLOCK)):
        rng = np.random.default_rng([seed, 2, number])
        drawn = rng.integers(len(source.rows_sd), size=BLOCK)
        weights = rng.standard_gamma(SPREAD, (BLOCK, members)).astype(np.float32)
        weights /= weights.sum(axis=1, keepdims=True)
        found = rng.standard_normal((BLOCK, d), dtype=np.float32) * source.noise_s[drawn, None]
        for member in range(members):
            found += weights[:, member, None] * source.rows_sd[source.near_sm[drawn, member]]
        yield found[: n - start]


def write_features(like: Path, n: int, seed: int, folder: Path) -> Path:
    """Write n rows like those of ``like`` to ``folder``, unless they are there; return the file.

    Its name has the checksum of ``like`` and all that the rows depend on.
    """
    recipe = {"like": _checksum(like), "seed": seed, "parts": [SOURCE_ROWS, NEAR, SPREAD, NOISE, BLOCK]}
    name = f"features-{zlib.crc32(json.dumps(recipe).encode()):08x}-{n}.npy"
    path = folder / name
    if path.exists():
        return path
    source = source_of(np.load(like, mmap_mode="r"), seed)
    partial = folder / f"partial-{name}"
    shape = (n, source.rows_sd.shape[1])
    result = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
    start = 0
    for block in blocks(source, n, seed):
        result[start : start + len(block)] = block
        start += len(block)
    result.flush()
    del result
    partial.replace(path)
    return path


def unit_rows(rows_nd: np.ndarray) -> np.ndarray:
    """Scale rows to norm 1 in their own type; rows of zeros stay zero."""
    return rows_nd / np.maximum(np.linalg.norm(rows_nd, axis=1, keepdims=True), 1e-12)


def _checksum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            found = zlib.crc32(part, found)
    return found
