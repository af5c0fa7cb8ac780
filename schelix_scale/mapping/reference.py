"""A finished run as what new batches are mapped onto: everything that is needed of it, opened in seconds, read only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from schelix_scale.arrays import load_arrays, map_array
from schelix_scale.config import Config
from schelix_scale.context import BATCH, ROW
from schelix_scale.errors import DataError, RunError
from schelix_scale.features.streams import Streams
from schelix_scale.genes.sketch import Sketch
from schelix_scale.graph.operator import Operator
from schelix_scale.graph.query import QueryIndex
from schelix_scale.mapping.correction import Clusters, uncorrected
from schelix_scale.mapping.diffusion import Levels, Widths
from schelix_scale.mapping.novelty import NoveltyScore
from schelix_scale.mapping.profiles import Profiles, Scaling
from schelix_scale.run_directory import RunDirectory
from schelix_scale.stages.graph import graph_settings
from schelix_scale.transfer import Labels

if TYPE_CHECKING:
    from schelix_scale.model.streams import DualStream

SAMPLE = 30_000
MAPPED_ONTO = "mapped_onto"


@dataclass(frozen=True)
class Frozen:
    """The parts of a finished run that mapping reads; nothing in it is ever written.

    Attributes
    ----------
    directory
        The run.
    streams, genes
        Projections and correction; the table of genes.
    batch_n
        (n,) batch codes.
    raw_na, anchor_na, variant_nv
        Anchor components before and after the correction, corrected Variant components: memory maps.
    """

    directory: RunDirectory
    streams: Streams
    genes: pd.DataFrame
    batch_n: np.ndarray
    raw_na: np.ndarray
    anchor_na: np.ndarray
    variant_nv: np.ndarray

    @classmethod
    def open(cls, path: str | Path) -> Frozen:
        """Open the run in directory ``path``.

        Raises
        ------
        RunError
            It is not a run, or not a finished one.
        """
        directory = RunDirectory.open(path, finished=True)
        root = directory.path
        if MAPPED_ONTO in directory.source:
            raise RunError(
                f"{root} holds cells mapped onto {directory.source[MAPPED_ONTO]['path']}, which is the run to map "
                "onto. To make a reference of both, extend that run (schelix extend)."
            )
        features = root / "features"
        anchor_na = map_array(features / "anchor_corrected.npy")
        variant_nv: np.ndarray = np.zeros((len(anchor_na), 0), np.float32)
        if directory.record("genes").details["variants"]:
            variant_nv = map_array(features / "variant.npy")
        return cls(
            directory,
            Streams.load(root / "streams.npz"),
            pd.read_parquet(root / "genes.parquet"),
            pd.read_parquet(root / "cells.parquet", columns=[BATCH])[BATCH].to_numpy(np.int32),
            map_array(features / "anchor.npy"),
            anchor_na,
            variant_nv,
        )

    @property
    def config(self) -> Config:
        """The settings of the run."""
        return self.directory.config

    @property
    def n_cells(self) -> int:
        """Number of reference cells, n."""
        return len(self.batch_n)

    @property
    def values(self) -> str:
        """What the reference's values are."""
        return str(self.directory.record("genes").details["values"])

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the run's embedding, which all that comes before it has a part in."""
        return self.directory.record("embed").fingerprint

    @property
    def corrects(self) -> bool:
        """Whether batches are corrected at all: not in a single-stream run."""
        return self.streams.correction is not None

    @property
    def theta(self) -> float:
        """Strength of the operator's batch reweighting."""
        single = self.directory.record("genes").details["single_stream"]
        return 0.0 if single else graph_settings(self.config).theta

    @cached_property
    def sample(self) -> np.ndarray:
        """Random rows on which clusters and novelty are measured, ascending."""
        rng = np.random.default_rng([self.config.seed, 0x3A9])
        return np.sort(rng.choice(self.n_cells, min(SAMPLE, self.n_cells), replace=False))

    @property
    def clusters(self) -> Clusters:
        """The soft clusters; in a run that corrects nothing, k-means of the Anchors, in which no batch is displaced."""
        return self._of_sample[0]

    @cached_property
    def _of_sample(self) -> tuple[Clusters, np.ndarray]:
        """The soft clusters, and the corrected Anchors of the cells that they are measured on."""
        rows = self.sample
        raw, variant = (np.asarray(part[rows], np.float64) for part in (self.raw_na, self.variant_nv))
        correction, shift_kbv = self.streams.correction, self.streams.variant_shift_kbd
        batch = self.batch_n[rows]
        if correction is None:
            correction = uncorrected(raw, int(self.batch_n.max()) + 1, self.config.seed)
        corrected, weights = correction.apply_with_weights(raw, batch)
        k, b, _ = correction.shift_kbd.shape
        if shift_kbv is None:
            shift_kbv = np.zeros((k, b, variant.shape[1]), np.float32)
        else:  # the Variants of the run are moved by a share of the displacement, the clusters' centres by all of it
            rest = 1 - self.streams.strength
            for code in np.unique(batch):
                chosen = batch == code
                variant[chosen] -= rest * weights[chosen] @ shift_kbv[:, code]
        return Clusters.of_cells(correction, shift_kbv, raw, variant, batch, (corrected, weights)), corrected

    @cached_property
    def novelty(self) -> NoveltyScore:
        """What scores how novel a cell is."""
        return NoveltyScore.of_cells(*self._of_sample)

    def sketch(self) -> Sketch:
        """Read the sketch: cells of which the run keeps the expression."""
        return Sketch.load(self.directory.path / "sketch.npz")

    @cached_property
    def sketched_b(self) -> np.ndarray:
        """How many cells of each batch the sketch has, (b,)."""
        (codes,) = load_arrays(self.directory.path / "sketch.npz", "batch_n").values()
        return np.bincount(codes, minlength=int(self.batch_n.max()) + 1)

    @cached_property
    def scaling(self) -> Scaling:
        """What expression is scaled by."""
        return Scaling.of_run(self.streams, self.genes, self.config.features.scale_power)

    @cached_property
    def profiles(self) -> Profiles:
        """Cells of the sketch, beside whose expression that of new cells is held."""
        return Profiles.of_sketch(self.sketch(), self.scaling, self.anchor_na, self.config.seed)

    def told(self, indices_mk: np.ndarray) -> np.ndarray:
        """Return which share of cells (m, k) are of batches that the profiles have, (m,): not those of an extension."""
        return np.asarray(self._profiled[self.batch_n[indices_mk]].mean(axis=1))

    @cached_property
    def _profiled(self) -> np.ndarray:
        """Which batches the profiles have, (b,) bool."""
        return np.isin(np.arange(int(self.batch_n.max()) + 1), self.profiles.batch_p)

    @cached_property
    def index(self) -> QueryIndex:
        """Neighbours among the reference's cells by corrected Anchors."""
        name = self.directory.record("graph").details["operator_id"]
        return QueryIndex.open(self.directory.path / "graph" / name, self.anchor_na)

    @cached_property
    def neighbor_operator(self) -> Operator:
        """The operator whose rows list the neighbours by corrected Anchors, nearest first."""
        return self._operator(self.directory.record("graph").details["operator_id"])

    @cached_property
    def diffused(self) -> tuple[Levels, Levels]:
        """What the reference's cells of both streams are diffused to, under the operator that the model learned on."""
        return self.levels(self.directory.record("train").details["operator_id"])

    def levels(self, name: str) -> tuple[Levels, Levels]:
        """Return what the reference's cells of both streams are diffused to, under one of its operators."""
        operator, settings = self._operator(name), graph_settings(self.config)
        folder = self.directory.path / "diffused" / name
        anchor, variant = (
            Levels(
                operator,
                origin,
                settings.hops,
                map_array(folder / f"{stream}.npy"),
                settings.restart,
            )
            for stream, origin in (("anchor", self.anchor_na), ("variant", self.variant_nv))
        )
        return anchor, variant

    def materialize(self, threads: int) -> None:
        """Have hops and widths of all reference cells at hand, with which queries that touch most are faster."""
        for levels in self.diffused:
            levels.materialize(threads)
        self._widths.materialize(threads)

    def _operator(self, name: str) -> Operator:
        folder = self.directory.path / "graph" / name
        return Operator(map_array(folder / "indices.npy"), map_array(folder / "weights.npy"))

    def widths(self, indices_mk: np.ndarray, without: int | None = None) -> np.ndarray:
        """Kernel widths of reference cells, in the shape of their row numbers; among cells of all batches but one."""
        return self._widths(indices_mk, None if without is None else self.batch_n != without)

    @cached_property
    def _widths(self) -> Widths:
        return Widths(self.anchor_na, self.neighbor_operator, graph_settings(self.config).kernel_neighbor)

    @cached_property
    def model(self) -> DualStream:
        """The trained model, on the CPU."""
        from schelix_scale.model.loadings import Loadings
        from schelix_scale.model.streams import DualStream
        from schelix_scale.stages.model import train_settings
        from schelix_scale.training.checkpoint import final_checkpoint

        details, settings = self.directory.record("train").details, train_settings(self.config)
        state = final_checkpoint(self.directory.path / "checkpoints" / details["checkpoint"], details["key"])
        anchor, variant = self.streams.dims
        model = DualStream(len(self.config.graph.hops), anchor, variant, 1.0, 1.0, settings)  # scales are in the state
        if settings.loadings == "learned" and settings.enabled:
            empty = (0, 0)
            shapes = [empty if part is None else part.loadings_hd.shape for part in self._projections]
            model.loadings = Loadings(*shapes)
        model.load_state_dict(state.model)
        return model.eval()

    @property
    def _projections(self) -> tuple[Any, Any]:
        return self.streams.anchor, self.streams.variant

    def output_keys(self) -> dict[str, str]:
        """Return which latent goes to which obsm key, as in the run's own embedding."""
        from schelix_scale.embedding import output_keys
        from schelix_scale.stages.model import train_settings

        return output_keys(self.model, train_settings(self.config).enabled, self.config.embed)

    def labels(self, keys: tuple[str, ...]) -> list[Labels]:
        """Read label columns of the reference's cells.

        Raises
        ------
        DataError
            The run carries no such column, or it has no two known labels.
        """
        import pyarrow.parquet as parquet

        path = self.directory.path / "cells.parquet"
        there = [
            name for name in parquet.read_schema(path).names if name not in (ROW, BATCH) and not name.startswith("__")
        ]
        names = {key: key.replace("/", "_") for key in keys}  # as cells.parquet has them
        missing = [key for key, name in names.items() if name not in there]
        if missing:
            raise DataError(
                f"the reference {self.directory.path} carries no obs column {', '.join(map(repr, missing))} "
                f"(label_key). It has: {', '.join(there)}."
            )
        table = pd.read_parquet(path, columns=list(dict.fromkeys(names.values())))
        for key, name in names.items():
            column = table[name]
            if pd.api.types.is_float_dtype(column) and (column.dropna() % 1 != 0).any():
                raise DataError(
                    f"the obs column {key!r} of the reference has numbers such as {column.dropna().iloc[0]:g}; labels "
                    "are names or whole numbers. Divide it into categories to transfer it."
                )
        found = [Labels.of_column(key, list(table[name])) for key, name in names.items()]
        for labels in found:
            if len(labels.names) < 2:
                raise DataError(
                    f"the obs column {labels.key!r} of the reference has {len(labels.names)} known labels; two are "
                    "needed. Missing values, empty text and 'unknown' are not known."
                )
        return found
