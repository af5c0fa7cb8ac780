"""Expression of cells, read from the store -> what the first layers of the streams make of it: hop 0 of their inputs.

With frozen loadings these are the numbers that the cache holds. With learned ones (`Loadings`) the values that the
layers multiply come along.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from schelix_scale.features.projection import Projection, clip_genes
from schelix_scale.features.streams import Streams
from schelix_scale.genes.normalize import log_normalize
from schelix_scale.stores.base import CellStore
from schelix_scale.training.loader import Mine, Shuffle, StreamLoader

if TYPE_CHECKING:
    from schelix_scale.stores.values import ValueKind


@dataclass(frozen=True)
class Expressed:
    """Hop 0 of m cells, from their expression.

    Attributes
    ----------
    anchor, variant
        (m, a) and (m, v) float32: projected and corrected.
    anchor_values, variant_values
        (m, h) CSR values that the loadings multiply, for learned ones; None where they are frozen or there is no
        such stream.
    """

    anchor: np.ndarray
    variant: np.ndarray
    anchor_values: sparse.csr_matrix | None = None
    variant_values: sparse.csr_matrix | None = None


@dataclass(frozen=True)
class Expression:
    """Where expression is read, and the first layers.

    Attributes
    ----------
    store, values
        The cells, and what their values are.
    streams
        Projections and correction.
    batch_n, group_n
        (n,) batch codes; (n,) groups that say what was measured, or None.
    shuffle
        Blocks and buffers of the loader.
    learned
        Whether the loadings are learned.
    """

    store: CellStore
    values: ValueKind
    streams: Streams
    batch_n: np.ndarray
    group_n: np.ndarray | None
    shuffle: Shuffle
    learned: bool

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(h, d) of the loadings of the Anchors and of the Variants, (0, 0) if there are none."""
        variant = self.streams.variant
        h, d = (0, 0) if variant is None else variant.loadings_hd.shape
        h_anchor, d_anchor = self.streams.anchor.loadings_hd.shape
        return (h_anchor, d_anchor), (h, d)

    def steps(
        self, rows: np.ndarray, batch_size: int, seed: tuple[int, ...], first: int, stop: int, mine: Mine | None = None
    ) -> Generator[tuple[np.ndarray, Expressed], None, None]:
        """Yield rows and hop 0 of the steps ``first:stop`` of a block-shuffled pass over ``rows`` (r,), ascending.

        ``mine`` says which of a step's rows are read, as positions in them; all by default.
        """
        loader = StreamLoader(self.store, rows, batch_size=batch_size, seed=seed, shuffle=self.shuffle)
        with closing(loader.steps(first, stop, mine)) as minibatches:
            for found, x_ng in minibatches:
                yield found, self.encode(x_ng, found)

    def read(self, rows: np.ndarray) -> Expressed:
        """Read cells (m,) and return their hop 0, a buffer at a time."""
        pieces = [rows[i : i + self.shuffle.buffer] for i in range(0, max(1, len(rows)), self.shuffle.buffer)]
        parts = [self.encode(self.store.read(piece), piece) for piece in pieces]
        return Expressed(
            np.concatenate([part.anchor for part in parts]),
            np.concatenate([part.variant for part in parts]),
            _stack([part.anchor_values for part in parts]),
            _stack([part.variant_values for part in parts]),
        )

    def encode(self, x_ng: sparse.csr_matrix, rows: np.ndarray) -> Expressed:
        """Turn the stored values (m, g) of cells into hop 0."""
        log_ng, groups = log_normalize(x_ng, self.values), None if self.group_n is None else self.group_n[rows]
        found = self.streams.encode(log_ng, self.batch_n[rows], groups)
        if not self.learned:
            return Expressed(found.anchor_corrected, found.variant)
        anchor, variant = (_clipped(log_ng, part) for part in (self.streams.anchor, self.streams.variant))
        return Expressed(found.anchor_corrected, found.variant, anchor, variant)


def _clipped(log_ng: sparse.csr_matrix, projection: Projection | None) -> sparse.csr_matrix | None:
    return None if projection is None else clip_genes(log_ng[:, projection.genes], projection.cap)


def _stack(parts: list[sparse.csr_matrix | None]) -> sparse.csr_matrix | None:
    there = [part for part in parts if part is not None]
    return sparse.csr_matrix(sparse.vstack(there)) if there else None
