"""How many cells batches have -> among how many their cells have kin, and the sizes that novelty is calibrated for.

Among more cells there are some that are more alike, by chance and because a rare type has enough of them. So a new
batch is told by pools of held-out cells that are about as large as its own: novelty is calibrated for the usual size of
a held-out batch and for smaller ones, each twice the next; for few cells, of which expression does not count, in new
batches and held-out ones; and for cells that are looked at alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from schelix_scale.mapping.kin import ALONE

POOL = 2_000  # cells, at most
EXPRESSED = 40  # cells of a pool from which on expression counts
FEW, SMALLEST, STEP = 30, 60, 2  # sizes below and above that; how much larger the next is
APART = 1.4  # how much larger the usual size of a batch is than the size below it, at least
TINY, BATCHES = 100, 3  # cells of batches that are not asked how large they usually are, where there are so many others
POOLS_SHARE = 0.25  # of the memory budget, for all pools that are worked on at once


def pool_sizes(count_b: Sequence[int], most: int = POOL) -> tuple[int, ...]:
    """Return the sizes of pools, falling; the last is less than 20, and stands for cells that are looked at alone.

    Parameters
    ----------
    count_b
        Held-out cells of each batch: at least half of those that are not tiny have the largest pool.
    most
        Cells of a pool.
    """
    large = [count for count in count_b if count >= TINY]
    ordered = sorted(large if len(large) >= BATCHES else count_b)
    usual = min(most, int(ordered[len(ordered) // 2])) if ordered else 0
    sizes = [ALONE - 1]
    if usual >= ALONE:
        sizes.append(min(FEW, usual))
    if usual >= EXPRESSED:
        size = SMALLEST
        while size * APART < usual:
            sizes.append(size)
            size *= STEP
        sizes.append(usual)
    return tuple(reversed(sizes))


def nearest_size(sizes: Sequence[int], cells: int) -> int:
    """Return the size that a pool of so many cells is nearest to, as a multiple: expression counts in both or none."""
    if cells < ALONE or len(sizes) == 1:
        return sizes[-1]
    alike = [size for size in sizes[:-1] if (size >= EXPRESSED) == (cells >= EXPRESSED)] or sizes[:-1]
    return min(alike, key=lambda size: abs(np.log(size / cells)))


def workers(budget: int, cells: int, genes: int, threads: int) -> int:
    """Return how many pools of so many cells and genes are worked on at once in a memory budget, in bytes."""
    each = 8 * cells * (5 * cells + 2 * genes)
    return int(np.clip(POOLS_SHARE * budget / max(each, 1), 1, threads))


def parts(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Split a range into parts that are about as large as a size, two thirds to one and a half times; at least one."""
    count = max(1, round((stop - start) / size))
    edges = start + (np.arange(count + 1) * (stop - start)) // count
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))
