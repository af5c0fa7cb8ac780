"""Expression of cells, and of reference cells that are like them -> how much of the rest kin have in common.

The components of a reference hold what its own cells differ in. What a type that it lacks differs in beside that is not
in them: its cells land among their nearest relatives, and look at home there. It is left over when the expression of
the neighbours is taken off; noise is left over, too, but is another in each cell, and what a batch is off by is left
over in all of its cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from schelix_scale.features.projection import Projection, clip_genes
from schelix_scale.features.streams import Streams
from schelix_scale.genes.sketch import Sketch
from schelix_scale.graph.nearest import nearest_in_blocks
from schelix_scale.graph.vectors import row_blocks, unit_rows

PROFILES = 20_000  # cells of the reference whose expression is held
NEIGHBORS = 30
SIZES, SHARE = (4, 8, 15), 7  # a cell and its kin: the most that are no more than one in seven of a pool
CALM = 10.0  # cells of average spread that say that a batch measures a gene as the reference does
WEIGHED, LEAST = 1_000, 0.1  # cells that weights are measured on; of the mean variance, to which each gene's is raised
WEIGHT = 2.0  # how much what is left over counts, beside how far a cell is
BLOCK = 4_096
TINY = 1e-9


@dataclass(frozen=True)
class Scaling:
    """Log-normalised values of all genes -> those of the genes that a reference uses, capped, in its units.

    Attributes
    ----------
    genes
        (h,) positions among all genes.
    cap_h, scale_h
        Largest value, and what values are divided by.
    """

    genes: np.ndarray
    cap_h: np.ndarray
    scale_h: np.ndarray

    @classmethod
    def of_run(cls, streams: Streams, genes: pd.DataFrame, power: float) -> Scaling:
        """Take the caps of the projections and variances of the table of genes; ``power`` as in `fit_projection`."""
        cap_g = np.full(len(genes), np.inf, np.float32)
        parts: list[Projection] = [streams.anchor, *([] if streams.variant is None else [streams.variant])]
        for part in parts:
            cap_g[part.genes] = part.cap
        used = np.flatnonzero(streams.uses(len(genes)))
        sd_h = np.sqrt(genes["var"].to_numpy()[used])
        return cls(used, cap_g[used], np.where(sd_h > 0, sd_h, 1.0) ** power)

    def __call__(self, x_mg: sparse.csr_matrix) -> sparse.csr_matrix:
        """Return (m, h) CSR float32 of (m, g) values."""
        return self.of_used(x_mg[:, self.genes])

    def of_used(self, x_mh: sparse.csr_matrix) -> sparse.csr_matrix:
        """Return the same of values of the used genes alone, (m, h)."""
        capped = clip_genes(x_mh, self.cap_h)
        return sparse.csr_matrix(capped @ sparse.diags(1 / self.scale_h), dtype=np.float32)


@dataclass(frozen=True)
class Profiles:
    """Cells of a reference with their expression.

    Attributes
    ----------
    batch_p
        (p,) batch codes.
    unit_pa
        (p, a) corrected Anchor components, scaled to norm 1.
    x_ph
        (p, h) CSR float32, see `Scaling`.
    group_p, known_gh
        (p,) groups of cells and (g, h) bool, which genes each group measured; None: all were in all.
    """

    batch_p: np.ndarray
    unit_pa: np.ndarray
    x_ph: sparse.csr_matrix
    group_p: np.ndarray | None = None
    known_gh: np.ndarray | None = None

    @classmethod
    def of_sketch(cls, sketch: Sketch, scaling: Scaling, anchor_na: np.ndarray, seed: int) -> Profiles:
        """Take cells of the sketch, drawn at random where there are many; ``anchor_na`` are corrected components."""
        cells = len(sketch.rows)
        if cells > PROFILES:
            drawn = np.random.default_rng([seed, 0xE59]).choice(cells, PROFILES, replace=False)
            sketch = sketch.of_cells(np.sort(drawn))
        unit, x, known = unit_rows(anchor_na[sketch.rows]), scaling(sketch.x_ng), sketch.measured
        if known is None:
            return cls(sketch.batch_n, unit, x)
        return cls(sketch.batch_n, unit, x, known.group_n, known.measured_pg[:, scaling.genes])

    def around(self, unit_ma: np.ndarray, batch: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Return mean expression (m, h) float32 of the 30 cells nearest to others, and where it is known.

        Parameters
        ----------
        unit_ma
            Corrected Anchor components, scaled to norm 1.
        batch
            That whose cells are left out.

        Returns
        -------
        The means over those in which a gene was measured, and (m, h) bool, which genes were in any; None if all were.
        """
        there = np.arange(len(self.batch_p)) if batch is None else np.flatnonzero(self.batch_p != batch)
        k = min(NEIGHBORS, len(there))
        blocks = ((start, self.unit_pa[there[start:stop]]) for start, stop in row_blocks(len(there), BLOCK))
        near = there[nearest_in_blocks(unit_ma, blocks, k)[0]]
        pick = sparse.csr_matrix(
            (np.ones(near.size, np.float32), near.ravel(), np.arange(0, near.size + 1, k)),
            shape=(len(near), len(self.batch_p)),
        )
        sums = np.asarray((pick @ self.x_ph).toarray())
        if self.group_p is None or self.known_gh is None:
            return sums / np.float32(k), None
        groups = np.arange(len(self.known_gh))
        of_group = (self.group_p[near][:, :, None] == groups).sum(axis=1).astype(np.float32)
        count = of_group @ self.known_gh.astype(np.float32)
        return sums / np.maximum(count, 1), count > 0

    def weight(self) -> np.ndarray:
        """Return what expression of genes is multiplied by, (h,): one over the standard deviation among neighbours."""
        some = np.unique(np.linspace(0, len(self.batch_p) - 1, WEIGHED).astype(np.int64))
        around, known = self.around(self.unit_pa[some])
        left = self.x_ph[some].toarray() - around
        if known is not None and self.group_p is not None and self.known_gh is not None:
            known &= self.known_gh[self.group_p[some]]
            left[~known] = 0.0
        variance = (left.astype(np.float64) ** 2).sum(axis=0)
        variance /= len(some) if known is None else np.maximum(known.sum(axis=0), 1)
        return np.asarray(1 / np.sqrt(variance + LEAST * variance.mean() + TINY))


@dataclass(frozen=True)
class Shared:
    """How much of what is left over kin have in common, against what is usual in a reference.

    Attributes
    ----------
    weight_h
        See `Profiles.weight`.
    usual_z
        (3,) see `usual_common`.
    """

    weight_h: np.ndarray
    usual_z: np.ndarray

    def of_pool(self, common_pz: np.ndarray) -> np.ndarray:
        """Return 2 log(1 + t / u), (p,), of what is in common, t (p, z), and usually is, u; 0 where nothing is.

        The most kin count, the last column; without any all are 0.
        """
        size = common_pz.shape[1] - 1
        if size < 0:
            return np.zeros(len(common_pz))
        return np.asarray(WEIGHT * np.log1p(np.maximum(common_pz[:, size], 0.0) / self.usual_z[size]))


def pool_in_common(
    profiles: Profiles,
    weight_h: np.ndarray,
    own_ph: sparse.csr_matrix,
    known_ph: np.ndarray | None,
    unit_pa: np.ndarray,
    raw_pa: np.ndarray,
    likely_p: np.ndarray,
    batch: int | None = None,
) -> np.ndarray:
    """Return what is left over of cells of one batch and their kin have in common, (p, z).

    Parameters
    ----------
    own_ph
        Their expression, see `Scaling`.
    known_ph
        Which genes were measured in them; None: all.
    unit_pa, raw_pa
        Their Anchor components: corrected, of norm 1; and uncorrected, by which they are kin.
    likely_p
        Which of them are probably not novel.
    batch
        That of the reference whose cells they are, if they are held out.

    Returns
    -------
    One column for each of `SIZES` that is no more than one in seven of the cells: none for less than 28.
    """
    sizes = [size for size in SIZES if size * SHARE <= len(raw_pa)]
    if not sizes:
        return np.zeros((len(raw_pa), 0))
    around, known = profiles.around(unit_pa, batch)
    if known_ph is not None:
        known = known_ph if known is None else known & known_ph
    left = left_over(own_ph.toarray(), around, known, likely_p)
    return in_common(left, weight_h, nearest_kin(unit_rows(raw_pa), max(sizes) - 1), sizes)


def left_over(
    own_ph: np.ndarray, around_ph: np.ndarray, known_ph: np.ndarray | None, likely_p: np.ndarray
) -> np.ndarray:
    """Return what is left of the expression of cells of one batch (p, h) that neighbours and batch do not tell.

    Of each gene, that is what is above the neighbours', less its mean over cells that are probably not novel, and less
    a share of the neighbours': a batch can measure a gene better or worse. Of genes that are not known nothing is left,
    and what is left of the others stands for them.

    Parameters
    ----------
    own_ph, around_ph
        Expression of the cells, and the mean of their neighbours.
    known_ph
        Which genes are known of both; None: all.
    likely_p
        Which cells are probably not novel: a type that is a large part of a batch must not be taken for its mean.
    """
    known = np.ones(1, bool) if known_ph is None else known_ph
    left = (own_ph - around_ph) * known
    left -= _mean(left, known_ph, likely_p) * known
    spread = (around_ph - _mean(around_ph * known, known_ph, slice(None))) * known
    square_h = (spread**2).sum(axis=0)
    mean = square_h.sum() / (left.size if known_ph is None else max(int(known_ph.sum()), 1))
    left -= spread * ((spread * left).sum(axis=0) / (square_h + CALM * mean + TINY))
    left -= _mean(left, known_ph, likely_p) * known
    if known_ph is not None:
        left *= np.sqrt(known_ph.shape[1] / np.maximum(known_ph.sum(axis=1, keepdims=True), 1)).astype(np.float32)
    return np.asarray(left)


def _mean(x_ph: np.ndarray, known_ph: np.ndarray | None, rows: np.ndarray | slice) -> np.ndarray:
    """Mean of genes (h,) over those of the rows in which they are known; elsewhere they are 0."""
    if known_ph is None:
        return np.asarray(x_ph[rows].mean(axis=0))
    return np.asarray(x_ph[rows].sum(axis=0) / np.maximum(known_ph[rows].sum(axis=0), 1).astype(np.float32))


def in_common(left_ph: np.ndarray, weight_h: np.ndarray, kin_pk: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Return how much of what is left over cells have in common with their kin, (p, z).

    That is the mean product of what is left of two different ones of a cell and its kin, summed over genes: of noise it
    is 0 in the mean, however much there is.

    Parameters
    ----------
    kin_pk
        Places of each cell's kin among these cells, nearest first; the cell itself is not its own.
    sizes
        How many cells are taken together, one of them the cell itself.
    """
    weighted = left_ph * weight_h.astype(np.float32)
    product_pp = weighted @ weighted.T
    every = np.c_[np.arange(len(kin_pk)), kin_pk]
    pairs = product_pp[every[:, :, None], every[:, None, :]].astype(np.float64)
    pairs[:, np.arange(every.shape[1]), np.arange(every.shape[1])] = 0.0
    return np.stack([pairs[:, :k, :k].sum(axis=(1, 2)) / (k * (k - 1)) for k in sizes], axis=1)


def usual_common(common: Sequence[np.ndarray]) -> np.ndarray:
    """Return what held-out cells of batches, (p, z) each, usually have in common, for each of `SIZES`: (3,).

    The mean over batches of the median without its sign. Of a size that none is large enough for, that of the next
    smaller one; 1 of none.
    """
    found = np.ones(len(SIZES))
    for size in range(len(SIZES)):
        there = [np.abs(part[:, size]) for part in common if part.shape[1] > size]
        found[size] = max(np.mean([np.median(part) for part in there]), TINY) if there else found[max(size - 1, 0)]
    return found


def nearest_kin(unit_pa: np.ndarray, count: int) -> np.ndarray:
    """Return places (p, count) of the cells that are most like each, but for itself, nearest first."""
    alike = unit_pa @ unit_pa.T
    np.fill_diagonal(alike, -np.inf)
    near = np.argpartition(-alike, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(alike, near, axis=1), axis=1, kind="stable")
    return np.take_along_axis(near, order, axis=1)
