"""A batch that the reference has not seen -> what it is displaced by.

The reference's soft clusters and their centres are fixed, and batches are fitted one at a time, so that none depends on
another. A batch has one displacement: to give it one in each cluster, as the reference's own correction and Symphony
(Kang et al. 2021) do, moves cells that begin in the wrong cluster onto it (see benchmarks/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from schelix_scale.features.correction import SIGMA, MixtureCorrection

ROUNDS, PASSES = 8, 5
PRIOR_CELLS = 10.0
BLOCK = 20_000
TINY = 1e-9
LIKELY = 0.95
MIN_CELLS = 10
COHERENT = 3.0
CLUSTERS = 12, 100  # fewest and most, of a run that corrects nothing


@dataclass(frozen=True)
class Clusters:
    """The reference's soft clusters: where their cells are, and how batches are displaced in them.

    Attributes
    ----------
    correction
        The reference's, of the Anchors.
    variant_shift_kbd
        (K, b, v) displacement of the Variants; v is 0 without any.
    centre_kd, variant_kv
        (K, d) and (K, v) mean of the corrected components: what a batch without displacement has.
    share_k
        (K,) share of the reference's cells, sums to 1.
    usual_shift, usual_departure
        Norm of a batch's displacement in a cluster, and of how it departs from the batch's median displacement, that
        95 % of the reference's clusters and batches stay below.
    """

    correction: MixtureCorrection
    variant_shift_kbd: np.ndarray
    centre_kd: np.ndarray
    variant_kv: np.ndarray
    share_k: np.ndarray
    usual_shift: float
    usual_departure: float

    @classmethod
    def of_cells(
        cls,
        correction: MixtureCorrection,
        variant_shift_kbd: np.ndarray,
        anchor_sd: np.ndarray,
        variant_sv: np.ndarray,
        batch_s: np.ndarray,
        settled: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Clusters:
        """Measure the clusters on s reference cells.

        Parameters
        ----------
        anchor_sd
            (s, d) uncorrected Anchor components.
        variant_sv
            (s, v) Variant components, corrected by the whole displacement.
        batch_s
            (s,) batch codes.
        settled
            What `MixtureCorrection.apply_with_weights` makes of the Anchors, where it is known.
        """
        corrected, weights_sk = settled or correction.apply_with_weights(anchor_sd, batch_s)
        mass_k = weights_sk.sum(axis=0)
        scale = 1 / np.maximum(mass_k, 1e-9)[:, None]
        n_batches = correction.shift_kbd.shape[1]
        occupied_kb = np.stack([weights_sk[batch_s == b].sum(axis=0) for b in range(n_batches)], axis=1) >= MIN_CELLS
        shifts, departures = [np.zeros(1)], [np.zeros(1)]
        for batch in range(n_batches):
            shift_kd = correction.shift_kbd[occupied_kb[:, batch], batch]
            if len(shift_kd):
                shifts.append(np.linalg.norm(shift_kd, axis=1))
            if len(shift_kd) and np.ptp(shift_kd, axis=0).any():  # one that an extension added has no departures
                departures.append(np.linalg.norm(shift_kd - np.median(shift_kd, axis=0), axis=1))
        return cls(
            correction,
            variant_shift_kbd,
            weights_sk.T @ corrected * scale,
            weights_sk.T @ variant_sv * scale,
            mass_k / mass_k.sum(),
            float(np.quantile(np.concatenate(shifts), LIKELY)),
            float(np.quantile(np.concatenate(departures), LIKELY)),
        )

    def without_variants(self) -> Clusters:
        """Return the clusters of the Anchors alone."""
        return replace(self, variant_shift_kbd=self.variant_shift_kbd[:, :, :0], variant_kv=self.variant_kv[:, :0])

    def weights(self, z_nd: np.ndarray) -> np.ndarray:
        """Soft cluster weights (n, K) of corrected cells of a new batch: no batch is expected anywhere."""
        steep = 2.0 / SIGMA / np.maximum(np.sqrt(np.einsum("nd,nd->n", z_nd, z_nd)), 1e-12)
        weights: np.ndarray = (z_nd * steep[:, None].astype(z_nd.dtype)) @ self.correction.centroids_kd.T
        weights -= weights.max(axis=1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=1, keepdims=True)
        return weights

    def extended(self, shifts: list[BatchShift]) -> tuple[MixtureCorrection, np.ndarray]:
        """Return the reference's correction, and its shifts of the Variants, with new batches after its own."""
        if not shifts:
            return self.correction, self.variant_shift_kbd
        k = len(self.centre_kd)
        old = self.correction
        anchor, variant = (
            np.concatenate([old_kbf, np.broadcast_to(np.stack(new), (k, len(new), old_kbf.shape[2]))], axis=1)
            for old_kbf, new in (
                (old.shift_kbd, [shift.anchor_d for shift in shifts]),
                (self.variant_shift_kbd, [shift.variant_v for shift in shifts]),
            )
        )
        penalty = np.concatenate([old.penalty_kb, np.zeros((k, len(shifts)), old.penalty_kb.dtype)], axis=1)
        return MixtureCorrection(old.centroids_kd, penalty, anchor.astype(np.float32)), variant.astype(np.float32)


@dataclass(frozen=True)
class BatchShift:
    """Displacement of a new batch.

    Attributes
    ----------
    anchor_d, variant_v
        (d,) and (v,).
    held_back
        Share of its cells that are in clusters which depart from it more than is usual, and so had less of a part in
        it.
    """

    anchor_d: np.ndarray
    variant_v: np.ndarray
    held_back: float


def fit_batch(clusters: Clusters, anchor_nd: np.ndarray, variant_nv: np.ndarray) -> BatchShift:
    """Fit the displacement of a new batch, in closed form and a few rounds.

    In each cluster the batch's cells (softly counted) have a mean residual from the cluster's centre. What the clusters
    share of these is the displacement; the weight of a cluster is its share of the batch or of the reference, whichever
    is less, so that another composition is not taken for a displacement. A cluster that departs from the others by more
    than is usual in the reference, and than half of them do (a type that the reference lacks), counts the less, the
    farther it is.

    Parameters
    ----------
    anchor_nd, variant_nv
        (n, d) and (n, v) uncorrected components of the batch's cells.
    """
    shift_d = np.zeros(anchor_nd.shape[1])
    for _ in range(ROUNDS):  # always as many: to stop early would hang on the last digits
        count_k, residual_kd = _residuals(clusters, anchor_nd, anchor_nd, shift_d, clusters.centre_kd)
        shift_d, trust_k = _shared(clusters, residual_kd, count_k)
    count_k, residual_kv = _residuals(clusters, anchor_nd, variant_nv, shift_d, clusters.variant_kv)
    weight_k = _weights(clusters, count_k) * trust_k
    variant_v = _believed(count_k) * (weight_k @ residual_kv) / max(weight_k.sum(), TINY)
    return BatchShift(shift_d, variant_v, float(((1 - trust_k) * count_k).sum() / max(count_k.sum(), TINY)))


def _residuals(
    clusters: Clusters, anchor_nd: np.ndarray, values_nf: np.ndarray, shift_d: np.ndarray, centre_kf: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Soft counts (K,), and mean residuals (K, f) of values from the clusters' centres, 0 in clusters without cells."""
    count_k, total_kf = np.zeros(len(centre_kf)), np.zeros(centre_kf.shape)
    for start in range(0, len(anchor_nd), BLOCK):
        z_md = np.asarray(anchor_nd[start : start + BLOCK], np.float32)
        weights_mk = clusters.weights(z_md - shift_d.astype(np.float32))
        count_k += weights_mk.sum(axis=0, dtype=np.float64)
        total_kf += weights_mk.T @ np.asarray(values_nf[start : start + BLOCK], np.float32)
    residual = total_kf - count_k[:, None] * centre_kf
    return count_k, residual / np.maximum(count_k, TINY)[:, None]


def _shared(clusters: Clusters, residual_kd: np.ndarray, count_k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what clusters share of their residuals, (d,), and how far each is trusted, (K,) from 0 to 1.

    It is believed whatever its size if there are enough clusters to tell (3 evenly filled ones), else up to what is
    usual in the reference. All is continuous, so that the last digits of sums, which hang on their order, decide
    nothing.
    """
    weight_k = _weights(clusters, count_k)
    shared_d, trust_k = _weighted_median(residual_kd, weight_k), np.ones(len(count_k))
    for _ in range(PASSES):
        away_k = np.linalg.norm(residual_kd - shared_d, axis=1)
        limit = max(clusters.usual_departure, float(_weighted_median(away_k[:, None], weight_k)[0]), TINY)
        trust_k = np.minimum(1.0, (limit / np.maximum(away_k, TINY)) ** 2)
        shared_d = (weight_k * trust_k) @ residual_kd / max(float(weight_k @ trust_k), TINY)
    spread = count_k.sum() ** 2 / max((count_k**2).sum(), TINY)
    told = float(np.clip(spread - COHERENT + 0.5, 0.0, 1.0))
    shared_d = told * shared_d + (1 - told) * _held(shared_d[None], clusters.usual_shift)[0]
    return _believed(count_k) * shared_d, trust_k


def _weights(clusters: Clusters, count_k: np.ndarray) -> np.ndarray:
    """Share of the batch or of the reference that a cluster has, whichever is less, (K,)."""
    return np.asarray(np.minimum(count_k / max(count_k.sum(), TINY), clusters.share_k))


def _believed(count_k: np.ndarray) -> float:
    """How far a mean of so many cells is believed, from 0 to 1."""
    return float(count_k.sum() / (count_k.sum() + PRIOR_CELLS))


def _held(vectors_kd: np.ndarray, limit: float) -> np.ndarray:
    """Shorten vectors beyond the limit, the more the longer they are: by limit^2 / norm^2."""
    norm = np.linalg.norm(vectors_kd, axis=1, keepdims=True)
    return np.asarray(vectors_kd * np.minimum(1.0, (limit / np.maximum(norm, 1e-12)) ** 2))


def _weighted_median(values_kd: np.ndarray, weight_k: np.ndarray) -> np.ndarray:
    """Median of each column, rows weighted; between two rows where half the weight lies between their middles."""
    order = np.argsort(values_kd, axis=0, kind="stable")
    weight_kd = weight_k[order]
    middle = np.cumsum(weight_kd, axis=0) - weight_kd / 2
    ranked = np.take_along_axis(values_kd, order, axis=0)
    half = weight_k.sum() / 2
    return np.array([np.interp(half, middle[:, d], ranked[:, d]) for d in range(values_kd.shape[1])])


def shifted(
    shift: BatchShift, anchor_nd: np.ndarray, variant_nv: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Correct (n, d) and (n, v) components of a new batch's cells; float32."""
    anchor = anchor_nd - (strength * shift.anchor_d).astype(np.float32)
    return anchor, np.asarray(variant_nv - (strength * shift.variant_v).astype(np.float32), np.float32)


def uncorrected(raw_sd: np.ndarray, n_batches: int, seed: int) -> MixtureCorrection:
    """Return clusters of cells that no batch is displaced in."""
    from sklearn.cluster import MiniBatchKMeans

    unit = raw_sd / np.maximum(np.linalg.norm(raw_sd, axis=1, keepdims=True), 1e-12)
    k = int(np.clip(np.sqrt(len(unit)) / 3, *CLUSTERS))
    centres = MiniBatchKMeans(min(k, len(unit)), n_init=1, random_state=seed).fit(unit).cluster_centers_
    centres = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    zeros = np.zeros((len(centres), n_batches), np.float32)
    shift = np.zeros((*zeros.shape, raw_sd.shape[1]), np.float32)
    return MixtureCorrection(centres.astype(np.float32), zeros, shift)
