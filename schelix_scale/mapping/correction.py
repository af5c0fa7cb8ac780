"""A batch that the reference has not seen -> what it is displaced by in each soft cluster of the reference.

The form is that of the reference's own correction (a mixture of linear experts, as Symphony maps queries: Kang et al.
2021), with the reference's clusters and centres fixed and one batch at a time, so that no batch depends on another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from schelix_scale.features.correction import RIDGE_SHARE, SIGMA, MixtureCorrection

ROUNDS = 8
PRIOR_CELLS = 10.0
BLOCK = 20_000
PROBES, CANDIDATES = 500, 4
LIKELY = 0.95
MIN_CELLS = 10
COHERENT = 3.0


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
        anchor = np.concatenate([old.shift_kbd, np.stack([shift.anchor_kd for shift in shifts], axis=1)], axis=1)
        variant = np.concatenate(
            [self.variant_shift_kbd, np.stack([shift.variant_kv for shift in shifts], axis=1)], axis=1
        )
        penalty = np.concatenate([old.penalty_kb, np.zeros((k, len(shifts)), old.penalty_kb.dtype)], axis=1)
        return MixtureCorrection(old.centroids_kd, penalty, anchor.astype(np.float32)), variant.astype(np.float32)


@dataclass(frozen=True)
class BatchShift:
    """Displacement of a new batch in each cluster.

    Attributes
    ----------
    anchor_kd, variant_kv
        (K, d) and (K, v).
    like
        The reference's batch that it starts from, -1 if none fits better than no displacement.
    held_back
        Share of its cells that are in clusters whose displacement was limited: more would not be a batch effect.
    """

    anchor_kd: np.ndarray
    variant_kv: np.ndarray
    like: int
    held_back: float


def fit_batch(
    clusters: Clusters,
    anchor_nd: np.ndarray,
    variant_nv: np.ndarray,
    probes: np.ndarray,
    leave_out: int | None = None,
) -> BatchShift:
    """Fit the displacement of a new batch, in closed form and a few rounds.

    In a cluster with N_k of its cells (softly counted) and centre mu_k, with P_k that of the reference's batch that it
    is most like: W_k = P_k + N_k / (N_k + lambda_k) (mean residual from mu_k - P_k). lambda_k is a fifth of the cells
    expected in the cluster, as for the reference, and at least 10 cells: few cells, or none, change little.

    A displacement that is unlike both those of the batch in its other clusters and any of the reference is taken
    for biology (a type that the reference lacks) and held back, the more the farther it is.

    Parameters
    ----------
    anchor_nd, variant_nv
        (n, d) and (n, v) uncorrected components of the batch's cells.
    probes
        (p,) cells on which it is decided which batch it is most like.
    leave_out
        A batch of the reference that it may not be like, since it is the batch itself.
    """
    like = _most_like(clusters, np.asarray(anchor_nd[probes], np.float32), leave_out)
    k, v = len(clusters.centre_kd), clusters.variant_kv.shape[1]
    prior_kd = np.zeros_like(clusters.centre_kd) if like < 0 else clusters.correction.shift_kbd[:, like].astype(float)
    prior_kv = np.zeros((k, v)) if like < 0 else clusters.variant_shift_kbd[:, like].astype(float)
    ridge_k = np.maximum(RIDGE_SHARE * clusters.share_k * len(anchor_nd), PRIOR_CELLS)
    shift_kd, kept_k = prior_kd, np.ones(k)
    count_k = np.zeros(k)
    for _ in range(ROUNDS):  # always as many: to stop early would hang on the last digits
        count_k, residual_kd = _residuals(clusters, anchor_nd, anchor_nd, shift_kd, clusters.centre_kd)
        departure_kd, kept_k = _plausible(clusters, residual_kd - prior_kd, count_k)
        shift_kd = prior_kd + (count_k / (count_k + ridge_k))[:, None] * departure_kd
    count_k, residual_kv = _residuals(clusters, anchor_nd, variant_nv, shift_kd, clusters.variant_kv)
    variant_kv = prior_kv + (kept_k * count_k / (count_k + ridge_k))[:, None] * (residual_kv - prior_kv)
    return BatchShift(shift_kd, variant_kv, like, float(((1 - kept_k) * count_k).sum() / max(count_k.sum(), 1e-9)))


def _residuals(
    clusters: Clusters, anchor_nd: np.ndarray, values_nf: np.ndarray, shift_kd: np.ndarray, centre_kf: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Soft counts (K,), and mean residuals (K, f) of values from the clusters' centres, 0 in clusters without cells."""
    count_k, total_kf = np.zeros(len(shift_kd)), np.zeros(centre_kf.shape)
    for start in range(0, len(anchor_nd), BLOCK):
        z_md = np.asarray(anchor_nd[start : start + BLOCK], np.float32)
        weights_mk = settle(clusters, z_md, shift_kd)[1]
        count_k += weights_mk.sum(axis=0, dtype=np.float64)
        total_kf += weights_mk.T @ np.asarray(values_nf[start : start + BLOCK], np.float32)
    residual = total_kf - count_k[:, None] * centre_kf
    return count_k, residual / np.maximum(count_k, 1e-9)[:, None]


def settle(clusters: Clusters, z_nd: np.ndarray, shift_kd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move cells by a batch's displacement as `MixtureCorrection.apply` does; return them and their weights (n, K)."""
    corrected, shift_kd = z_nd, shift_kd.astype(z_nd.dtype)
    for _ in range(3):
        weights = clusters.weights(corrected)
        corrected = z_nd - weights @ shift_kd
    return corrected, weights


def _most_like(clusters: Clusters, z_pd: np.ndarray, leave_out: int | None) -> int:
    """Return the batch of the reference whose displacement brings cells nearest to centroids; -1 for none.

    All are tried with the weights of uncorrected cells, and the best few and none as cells are corrected.
    """
    shift_kbd = clusters.correction.shift_kbd
    weights_pk = clusters.weights(z_pd)
    batches = [batch for batch in range(shift_kbd.shape[1]) if batch != leave_out]
    first = [_nearness(clusters, z_pd - weights_pk @ shift_kbd[:, batch]) for batch in batches]
    best = [batches[place] for place in np.argsort(first, kind="stable")[::-1][:CANDIDATES]]
    scores = {-1: _nearness(clusters, z_pd)}
    scores |= {batch: _nearness(clusters, settle(clusters, z_pd, shift_kbd[:, batch])[0]) for batch in best}
    return max(scores, key=lambda batch: scores[batch])


def _nearness(clusters: Clusters, corrected_pd: np.ndarray) -> float:
    """Mean cosine of cells with the centroid nearest to them."""
    unit = corrected_pd / np.maximum(np.linalg.norm(corrected_pd, axis=1, keepdims=True), 1e-12)
    return float((unit @ clusters.correction.centroids_kd.T).max(axis=1).mean())


def _plausible(clusters: Clusters, departure_kd: np.ndarray, count_k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hold back what is no batch effect: return the displacements beyond the prior, (K, d), and how far they are kept.

    What most of the batch's clusters share is believed whatever its size, if there are enough of them to tell (3
    evenly filled ones); what a cluster has beyond that, or a batch of fewer clusters at all, up to what is usual in
    the reference. All is continuous, so that the last digits of sums, which hang on their order, decide nothing.

    Returns
    -------
    (K, d) displacements, and (K,) from 1, where little was held back, to 0, where three quarters or more were.
    """
    spread = count_k.sum() ** 2 / max((count_k**2).sum(), 1e-9)
    told = float(np.clip(spread - COHERENT + 0.5, 0.0, 1.0))
    median_d = _weighted_median(departure_kd, count_k)
    common_d = told * median_d + (1 - told) * _held(median_d[None], clusters.usual_shift)[0]
    own_kd = departure_kd - common_d
    limit = told * clusters.usual_departure + (1 - told) * clusters.usual_shift
    norm_k = np.linalg.norm(own_kd, axis=1)
    share_k = np.minimum(1.0, (limit / np.maximum(norm_k, 1e-12)) ** 2)
    return common_d + share_k[:, None] * own_kd, np.clip(2 * share_k - 0.5, 0.0, 1.0)


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
    clusters: Clusters, shift: BatchShift, anchor_nd: np.ndarray, variant_nv: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Correct (n, d) and (n, v) components of a new batch's cells; float32."""
    z_nd = np.asarray(anchor_nd, np.float32)
    _, weights_nk = settle(clusters, z_nd, shift.anchor_kd)
    anchor = z_nd - strength * (weights_nk @ shift.anchor_kd.astype(np.float32))
    return anchor, np.asarray(variant_nv - strength * (weights_nk @ shift.variant_kv.astype(np.float32)), np.float32)
