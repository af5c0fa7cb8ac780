"""Operator and features -> multi-scale diffused features on disk, block by block (METHOD section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from schelix_scale.graph.operator import Operator
from schelix_scale.graph.vectors import row_blocks
from schelix_scale.publish import create_array


def diffuse(
    operator: Operator,
    features_nd: np.ndarray,
    hops: Sequence[int],
    restart: float,
    out: Path,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write F^(t) for t in ``hops`` to ``out``, an .npy of shape (n, len(hops), d) float32.

    F^(t+1) = (1 - restart) P F^(t) + restart F^(0). Row-major with the hops of a cell side by side, since
    training reads cells at random. Only two (n, d) arrays are kept, as memory maps beside ``out``.
    """
    n, d = features_nd.shape
    hops = sorted(hops)
    result = create_array(out, (n, len(hops), d), np.float32)
    scratch = [out.with_name(f"{out.name}.scratch{i}") for i in (0, 1)]
    try:
        maps = [create_array(path, (n, d), np.float32) for path in scratch]
        current = features_nd
        for hop in range(max(hops) + 1):
            if hop:
                target = maps[hop % 2]
                _step(operator, current, features_nd, restart, target, advance)
                current = target
            if hop in hops:
                for start, stop in row_blocks(n):
                    result[start:stop, hops.index(hop)] = current[start:stop]
        result.flush()
    finally:
        for path in scratch:
            path.unlink(missing_ok=True)


def _step(
    operator: Operator,
    current: np.ndarray,
    origin: np.ndarray,
    restart: float,
    target: np.ndarray,
    advance: Callable[[int], None],
) -> None:
    source = np.asarray(current)
    for start, stop in row_blocks(operator.n_cells):
        target[start:stop] = (1 - restart) * (operator.block(start, stop) @ source) + restart * np.asarray(
            origin[start:stop], np.float32
        )
        advance(stop - start)
