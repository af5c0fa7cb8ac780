"""Everything that was fitted on the sketch and turns any cell into stream features; saved as one .npz."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from schelix_scale.arrays import load_arrays
from schelix_scale.config import FeaturesConfig
from schelix_scale.features.correction import MixtureCorrection, fit_correction, mixture_shift, ridge_shifts
from schelix_scale.features.projection import Projection, fit_projection
from schelix_scale.genes.partition import ANCHOR, VARIANT, Partition
from schelix_scale.stores.base import Measured


@dataclass(frozen=True)
class StreamFeatures:
    """Features of m cells, float32.

    Attributes
    ----------
    anchor
        (m, a) principal components of the Anchors.
    anchor_corrected
        (m, a) the same after the mixture correction.
    variant
        (m, v) corrected principal components of the Variants; v is 0 where there are none.
    """

    anchor: np.ndarray
    anchor_corrected: np.ndarray
    variant: np.ndarray


@dataclass(frozen=True)
class Streams:
    """Log-normalised values and batches -> stream features, in closed form and cell by cell.

    Attributes
    ----------
    anchor
        Projection of the Anchors; at a strength below 1, of the Variants too, with less weight.
    correction
        Of the Anchors; None where nothing is corrected, as in a single-stream run.
    variant
        Projection of the Variants; None where there are none, as in a single-stream run.
    variant_shift_kbd
        (K, b, v) displacement of the Variants in each Anchor cluster and batch; None without a correction or Variants.
    strength
        Share of the displacement by which cells are moved.
    """

    anchor: Projection
    correction: MixtureCorrection | None
    variant: Projection | None
    variant_shift_kbd: np.ndarray | None
    strength: float = 1.0

    @property
    def dims(self) -> tuple[int, int]:
        """Dimensions (a, v) of the streams."""
        return self.anchor.loadings_hd.shape[1], 0 if self.variant is None else self.variant.loadings_hd.shape[1]

    def uses(self, g: int) -> np.ndarray:
        """Return which of ``g`` genes have a part in the features, (g,) bool."""
        used = np.zeros(g, bool)
        used[self.anchor.genes] = True
        if self.variant is not None:
            used[self.variant.genes] = True
        return used

    def encode(self, x_ng: sparse.csr_matrix, batch_n: np.ndarray, group_n: np.ndarray | None = None) -> StreamFeatures:
        """Turn (m, g) log-normalised values of all genes, and (m,) batch codes, into features.

        ``group_n`` (m,) are the groups of cells that say what was measured, if not all was in all.
        """
        corrected = anchor = self.anchor.apply(x_ng, group_n)
        variant = np.zeros((len(anchor), 0), np.float32) if self.variant is None else self.variant.apply(x_ng, group_n)
        if self.correction is not None:
            corrected, weights_nk = self.correction.apply_with_weights(anchor, batch_n, self.strength)
            if self.variant_shift_kbd is not None:
                variant = variant - self.strength * mixture_shift(weights_nk, batch_n, self.variant_shift_kbd)
        return StreamFeatures(anchor, corrected, variant.astype(np.float32))

    def save(self, path: Path) -> None:
        """Write all arrays to an .npz file."""
        arrays: dict[str, Any] = {"strength": self.strength}
        for prefix, part in (("anchor", self.anchor), ("correction", self.correction), ("variant", self.variant)):
            named = {} if part is None else vars(part)
            arrays |= {f"{prefix}_{name}": value for name, value in named.items() if value is not None}
        if self.variant_shift_kbd is not None:
            arrays["variant_shift_kbd"] = self.variant_shift_kbd
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Streams:
        """Read what `save` wrote."""
        arrays = load_arrays(path)
        shift, strength = arrays.pop("variant_shift_kbd", None), float(arrays.pop("strength"))

        def part(prefix: str) -> dict[str, np.ndarray]:
            return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

        correction, variant = part("correction_"), part("variant_")
        return cls(
            Projection(**part("anchor_")),
            MixtureCorrection(**correction) if correction else None,
            Projection(**variant) if variant else None,
            shift,
            strength,
        )


def fit_streams(
    x_ng: sparse.csr_matrix,
    batch_n: np.ndarray,
    n_batches: int,
    partition: Partition,
    config: FeaturesConfig,
    seed: int,
    threads: int,
    strength: float = 1.0,
    measured: Measured | None = None,
) -> Streams:
    """Fit projections and correction on the (n, g) log-normalised sketch; see `project_anchors` for ``strength``.

    ``measured``: which genes were measured in the sketch's cells; None: all in all.
    """
    anchor, z_nd = project_anchors(x_ng, partition, config, strength, measured)
    variants = partition.positions(VARIANT)
    variant = v_nd = None
    if len(variants):
        variant, v_nd = fit_projection(x_ng, variants, config.variant_dims, config.scale_power, measured=measured)
    if partition.single_stream or not config.correct or strength == 0:
        return Streams(anchor, None, variant, None, strength)
    correction = fit_correction(z_nd, batch_n, n_batches, seed, threads)
    if v_nd is None:
        return Streams(anchor, correction, None, None, strength)
    _, weights_nk = correction.apply_with_weights(z_nd, batch_n)
    shift_kbd = ridge_shifts(v_nd, batch_n, weights_nk, n_batches)
    return Streams(anchor, correction, variant, shift_kbd.astype(np.float32), strength)


def project_anchors(
    x_ng: sparse.csr_matrix,
    partition: Partition,
    config: FeaturesConfig,
    strength: float,
    measured: Measured | None = None,
) -> tuple[Projection, np.ndarray]:
    """Fit the projection of the Anchors on the sketch; return it with the sketch's (n, a) components.

    Below a strength of 1 the Variants are among the Anchors with the weight 1 - strength, so that at 0 these are the
    components of all variable genes.
    """
    anchors = partition.positions(ANCHOR)
    if strength == 1:
        return fit_projection(x_ng, anchors, config.anchor_dims, config.scale_power, measured=measured)
    genes = np.union1d(anchors, partition.positions(VARIANT))
    weights = np.where(np.isin(genes, anchors), 1.0, 1.0 - strength)
    return fit_projection(x_ng, genes, config.anchor_dims, config.scale_power, weights, measured)
