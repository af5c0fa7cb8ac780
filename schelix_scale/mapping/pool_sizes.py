"""How many cells batches have -> among how many their cells have kin, and the sizes that novelty is calibrated for.

Among more cells there are some that are more alike, by chance and because a rare type has enough of them. So a new
batch is told by pools of held-out cells that are about as large as its own: novelty is calibrated for the usual size of
a held-out batch, a half of that, a quarter, and so on, and last for cells that are looked at alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from schelix_scale.mapping.kin import ALONE

POOL = 2_000  # cells, at most


def pool_sizes(count_b: Sequence[int], most: int = POOL) -> tuple[int, ...]:
    """Return the sizes of pools, falling; the last is less than 20, and stands for cells that are looked at alone.

    Parameters
    ----------
    count_b
        Held-out cells of each batch: at least half of the batches have the largest pool.
    most
        Cells of a pool.
    """
    ordered = sorted(count_b)
    size = min(most, int(ordered[len(ordered) // 2]))
    sizes: list[int] = []
    while size >= ALONE:
        sizes.append(size)
        size //= 2
    return (*sizes, ALONE - 1)


def nearest_size(sizes: Sequence[int], cells: int) -> int:
    """Return the size that a pool of so many cells is nearest to, as a multiple."""
    if cells < ALONE or len(sizes) == 1:
        return sizes[-1]
    return sizes[int(np.argmin(np.abs(np.log(np.array(sizes[:-1]) / cells))))]


def parts(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Split a range into parts that are about as large as a size, two thirds to one and a half times; at least one."""
    count = max(1, round((stop - start) / size))
    edges = start + (np.arange(count + 1) * (stop - start)) // count
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
