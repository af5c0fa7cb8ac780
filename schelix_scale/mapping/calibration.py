"""Batches of the reference, mapped as if they were new -> what calibrates labels and novelty.

Each held-out batch goes through the same steps as a query: its displacement is fitted anew, and its cells find their
neighbours among the cells of all other batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schelix_scale.errors import DataError
from schelix_scale.graph.nearest import nearest_in_blocks
from schelix_scale.graph.vectors import row_blocks, unit_rows
from schelix_scale.mapping.correction import fit_batch, shifted
from schelix_scale.mapping.kin import POOL, SIZES, KinScores, Pool
from schelix_scale.mapping.novelty import Evidence, away_from, whitened, whitening
from schelix_scale.mapping.reference import Frozen
from schelix_scale.mapping.settings import MapConfig
from schelix_scale.scheduling import run_tasks
from schelix_scale.transfer import (
    NOT_LABELLED,
    LabelCalibration,
    Labels,
    NoveltyCalibration,
    batch_weights,
    vote,
)

EXACT_BELOW = 60_000
WIDER = 6
FIT_CELLS = 2_000
LEAST = 20
LEAST_OF_BATCH = 400  # held-out cells, if it has them: kin among fewer are not alike
KIN_COUNTS = 20.0  # how many times less a p-value can be for what kin says
ENOUGH = 100  # cells from which on a batch has its full weight


@dataclass(frozen=True)
class KinCalibration:
    """Of the novelty of cells and their kin: a calibration for each of `kin.SIZES`, the first one of cells alone."""

    sizes: tuple[NoveltyCalibration, ...]

    @classmethod
    def fit(cls, scores_zs: np.ndarray, batch_s: np.ndarray) -> KinCalibration:
        """Calibrate on held-out cells of batches, with a mean score for each size."""
        weights = batch_weights(batch_s, ENOUGH)
        return cls(tuple(NoveltyCalibration.fit(scores_s, weights) for scores_s in scores_zs))

    def p_values(self, scores: KinScores) -> np.ndarray:
        """P-values (m,) of single cells, up to twenty times less where those of them and their kin are less.

        So what kin says alone finds nothing novel: types can be off in a batch, too, and held-out batches are too few
        to tell how far.
        """
        own = self.sizes[0].p_values(scores.single)
        kin = np.empty(len(own))
        for size in np.unique(scores.size):
            mine = scores.size == size
            kin[mine] = self.sizes[size].p_values(scores.above[mine])
        return np.clip(kin, own / KIN_COUNTS, own)


@dataclass(frozen=True)
class Calibration:
    """Of novelty, and of each label column.

    Attributes
    ----------
    novelty, unlabelled
        Of held-out cells whose labels other batches have too, and of all held-out cells.
    labels
        One a column.
    whitening_dd
        See `novelty.whitening`; of all held-out cells.
    pool
        Cells of a batch among which its cells have their kin: as many of a new batch as of a held-out one.
    """

    novelty: KinCalibration
    unlabelled: KinCalibration
    labels: tuple[LabelCalibration, ...]
    whitening_dd: np.ndarray
    pool: int

    def save(self, path: Path) -> None:
        """Write all arrays to an .npz file."""
        arrays: dict[str, np.ndarray] = {"pool": np.array(self.pool), "whitening": self.whitening_dd}
        for name, both in (("novelty", self.novelty), ("unlabelled", self.unlabelled)):
            for size, part in enumerate(both.sizes):
                arrays |= {f"{name}_{size}": part.scores_s, f"{name}_{size}_weight": part.weight_s}
        for place, label in enumerate(self.labels):
            arrays |= {f"scores_{place}": label.scores_s, f"weight_{place}": label.weight_s}
            arrays[f"sharpening_{place}"] = np.array([label.temperature, label.floor])
        np.savez(path, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote."""
        with np.load(path) as file:
            count = sum(name.startswith("scores_") for name in file.files)
            labels = tuple(
                LabelCalibration(
                    float(file[f"sharpening_{i}"][0]),
                    float(file[f"sharpening_{i}"][1]),
                    file[f"scores_{i}"],
                    file[f"weight_{i}"],
                )
                for i in range(count)
            )
            novelty, unlabelled = (
                KinCalibration(
                    tuple(
                        NoveltyCalibration(file[f"{name}_{size}"], file[f"{name}_{size}_weight"])
                        for size in range(len(SIZES))
                    )
                )
                for name in ("novelty", "unlabelled")
            )
            return cls(novelty, unlabelled, labels, file["whitening"], int(file["pool"]))


@dataclass(frozen=True)
class _HeldOut:
    """Held-out cells (s,): rows, neighbours in other batches, novelty (5, s) by size of kin; how large a pool is."""

    rows: np.ndarray
    indices: np.ndarray
    distances: np.ndarray
    scores: np.ndarray
    whitening: np.ndarray
    pool: int


def calibrate(
    frozen: Frozen,
    labels: Sequence[Labels],
    settings: MapConfig,
    threads: int = 1,
    advance: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """Hold out batches of the reference and fit what turns votes into probabilities and scores into p-values.

    A cell whose label no other batch has is novel, and left out.

    Raises
    ------
    DataError
        Fewer than 20 held-out cells have a label that other batches have too.
    """
    held_out = hold_out(frozen, settings, threads, advance)
    batch_s = frozen.batch_n[held_out.rows]
    seen_s = np.ones(len(batch_s), bool)
    fitted = []
    for column in labels:
        true_s = column.code_n[held_out.rows]
        elsewhere_s = _elsewhere(column.code_n, frozen.batch_n, true_s, batch_s)
        seen_s &= elsewhere_s | (true_s == NOT_LABELLED)
        chosen = np.flatnonzero(elsewhere_s & (true_s != NOT_LABELLED))
        if len(chosen) < LEAST:
            raise DataError(
                f"label_key {column.key!r}: {len(chosen)} held-out cells of the reference have a label that another "
                f"batch has too; {LEAST} are needed to calibrate it. Labels that are batches cannot be transferred."
            )
        votes = vote(held_out.distances[chosen], column.code_n[held_out.indices[chosen]], len(column.names))
        batch = batch_s[chosen]
        fitted.append(LabelCalibration.fit(votes, true_s[chosen], batch_weights(batch, ENOUGH), batch))
    if not seen_s.any():
        seen_s[:] = True
    novelty = KinCalibration.fit(held_out.scores[:, seen_s], batch_s[seen_s])
    unlabelled = KinCalibration.fit(held_out.scores, batch_s)
    return Calibration(novelty, unlabelled, tuple(fitted), held_out.whitening, held_out.pool)


def hold_out(
    frozen: Frozen, settings: MapConfig, threads: int = 1, advance: Callable[[int], None] = lambda _: None
) -> _HeldOut:
    """Map cells of batches of the reference onto the others.

    Raises
    ------
    DataError
        The reference has one batch, or one beside which there are hardly any cells.
    """
    rng = np.random.default_rng([frozen.config.seed, 0xCA1])
    batches, sizes = np.unique(frozen.batch_n, return_counts=True)
    if len(batches) > settings.calibration_batches:
        drawn = np.sort(rng.choice(len(batches), settings.calibration_batches, replace=False))
        batches, sizes = batches[drawn], sizes[drawn]
    share = max(LEAST_OF_BATCH, settings.calibration_cells // len(batches))
    chosen: list[tuple[np.ndarray, np.ndarray]] = []
    for batch, size in zip(batches.tolist(), sizes, strict=True):
        cells = np.flatnonzero(frozen.batch_n == batch)
        fit = np.sort(rng.choice(cells, min(FIT_CELLS, size), replace=False))
        rows = np.sort(rng.choice(fit, min(share, len(fit)), replace=False))
        if size < frozen.n_cells - frozen.config.graph.k:
            chosen.append((fit, rows))
    moved: list[np.ndarray] = [np.zeros(0)] * len(chosen)

    def task(place: int) -> int:
        moved[place] = _corrected(frozen, *chosen[place])
        return share

    run_tasks(task, range(len(chosen)), threads, None, advance)
    if not chosen:
        raise DataError(
            f"the reference {frozen.directory.path} has {len(batches)} batches, none of which can be held out: "
            f"{frozen.config.graph.k} cells must be left. Mapping is calibrated on held-out batches."
        )
    rows, corrected = np.concatenate([rows for _, rows in chosen]), np.concatenate(moved)
    indices, distances = _neighbors_elsewhere(frozen, corrected, frozen.batch_n[rows], threads)
    pool = min(share, POOL)
    raw, batch = np.asarray(frozen.raw_na[rows]), frozen.batch_n[rows]
    away = away_from(frozen.anchor_na, corrected, indices)
    whitening_dd = whitening(away)
    own = Evidence(frozen.novelty(raw, corrected, distances), whitened(away, whitening_dd))
    scores = np.empty((len(SIZES), len(rows)))
    for code in np.unique(batch):
        mine = np.flatnonzero(batch == code)
        kin = np.sort(rng.choice(mine, min(pool, len(mine)), replace=False))
        among = Pool.of_cells(rows[kin], raw[kin], own[kin])
        for size in range(len(SIZES)):
            found = among.scores(rows[mine], raw[mine], own[mine], size)
            scores[size, mine] = among.above(found, size)
    return _HeldOut(rows, indices, distances, scores, whitening_dd, pool)


def _corrected(frozen: Frozen, fit: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Correct cells of a batch as those of a new one, whose displacement is fitted on the cells ``fit``."""
    if not frozen.corrects:
        return np.asarray(frozen.anchor_na[rows])
    empty = np.zeros((len(fit), 0), np.float32)
    clusters = frozen.clusters.without_variants()
    shift = fit_batch(clusters, np.asarray(frozen.raw_na[fit]), empty)
    raw = np.asarray(frozen.raw_na[rows])
    return shifted(shift, raw, empty[: len(rows)], frozen.streams.strength)[0]


def _neighbors_elsewhere(
    frozen: Frozen, corrected_md: np.ndarray, batch_m: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours of cells among those of other batches than their own: (m, k) rows and distances.

    Among many cells, those of the index are taken where there are k of other batches among the nearest 6 k.
    """
    m, k = len(corrected_md), frozen.config.graph.k
    indices, distances = np.zeros((m, k), np.int64), np.zeros((m, k), np.float32)
    done_m = np.zeros(m, bool)
    if frozen.n_cells > EXACT_BELOW:
        found, away = frozen.index.query(corrected_md, min(WIDER * k, frozen.n_cells), threads)
        own = frozen.batch_n[found] == batch_m[:, None]
        done_m = (~own).sum(axis=1) >= k
        order = np.argsort(own, axis=1, kind="stable")[:, :k]
        indices, distances = (np.take_along_axis(part, order, axis=1) for part in (found, away))
    for batch in np.unique(batch_m[~done_m]):
        rows = np.flatnonzero(~done_m & (batch_m == batch))
        others = np.flatnonzero(frozen.batch_n != batch)
        blocks = ((start, unit_rows(frozen.anchor_na[others[start:stop]])) for start, stop in row_blocks(len(others)))
        near, distances[rows] = nearest_in_blocks(unit_rows(corrected_md[rows]), blocks, k)
        indices[rows] = others[near]
    return indices, distances


def _elsewhere(code_n: np.ndarray, batch_n: np.ndarray, true_s: np.ndarray, batch_s: np.ndarray) -> np.ndarray:
    """Whether a batch other than the cell's own has its label, (s,) bool."""
    known = code_n != NOT_LABELLED
    there = np.zeros((int(code_n.max(initial=0)) + 2, int(batch_n.max()) + 1), bool)
    there[code_n[known], batch_n[known]] = True
    return np.asarray(there[true_s].sum(axis=1) > there[true_s, batch_s])
