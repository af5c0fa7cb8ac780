"""Made-up cells for the tests of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def made_up(path: Path, n: int = 240, g: int = 60, *, sort_batches: bool = False) -> np.ndarray:
    """Write three cell types in two batches, one gene of four shifted by batch; return the rows in the order written.

    The same cells are written in order of their batches where this is asked for.
    """
    import anndata
    import pandas as pd

    rng = np.random.default_rng(3)
    kinds, batches = rng.integers(0, 3, n), rng.integers(0, 2, n)
    means_ng = rng.gamma(2, 2, (3, g))[kinds] * np.where((np.arange(g) % 4 == 0) & (batches[:, None] == 1), 3.0, 1.0)
    x_ng = rng.poisson(means_ng).astype(np.float32)
    rows = np.argsort(batches, kind="stable") if sort_batches else np.arange(n)
    obs = pd.DataFrame(
        {"batch": batches[rows], "cell_type": [f"type {kind}" for kind in kinds[rows]]}, index=[f"c{i}" for i in rows]
    )
    anndata.AnnData(x_ng[rows], obs=obs).write_h5ad(path)
    return rows
