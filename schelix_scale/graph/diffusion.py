"""Operator and features -> multi-scale diffused features on disk, block by block (METHOD section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from schelix_scale.arrays import create_array
from schelix_scale.graph.operator import Operator
from schelix_scale.graph.vectors import forget, positions_of, row_blocks
from schelix_scale.scheduling import run_tasks


def diffuse(
    operator: Operator,
    features_nd: np.ndarray,
    hops: Sequence[int],
    restart: float,
    out: Path,
    advance: Callable[[int], None] = lambda _: None,
    workers: int = 1,
    order: np.ndarray | None = None,
) -> None:
    """Write F^(t) for t in ``hops`` to ``out``, an .npy of shape (n, len(hops), d) float32.

    F^(t+1) = (1 - restart) P F^(t) + restart F^(0). Row-major with the hops of a cell side by side, since
    training reads cells at random. Only two (n, d) arrays are kept, as memory maps beside ``out``; blocks of rows are
    computed on ``workers`` threads, and what they read is let go of.

    ``order`` (n,) are all row numbers in an order in which neighbours are near each other, as `lists.CellIndex` has:
    rows are computed, and kept meanwhile, in it, so that a block reads few pages.
    """
    n, d = features_nd.shape
    place = None if order is None else positions_of(order)
    hops = sorted(hops)
    result = create_array(out, (n, len(hops), d), np.float32)
    scratch = [out.with_name(f"{out.name}.scratch{i}") for i in (0, 1)]
    blocks = list(row_blocks(n))
    try:
        maps = [create_array(path, (n, d), np.float32) for path in scratch]

        def step(current: np.ndarray, hop: int) -> np.ndarray:
            target, source = maps[hop % 2], np.asarray(current)

            def rows(span: tuple[int, int]) -> int:
                start, stop = span
                cells = slice(start, stop) if order is None else order[start:stop]
                moved = (1 - restart) * (operator.block(cells, place) @ source)
                moved += restart * np.asarray(features_nd[cells], np.float32)
                target[start:stop] = moved
                if hop in hops:
                    result[cells, hops.index(hop)] = moved
                forget(operator.indices_nk, operator.weights_nk, result)
                return stop - start

            run_tasks(rows, blocks, workers, advance=advance)
            forget(current, target, features_nd)
            return target

        if 0 in hops:
            for start, stop in blocks:
                result[start:stop, hops.index(0)] = features_nd[start:stop]
                forget(result, features_nd)
        current = features_nd
        if order is not None:
            current = maps[0]
            for start, stop in blocks:
                current[start:stop] = features_nd[order[start:stop]]
                forget(current, features_nd)
        for hop in range(1, max(hops) + 1):
            current = step(current, hop)
        result.flush()
    finally:
        for path in scratch:
            path.unlink(missing_ok=True)
