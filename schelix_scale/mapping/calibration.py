"""Held-out cells of the reference -> what calibrates labels and novelty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from schelix_scale.arrays import load_arrays
from schelix_scale.errors import DataError
from schelix_scale.graph.vectors import row_blocks
from schelix_scale.mapping.by_label import ByLabel, voted
from schelix_scale.mapping.evidence import Evidence
from schelix_scale.mapping.held_out import HeldOut, hold_out, sizes_of_pools
from schelix_scale.mapping.held_out_pools import HeldOutPools
from schelix_scale.mapping.kin_calibration import BATCHES, LEAST, KinCalibration, batches_told
from schelix_scale.mapping.odd_votes import ENOUGH, odd_elsewhere, oddest, often, votes_within
from schelix_scale.mapping.of_pools import OfPools
from schelix_scale.mapping.pool_sizes import nearest_size
from schelix_scale.mapping.reference import Frozen
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.transfer import (
    NOT_LABELLED,
    VOTERS,
    LabelCalibration,
    Labels,
    batch_weights,
    vote,
)

BLOCK = 1 << 20  # cells whose labels are counted at once


@dataclass(frozen=True)
class Calibration:
    """Of novelty, and of each label column.

    Attributes
    ----------
    labels
        One a column.
    whitening_dd
        See `evidence.whitening`; of all held-out cells.
    sizes
        See `pool_sizes.pool_sizes`.
    of_pools
        Of novelty, for pools of some of these sizes.
    """

    labels: tuple[LabelCalibration, ...]
    whitening_dd: np.ndarray
    sizes: tuple[int, ...]
    of_pools: Mapping[int, OfPools]

    def of_pool(self, cells: int) -> OfPools:
        """Return what tells of a pool of so many cells."""
        return self.of_pools[nearest_size(self.sizes, cells)]

    def only(self, wanted: Sequence[int]) -> Calibration:
        """Return the same for pools of these sizes alone."""
        return replace(self, of_pools={size: self.of_pools[size] for size in wanted})

    def save(self, path: Path) -> None:
        """Write all arrays to an .npz file."""
        arrays: dict[str, np.ndarray] = {"whitening": self.whitening_dd, "sizes": np.array(self.sizes)}
        for size, part in self.of_pools.items():
            arrays |= {f"pools{size}_{name}": array for name, array in part.arrays().items()}
        for place, label in enumerate(self.labels):
            arrays |= {f"scores_{place}": label.scores_s, f"weight_{place}": label.weight_s}
            arrays[f"usual_votes_{place}"] = label.usual_ll
            arrays[f"sharpening_{place}"] = np.array([label.temperature, label.floor])
        np.savez(path, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote."""
        file = load_arrays(path)
        count = sum(name.startswith("scores_") for name in file)
        sizes = tuple(file["sizes"].tolist())
        labels = tuple(
            LabelCalibration(
                float(file[f"sharpening_{i}"][0]),
                float(file[f"sharpening_{i}"][1]),
                file[f"scores_{i}"],
                file[f"weight_{i}"],
                file[f"usual_votes_{i}"],
            )
            for i in range(count)
        )
        of_pools = {}
        for size in sizes:
            start = f"pools{size}_"
            arrays = {name.removeprefix(start): array for name, array in file.items() if name.startswith(start)}
            if arrays:
                of_pools[size] = OfPools.of_arrays(arrays)
        return cls(labels, file["whitening"], sizes, of_pools)


def calibrate(
    frozen: Frozen,
    labels: Sequence[Labels],
    settings: MapConfig,
    threads: int = 1,
    advance: Callable[[int], None] = lambda _: None,
    wanted: Sequence[int] | None = None,
) -> Calibration:
    """Hold out batches of the reference and fit what turns votes into probabilities and scores into p-values.

    A cell whose label no other batch has is left out, and of novelty also one whose label the others have too seldom to
    decide a vote: when its batch is held out, it is as good as novel.

    Parameters
    ----------
    wanted
        Which of `held_out.sizes_of_pools` there are pools of; None: all.

    Raises
    ------
    DataError
        Fewer than 20 held-out cells have a label that other batches have too.
    """
    held_out = hold_out(frozen, settings, threads, advance, wanted)
    batch_s = held_out.batch
    elsewhere_s = np.full(len(batch_s), len(frozen.batch_n))  # of a cell without labels nothing says that it is rare
    fitted, said, often_s = [], [], np.ones(len(batch_s))
    for batch in np.unique(batch_s):
        mine = batch_s == batch
        near, far = held_out.indices[mine], held_out.distances[mine]
        often_s[mine] = often(labels, frozen.profiles, near, far, int(batch))
    for column in labels:
        true_s = column.code_n[held_out.rows]
        count_s = _elsewhere(column.code_n, frozen.batch_n, true_s, batch_s)
        labelled_s = true_s != NOT_LABELLED
        elsewhere_s[labelled_s] = np.minimum(elsewhere_s, count_s)[labelled_s]
        near = column.code_n[held_out.indices]
        voted_s = (near != NOT_LABELLED).any(axis=1)  # others have no label, and no part in how sure labels are
        chosen = np.flatnonzero((count_s > 0) & labelled_s & voted_s)
        if len(chosen) < LEAST:
            raise DataError(
                f"label_key {column.key!r}: {len(chosen)} held-out cells of the reference have a label that another "
                f"batch has too, and a labelled cell near; {LEAST} are needed to calibrate it. Labels that are batches "
                "cannot be transferred."
            )
        votes, batch = vote(held_out.distances, near, len(column.names)), batch_s[chosen]
        within = votes_within(frozen, column)
        fit = LabelCalibration.fit(votes[chosen], true_s[chosen], batch_weights(batch, ENOUGH), batch, within)
        said.append(odd_elsewhere(fit, votes, near, true_s, batch_s, chosen, within))
        fitted.append(fit)
    seen_s = _not_novel(elsewhere_s, batch_s, min(frozen.config.graph.k, VOTERS) // 2)
    own, voted_cs = held_out.evidence(oddest(said, len(batch_s))), voted(labels, held_out.indices, held_out.distances)
    of_pools = {pools.size: _of_pools(held_out, pools, own, often_s, seen_s, voted_cs) for pools in held_out.pools}
    return Calibration(tuple(fitted), held_out.whitening, sizes_of_pools(frozen, settings), of_pools)


def _of_pools(
    held_out: HeldOut, pools: HeldOutPools, own: Evidence, often_s: np.ndarray, seen_s: np.ndarray, voted_cs: np.ndarray
) -> OfPools:
    """Calibrate novelty for pools of one size; ``seen_s`` are held-out cells of no type that is novel."""
    batch_s, known_s = held_out.batch, pools.expressed
    (without, with_labels), usual = pools.with_kin(held_out.raw, own, often_s)
    chosen = seen_s & known_s if (seen_s & known_s).sum() >= LEAST else known_s
    novelty = KinCalibration.fit(with_labels[:, chosen], batch_s[chosen])
    by_label = ByLabel.fit(
        novelty.of_held_out(with_labels[:, chosen], batch_s[chosen]),
        batch_weights(batch_s[chosen], ENOUGH),
        voted_cs[:, chosen],
    )
    unlabelled = KinCalibration.fit(without[:, known_s], batch_s[known_s])
    return OfPools(pools.size, novelty, unlabelled, usual, pools.shared, pools.usually_alike, pools.strange, by_label)


def _not_novel(elsewhere_s: np.ndarray, batch_s: np.ndarray, few: int) -> np.ndarray:
    """Return which held-out cells are of no type that is novel to the other batches, (s,) bool.

    Novel is one of which these have up to ``few`` cells. Where that would leave less than half of the held-out cells,
    or too few batches (labels so fine that each is rare), it is one of which they have none; and all cells count where
    hardly any would be left.
    """
    asked = min(BATCHES, batches_told(batch_s))
    for most, share in ((few, 0.5), (0, 0.0)):
        left_s = elsewhere_s > most
        if left_s.sum() >= max(LEAST, share * len(left_s)) and batches_told(batch_s[left_s]) >= asked:
            return np.asarray(left_s)
    return np.ones(len(batch_s), bool)


def _elsewhere(code_n: np.ndarray, batch_n: np.ndarray, true_s: np.ndarray, batch_s: np.ndarray) -> np.ndarray:
    """How many cells of other batches than its own have the label of a cell, (s,)."""
    batches = int(batch_n.max()) + 1
    pairs = np.zeros((int(code_n.max(initial=0)) + 2) * batches, np.int64)  # the first row: no label
    for start, stop in row_blocks(len(code_n), BLOCK):
        place = (code_n[start:stop].astype(np.int64) + 1) * batches + batch_n[start:stop]
        pairs += np.bincount(place, minlength=len(pairs))
    count = pairs.reshape(-1, batches)
    return np.asarray(count[true_s + 1].sum(axis=1) - count[true_s + 1, batch_s])
