"""Everything that was fitted on the sketch and turns any cell into stream features; saved as one .npz."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from schelix_scale.config import FeaturesConfig
from schelix_scale.features.correction import MixtureCorrection, fit_correction, mixture_shift, ridge_shifts
from schelix_scale.features.projection import Projection, fit_projection
from schelix_scale.genes.partition import ANCHOR, VARIANT, Partition


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
        (m, v) corrected principal components of the Variants; v is 0 in a single-stream run.
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
        Projection of the Anchors.
    correction
        Of the Anchors; None in a single-stream run, where nothing is corrected.
    variant
        Projection of the Variants; None in a single-stream run.
    variant_shift_kbd
        (K, b, v) displacement of the Variants in each Anchor cluster and batch.
    """

    anchor: Projection
    correction: MixtureCorrection | None
    variant: Projection | None
    variant_shift_kbd: np.ndarray | None

    @property
    def dims(self) -> tuple[int, int]:
        """Dimensions (a, v) of the streams."""
        return self.anchor.loadings_hd.shape[1], 0 if self.variant is None else self.variant.loadings_hd.shape[1]

    def encode(self, x_ng: sparse.csr_matrix, batch_n: np.ndarray) -> StreamFeatures:
        """Turn (m, g) log-normalised values of all genes, and (m,) batch codes, into features."""
        anchor = self.anchor.apply(x_ng)
        if self.correction is None or self.variant is None or self.variant_shift_kbd is None:
            return StreamFeatures(anchor, anchor, np.zeros((len(anchor), 0), np.float32))
        corrected, weights_nk = self.correction.apply_with_weights(anchor, batch_n)
        variant = self.variant.apply(x_ng) - mixture_shift(weights_nk, batch_n, self.variant_shift_kbd)
        return StreamFeatures(anchor, corrected, variant.astype(np.float32))

    def save(self, path: Path) -> None:
        """Write all arrays to an .npz file."""
        arrays = {f"anchor_{name}": value for name, value in vars(self.anchor).items()}
        if self.correction is not None and self.variant is not None and self.variant_shift_kbd is not None:
            arrays |= {f"correction_{name}": value for name, value in vars(self.correction).items()}
            arrays |= {f"variant_{name}": value for name, value in vars(self.variant).items()}
            arrays["variant_shift_kbd"] = self.variant_shift_kbd
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Streams:
        """Read what `save` wrote."""
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        shift = arrays.pop("variant_shift_kbd", None)

        def part(prefix: str) -> dict[str, np.ndarray]:
            return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

        anchor = Projection(**part("anchor_"))
        if shift is None:
            return cls(anchor, None, None, None)
        return cls(anchor, MixtureCorrection(**part("correction_")), Projection(**part("variant_")), shift)


def fit_streams(
    x_ng: sparse.csr_matrix,
    batch_n: np.ndarray,
    n_batches: int,
    partition: Partition,
    config: FeaturesConfig,
    seed: int,
    threads: int,
) -> Streams:
    """Fit projections and correction on the (n, g) log-normalised sketch."""
    anchors = partition.positions(ANCHOR)
    anchor, z_nd = fit_projection(x_ng, anchors, config.anchor_dims, config.scale_power)
    if partition.single_stream:
        return Streams(anchor, None, None, None)
    correction = fit_correction(z_nd, batch_n, n_batches, seed, threads)
    variants = partition.positions(VARIANT)
    variant, v_nd = fit_projection(x_ng, variants, config.variant_dims, config.scale_power)
    _, weights_nk = correction.apply_with_weights(z_nd, batch_n)
    shift_kbd = ridge_shifts(v_nd, batch_n, weights_nk, n_batches)
    return Streams(anchor, correction, variant, shift_kbd.astype(np.float32))
