"""What novelty is calibrated by, for pools of one size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from schelix_scale.mapping.alike import UsuallyAlike
from schelix_scale.mapping.by_label import ByLabel
from schelix_scale.mapping.expression import Shared
from schelix_scale.mapping.kin import SIZES, KinScores, Usual
from schelix_scale.mapping.kin_calibration import KinCalibration
from schelix_scale.mapping.strange import Strange
from schelix_scale.transfer import NoveltyCalibration


@dataclass(frozen=True)
class OfPools:
    """Calibrates the novelty of batches whose pools are of about one size.

    Attributes
    ----------
    size
        Cells of a pool; less than 20: cells that are looked at alone.
    novelty, unlabelled
        Of held-out cells whose labels other batches have too, with what votes say; and of all held-out cells, without.
    usual
        What is usual in held-out batches.
    shared, usually_alike
        What is usual of the expression of kin, and of cells most alike in it.
    strange
        Held-out cells that are most alike others of their batch.
    by_label
        P-values of the held-out cells of ``novelty``, and what they are voted to be.
    """

    size: int
    novelty: KinCalibration
    unlabelled: KinCalibration
    usual: Usual
    shared: Shared
    usually_alike: UsuallyAlike
    strange: Strange
    by_label: ByLabel

    @property
    def most(self) -> tuple[int, int]:
        """Which of `kin.SIZES` are the largest that are calibrated, without and with what labels say."""
        return len(self.unlabelled.sizes) - 1, len(self.novelty.sizes) - 1

    @property
    def least(self) -> float:
        """The least p-value that cells of every label can have."""
        of_labels = self.by_label.least(max(part.least for part in self.novelty.both))
        return max([of_labels, *(part.least for part in self.unlabelled.both)])

    def p_values(self, scores: tuple[KinScores, KinScores], code_cm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """P-values (m,) of cells, without and with what labels say; ``code_cm`` is what they are voted to be."""
        without, with_labels = scores
        return self.unlabelled.p_values(without), self.by_label.p_values(self.novelty.p_values(with_labels), code_cm)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all that `of_arrays` needs."""
        found = {"size": np.array(self.size), "usual_spread": np.array(self.usual.spread)}
        found |= {"usual_score": self.usual.score_cz, "usual_common": self.shared.usual_z}
        found["usually_alike"] = np.array([self.usually_alike.knee, self.usually_alike.high])
        found |= {"strange": self.strange.left_sh, "strange_batch": self.strange.batch_s}
        found |= {f"by_label_{name}": part for name, part in vars(self.by_label).items()}
        for name, both in (("novelty", self.novelty), ("unlabelled", self.unlabelled)):
            for kind, parts in (("", both.sizes), ("both_", both.both)):
                for size, part in enumerate(parts):
                    found |= {f"{name}_{kind}{size}": part.scores_s, f"{name}_{kind}{size}_weight": part.weight_s}
        return found

    @classmethod
    def of_arrays(cls, file: Mapping[str, np.ndarray]) -> OfPools:
        """Take what `arrays` returned."""
        novelty, unlabelled = (
            KinCalibration(*(_parts(file, f"{name}_{kind}") for kind in ("", "both_")))
            for name in ("novelty", "unlabelled")
        )
        return cls(
            int(file["size"]),
            novelty,
            unlabelled,
            Usual(float(file["usual_spread"]), file["usual_score"]),
            Shared(file["usual_common"]),
            UsuallyAlike(*file["usually_alike"].tolist()),
            Strange(file["strange"], file["strange_batch"]),
            ByLabel(**{name: file[f"by_label_{name}"] for name in ("p_s", "weight_s", "code_cs")}),
        )


def _parts(file: Mapping[str, np.ndarray], name: str) -> tuple[NoveltyCalibration, ...]:
    there = [f"{name}{size}" for size in range(len(SIZES)) if f"{name}{size}" in file]
    return tuple(NoveltyCalibration(file[part], file[f"{part}_weight"]) for part in there)
