"""The store of a query -> values of its cells as the reference has them, of the genes that it uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from schelix_scale.mapping.genes import GeneMatch, match_genes, reference_values, shared_target, shared_totals
from schelix_scale.mapping.reference import Frozen
from schelix_scale.stores.base import CellStore, Measured

if TYPE_CHECKING:
    from schelix_scale.mapping.query import Query


@dataclass(frozen=True)
class Matched:
    """Genes of cells that measured the same ones.

    Attributes
    ----------
    match
        Which genes of the reference they are.
    target
        What cells' totals over these become, see `genes.shared_target`.
    """

    match: GeneMatch
    target: float

    def values(self, x_mq: sparse.csr_matrix, kind: str) -> tuple[sparse.csr_matrix, np.ndarray]:
        """Return the reference's values (m, g) of the genes that it uses, and totals (m,) over all that it has."""
        total_m = shared_totals(x_mq, self.match)
        return reference_values(x_mq, self.match, kind, self.target, total_m), total_m


def matched(store: CellStore, frozen: Frozen, gene_key: str | None, measured: Measured | None) -> list[Matched]:
    """Match a query's genes to the reference's, for each group of cells that measured the same ones (None: all)."""
    genes = frozen.genes
    used_g = frozen.streams.uses(len(genes))
    match = match_genes(store, genes, used_g, gene_key)
    matches = [match]
    if measured is not None:
        matches = [
            GeneMatch(np.where((match.place_g >= 0) & there_g[match.place_g], match.place_g, -1), used_g, match.by)
            for there_g in measured.measured_pg
        ]
    mean_g, variance_g = genes["mean"].to_numpy(), genes["var"].to_numpy()
    return [Matched(one, shared_target(one, mean_g, variance_g)) for one in matches]


def of_groups(query: Query, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each group of cells that measured the same genes, and the places of its cells in ``rows``."""
    if query.measured is None:
        yield 0, np.arange(len(rows))
        return
    group_m = query.measured.group_n[rows]
    for group in np.unique(group_m).tolist():
        yield group, np.flatnonzero(group_m == group)


def read_values(
    query: Query, groups: Sequence[Matched], rows: np.ndarray, kind: str
) -> Iterator[tuple[np.ndarray, sparse.csr_matrix, np.ndarray]]:
    """Read cells; yield those of each group: places in ``rows``, values (m, g), and which genes are known (g,)."""
    x_mq = query.store.read(rows)
    for group, chosen in of_groups(query, rows):
        x_mg, _ = groups[group].values(x_mq if len(chosen) == len(rows) else x_mq[chosen], kind)
        yield chosen, x_mg, groups[group].match.place_g >= 0
