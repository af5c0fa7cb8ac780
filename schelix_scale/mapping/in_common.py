"""Expression of held-out cells -> what it has in common, with that of their kin and of those most alike in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from schelix_scale.genes.sketch import Sketch
from schelix_scale.graph.vectors import unit_rows
from schelix_scale.mapping.alike import Alike, Among, UsuallyAlike
from schelix_scale.mapping.expression import Shared, pool_in_common, usual_common
from schelix_scale.mapping.kin import ALONE
from schelix_scale.mapping.leftover import LeftOver
from schelix_scale.mapping.profiles import NEIGHBORS
from schelix_scale.mapping.reference import Frozen
from schelix_scale.scheduling import run_tasks

LEAST_BATCHES = 3  # of which expression is known, if there are so many


@dataclass(frozen=True)
class InCommon:
    """What the expression of held-out cells has in common: see `HeldOut`; and of which batches it is known."""

    shared: Shared
    common_of: Sequence[np.ndarray]
    alike_s: np.ndarray
    usually_alike: UsuallyAlike
    known_b: np.ndarray


def held_out_in_common(
    frozen: Frozen,
    sketch: Sketch,
    rows: np.ndarray,
    raw: np.ndarray,
    corrected: np.ndarray,
    score: np.ndarray,
    told: np.ndarray,
    cells_of: Sequence[np.ndarray],
    kin_of: Sequence[np.ndarray],
    threads: int,
) -> InCommon:
    """Return what kin have in common, and cells with those most alike, in each batch whose expression is known.

    Where that is so of less than three batches (or than there are), expression tells nothing, of new cells either.
    """
    profiles = frozen.profiles
    found = [np.zeros((len(kin), 0)) for kin in kin_of]
    known_b, alike_s = np.zeros(len(kin_of), bool), np.zeros(len(rows))

    def expression(cells: np.ndarray) -> tuple[sparse.csr_matrix, np.ndarray | None, np.ndarray, np.ndarray]:
        there = np.searchsorted(sketch.rows, rows[cells])
        measured = None
        if sketch.measured is not None:
            measured = sketch.measured.measured_pg[sketch.measured.group_n[there]][:, frozen.scaling.genes]
        return frozen.scaling(sketch.x_ng[there]), measured, unit_rows(corrected[cells]), told[cells]

    def task(place: int) -> int:
        kin, mine = kin_of[place], cells_of[place]
        batch = int(frozen.batch_n[rows[kin[0]]])
        known_b[place] = np.isin(rows[mine], sketch.rows).all() and (profiles.batch_p != batch).sum() > NEIGHBORS
        if known_b[place]:
            own, measured, unit, held = expression(kin)
            likely = score[kin] <= np.median(score[kin])
            left = LeftOver.of_pool(profiles, own, measured, unit, likely, held, batch)
            found[place] = pool_in_common(left, raw[kin])
            among, alike_s[kin] = Alike.of_pool(left)
            others = np.setdiff1d(mine, kin)
            if among is not None and len(others):
                alike_s[others] = Among(left.told, among)(*expression(others))
        return len(kin)

    run_tasks(task, range(len(kin_of)), threads)
    large = np.array([len(kin) >= ALONE for kin in kin_of])
    if (known_b & large).sum() < min(LEAST_BATCHES, large.sum()) or not known_b.any():
        silent = [common[:, :0] for common in found]
        nothing = UsuallyAlike.fit([])
        return InCommon(Shared(usual_common(silent)), silent, alike_s * 0, nothing, np.ones(len(kin_of), bool))
    usually = UsuallyAlike.fit([alike_s[kin] for kin in kin_of if alike_s[kin].any()])
    return InCommon(Shared(usual_common(found)), found, alike_s, usually, known_b)
