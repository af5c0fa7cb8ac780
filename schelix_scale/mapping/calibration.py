"""Held-out cells of the reference -> what calibrates labels and novelty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schelix_scale.arrays import load_arrays
from schelix_scale.errors import DataError
from schelix_scale.graph.vectors import row_blocks
from schelix_scale.mapping.alike import UsuallyAlike
from schelix_scale.mapping.by_label import ByLabel, voted
from schelix_scale.mapping.expression import Shared
from schelix_scale.mapping.held_out import hold_out
from schelix_scale.mapping.kin import SIZES, Usual
from schelix_scale.mapping.kin_calibration import BATCHES, LEAST, KinCalibration, batches_told
from schelix_scale.mapping.odd_votes import ENOUGH, odd_elsewhere, oddest, often, votes_within
from schelix_scale.mapping.reference import Frozen
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.transfer import (
    NOT_LABELLED,
    VOTERS,
    LabelCalibration,
    Labels,
    NoveltyCalibration,
    batch_weights,
    vote,
)

BLOCK = 1 << 20  # cells whose labels are counted at once


@dataclass(frozen=True)
class Calibration:
    """Of novelty, and of each label column.

    Attributes
    ----------
    novelty, unlabelled
        Of held-out cells whose labels other batches have too, with what votes say; and of all held-out cells, without.
    labels
        One a column.
    whitening_dd
        See `evidence.whitening`; of all held-out cells.
    usual
        What is usual in held-out batches.
    pool
        Cells of a batch among which its cells have their kin: as many of a new batch as of a held-out one.
    shared, usually_alike
        What is usual of the expression of kin, and of cells most alike in it.
    by_label
        P-values of the held-out cells of ``novelty``, and what they are voted to be.
    """

    novelty: KinCalibration
    unlabelled: KinCalibration
    labels: tuple[LabelCalibration, ...]
    whitening_dd: np.ndarray
    usual: Usual
    pool: int
    shared: Shared
    usually_alike: UsuallyAlike
    by_label: ByLabel

    @property
    def most(self) -> tuple[int, int]:
        """Which of `kin.SIZES` are the largest that are calibrated, without and with what labels say."""
        return len(self.unlabelled.sizes) - 1, len(self.novelty.sizes) - 1

    def save(self, path: Path) -> None:
        """Write all arrays to an .npz file."""
        arrays: dict[str, np.ndarray] = {"pool": np.array(self.pool), "whitening": self.whitening_dd}
        arrays |= {"usual_spread": np.array(self.usual.spread), "usual_score": self.usual.score_cz}
        arrays["usual_common"] = self.shared.usual_z
        arrays["usually_alike"] = np.array([self.usually_alike.knee, self.usually_alike.high])
        arrays |= {f"by_label_{name}": part for name, part in vars(self.by_label).items()}
        for name, both in (("novelty", self.novelty), ("unlabelled", self.unlabelled)):
            for kind, parts in (("", both.sizes), ("both_", both.both)):
                for size, part in enumerate(parts):
                    arrays |= {f"{name}_{kind}{size}": part.scores_s, f"{name}_{kind}{size}_weight": part.weight_s}
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
        novelty, unlabelled = (
            KinCalibration(*(_parts(file, f"{name}_{kind}") for kind in ("", "both_")))
            for name in ("novelty", "unlabelled")
        )
        usual = Usual(float(file["usual_spread"]), file["usual_score"])
        told = Shared(file["usual_common"]), UsuallyAlike(*file["usually_alike"].tolist())
        by_label = ByLabel(**{name: file[f"by_label_{name}"] for name in ("p_s", "weight_s", "code_cs")})
        return cls(novelty, unlabelled, labels, file["whitening"], usual, int(file["pool"]), *told, by_label)


def _parts(file: Mapping[str, np.ndarray], name: str) -> tuple[NoveltyCalibration, ...]:
    there = [f"{name}{size}" for size in range(len(SIZES)) if f"{name}{size}" in file]
    return tuple(NoveltyCalibration(file[part], file[f"{part}_weight"]) for part in there)


def calibrate(
    frozen: Frozen,
    labels: Sequence[Labels],
    settings: MapConfig,
    threads: int = 1,
    advance: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """Hold out batches of the reference and fit what turns votes into probabilities and scores into p-values.

    A cell whose label no other batch has is left out, and of novelty also one whose label the others have too seldom to
    decide a vote: when its batch is held out, it is as good as novel.

    Raises
    ------
    DataError
        Fewer than 20 held-out cells have a label that other batches have too.
    """
    held_out = hold_out(frozen, settings, threads, advance)
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
    (without, with_labels), usual = held_out.with_kin(oddest(said, len(batch_s)), often_s)
    known_s = held_out.expressed
    seen_s = seen_s & known_s if (seen_s & known_s).sum() >= LEAST else known_s
    novelty = KinCalibration.fit(with_labels[:, seen_s], batch_s[seen_s])
    unlabelled = KinCalibration.fit(without[:, known_s], batch_s[known_s])
    by_label = ByLabel.fit(
        novelty.of_held_out(with_labels[:, seen_s], batch_s[seen_s]),
        batch_weights(batch_s[seen_s], ENOUGH),
        voted(labels, held_out.indices[seen_s], held_out.distances[seen_s]),
    )
    parts = held_out.whitening, usual, held_out.pool, held_out.shared, held_out.usually_alike
    return Calibration(novelty, unlabelled, tuple(fitted), *parts, by_label)


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
