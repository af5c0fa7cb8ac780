"""The first cells of an atlas, stored again as zarr, h5ad and SOMA, so that all loaders read the same cells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from _atlas import Block
from _atlas_write import FORMATS, write_cells

BLOCK = 8_192


def copies(atlas: Path, cells: int | None, folder: Path) -> dict[str, Path]:
    """Write ``folder/NAME-N.zarr``, ``.h5ad`` and ``.soma`` of the first N cells (all by default); keep what is there.

    They hold values and names, no obs columns.

    Returns
    -------
    Paths by format.
    """
    from schelix_scale.stores import open_store

    store = open_store(atlas)
    n = store.n_cells if cells is None else min(cells, store.n_cells)

    def blocks() -> Iterator[Block]:
        for start in range(0, n, BLOCK):
            yield Block(start, store.read(np.arange(start, min(start + BLOCK, n))))

    folder.mkdir(parents=True, exist_ok=True)
    found = {suffix.removeprefix("."): folder / f"{atlas.stem}-{n}{suffix}" for suffix in FORMATS}
    for path in found.values():
        if not path.exists():
            names = pd.DataFrame(index=store.cell_names[:n]), pd.DataFrame(index=store.gene_names)
            write_cells(blocks(), *names, path, {})
    return found
