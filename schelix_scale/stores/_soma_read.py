"""Values of a SOMA matrix: joinids of cells and genes come in, CSR rows go out, in few ranges and bounded pieces."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from schelix_scale.stores._rows import ranges, to_float32
from schelix_scale.stores._soma import Address, open_array, soma_errors

# Unasked cells between two asked ones that are read along, because another range would cost more than they do.
BRIDGE = 16
# Joinids that span less are found by a table, others by bisection.
_TABLE = 1 << 22


def read_matrix(address: Address, cell_ids: np.ndarray, gene_ids: np.ndarray) -> sparse.csr_matrix:
    """Read the values of ascending joinids (m,) of cells and (h,) of genes, (m, h) float32.

    Raises
    ------
    StoreError
        TileDB cannot read them.
    """
    row_of, column_of = _Finder(cell_ids), _Finder(gene_ids)
    coords = (_near(cell_ids), slice(int(gene_ids[0]), int(gene_ids[-1])))
    matrix = open_array(address, "SparseNDArray", address.matrix)
    pieces = [(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))]
    with soma_errors(address.source):
        for table in matrix.read(coords).tables():
            i, j = row_of.find(table["soma_dim_0"].to_numpy()), column_of.find(table["soma_dim_1"].to_numpy())
            values, asked = table["soma_data"].to_numpy(), (i >= 0) & (j >= 0)
            if not asked.all():
                i, j, values = i[asked], j[asked], values[asked]
            pieces.append((i, j, to_float32(values)))
    i, j, values = (np.concatenate(part) for part in zip(*pieces, strict=True))
    return sparse.csr_matrix((values, (i, j)), shape=(cell_ids.size, gene_ids.size))


class _Finder:
    """Finds the position of joinids among ascending ones; -1 for those that are not there."""

    def __init__(self, ids: np.ndarray) -> None:
        self._ids, self._first = ids, int(ids[0])
        self._table: np.ndarray | None = None
        if ids[-1] - ids[0] < _TABLE:
            self._table = np.full(int(ids[-1]) - self._first + 1, -1, np.int32)
            self._table[ids - self._first] = np.arange(ids.size)

    def find(self, found: np.ndarray) -> np.ndarray:
        """Return (m,) int32 positions of (m,) joinids between the first and the last."""
        if self._table is not None:
            table: np.ndarray = self._table[found - self._first]
            return table
        place = np.searchsorted(self._ids, found).astype(np.int32)
        return np.where(self._ids[place] == found, place, np.int32(-1))


def _near(ids: np.ndarray) -> slice | np.ndarray:
    """Return joinids to read for the ascending ``ids``: small gaps are filled, one range is a slice."""
    after = np.flatnonzero(np.diff(ids) > BRIDGE + 1)
    starts, stops = ids[np.r_[0, after + 1]], ids[np.r_[after, ids.size - 1]] + 1
    if starts.size == 1:
        return slice(int(starts[0]), int(stops[0]) - 1)
    return ranges(starts, stops - starts)
