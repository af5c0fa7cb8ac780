"""The sketch of a run -> cells of the reference with their expression, and the mean of those around any cell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import sparse

from schelix_scale.features.projection import Projection, clip_genes
from schelix_scale.features.streams import Streams
from schelix_scale.genes.sketch import Sketch
from schelix_scale.graph.nearest import nearest_among
from schelix_scale.graph.vectors import row_blocks, unit_rows

CELLS = 20_000  # of the reference whose expression is held
NEIGHBORS = 30
TAKEN = 48  # cells whose neighbours' expression is copied at once: the cache holds it
WEIGHED, LEAST = 1_000, 0.1  # cells that weights are measured on; of the mean variance, to which each gene's is raised
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
class Around:
    """Reference cells around others.

    Attributes
    ----------
    mean_mh
        (m, h) float32 mean expression, of each gene over the cells in which it was measured.
    known_mh
        (m, h) bool: which genes were measured in any; None if all were.
    batch_mk
        (m, 30) their batches.
    """

    mean_mh: np.ndarray
    known_mh: np.ndarray | None
    batch_mk: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> Around:
        """Return those around some of the cells."""
        known = None if self.known_mh is None else self.known_mh[chosen]
        return Around(self.mean_mh[chosen], known, self.batch_mk[chosen])


@dataclass(frozen=True)
class Profiles:
    """Cells of a reference with their expression.

    Attributes
    ----------
    rows, batch_p
        (p,) which cells of the reference they are, and their batches.
    unit_pa
        (p, a) corrected Anchor components, scaled to norm 1.
    x_ph
        (p, h) CSR float32, see `Scaling`.
    weight_h
        (h,) what is left over of genes is multiplied by: one over the standard deviation among neighbours.
    batch_s, around_sk
        Of some of the cells: their batch, and of which batches the cells around them are, see `Around`.
    group_p, known_gh
        (p,) groups of cells and (g, h) bool, which genes each group measured; None: all were in all.
    """

    rows: np.ndarray
    batch_p: np.ndarray
    unit_pa: np.ndarray
    x_ph: sparse.csr_matrix
    weight_h: np.ndarray
    batch_s: np.ndarray
    around_sk: np.ndarray
    group_p: np.ndarray | None = None
    known_gh: np.ndarray | None = None

    @classmethod
    def of_sketch(cls, sketch: Sketch, scaling: Scaling, anchor_na: np.ndarray, seed: int) -> Profiles:
        """Take cells of the sketch, drawn at random where there are many; ``anchor_na`` are corrected components."""
        cells = len(sketch.rows)
        if cells > CELLS:
            drawn = np.random.default_rng([seed, 0xE59]).choice(cells, CELLS, replace=False)
            sketch = sketch.of_cells(np.sort(drawn))
        unit, x, known = unit_rows(anchor_na[sketch.rows]), scaling(sketch.x_ng), sketch.measured
        found = cls(sketch.rows, sketch.batch_n, unit, x, np.ones(x.shape[1]), np.zeros(0, int), np.zeros((0, 0), int))
        if known is not None:
            found = replace(found, group_p=known.group_n, known_gh=known.measured_pg[:, scaling.genes])
        return found._weighed()

    def around(self, unit_ma: np.ndarray, batch: int | None = None) -> Around:
        """Return what the 30 cells nearest to others are.

        Parameters
        ----------
        unit_ma
            Corrected Anchor components, scaled to norm 1.
        batch
            That whose cells are left out.
        """
        there = np.arange(len(self.batch_p)) if batch is None else np.flatnonzero(self.batch_p != batch)
        k = min(NEIGHBORS, len(there))
        near = there[nearest_among(unit_ma, self.unit_pa, there, k)[0]]
        sums = self._sums(near)
        batches = self.batch_p[near]
        if self.group_p is None or self.known_gh is None:
            return Around(sums / np.float32(k), None, batches)
        of_group = counts(self.group_p[near], len(self.known_gh)).astype(np.float32)
        count = of_group @ self.known_gh.astype(np.float32)
        return Around(sums / np.maximum(count, 1), count > 0, batches)

    def mixed(self, around: Around, batch: int | None = None) -> np.ndarray:
        """Return how far cells around others are of several batches, (m,): from 0, of one, to 1, as is usual.

        Of how many batches they are is one over the chance that two of them are of the same. If a batch is left out,
        what is usual is what would be without its cells. Where the reference's own are always of one, 1.
        """
        usual = self._usual if batch is None else _usual(self.around_sk[self.batch_s != batch], batch)
        if usual < TINY:
            return np.ones(len(around.batch_mk))
        found = 1 / np.maximum(np.nan_to_num(same(around.batch_mk), nan=1.0), TINY) - 1
        return np.asarray(np.clip(found / usual, 0.0, 1.0))

    def _sums(self, near_mk: np.ndarray) -> np.ndarray:
        """Return summed expression of cells, (m, h): their rows side by side are one row, of which genes are summed."""
        k, out = near_mk.shape[1], np.empty((len(near_mk), self.x_ph.shape[1]), np.float32)
        for start, stop in row_blocks(len(near_mk), TAKEN):
            rows = self.x_ph[near_mk[start:stop].ravel()]
            shape = stop - start, self.x_ph.shape[1]
            out[start:stop] = sparse.csr_matrix((rows.data, rows.indices, rows.indptr[::k]), shape=shape).toarray()
        return out

    @cached_property
    def _usual(self) -> float:
        return _usual(self.around_sk)

    def _weighed(self) -> Profiles:
        """Return the same with what is measured on some of the cells: weights of genes, and batches around."""
        some = np.unique(np.linspace(0, len(self.batch_p) - 1, WEIGHED).astype(np.int64))
        around = self.around(self.unit_pa[some])
        left, known = self.x_ph[some].toarray() - around.mean_mh, around.known_mh
        if known is not None and self.group_p is not None and self.known_gh is not None:
            known = known & self.known_gh[self.group_p[some]]
            left[~known] = 0.0
        variance = (left.astype(np.float64) ** 2).sum(axis=0)
        variance /= len(some) if known is None else np.maximum(known.sum(axis=0), 1)
        weight = 1 / np.sqrt(variance + LEAST * variance.mean() + TINY)
        return replace(self, weight_h=np.asarray(weight), batch_s=self.batch_p[some], around_sk=around.batch_mk)


def _usual(batch_sk: np.ndarray, without: int = -1) -> float:
    """Return of how many batches cells usually are, less 1, if one is left out; 0 where that is not known."""
    told = same(batch_sk, without)
    told = told[np.isfinite(told)]
    return 1 / max(float(told.mean()), TINY) - 1 if len(told) else 0.0


def same(batch_mk: np.ndarray, without: int = -1) -> np.ndarray:
    """Return the chance that two different ones of cells are of the same batch, (m,), those of one batch left out.

    Not a number where less than two are left.
    """
    ordered = np.sort(batch_mk, axis=1)
    kept = ordered != without
    n, pairs = kept.sum(axis=1), np.zeros(len(ordered), np.int64)
    for apart in range(1, ordered.shape[1]):  # equal ones are next to each other
        pairs += 2 * ((ordered[:, apart:] == ordered[:, :-apart]) & kept[:, apart:]).sum(axis=1)
    return np.asarray(np.where(n > 1, pairs / np.maximum(n * (n - 1), 1), np.nan))


def counts(code_mk: np.ndarray, codes: int) -> np.ndarray:
    """Return how often each code is in each row, (m, codes)."""
    place = np.arange(len(code_mk))[:, None] * codes + code_mk
    return np.bincount(place.ravel(), minlength=len(code_mk) * codes).reshape(-1, codes)
