"""Settings: declared once, frozen, strict. An unknown key or a bad value is an error that names the key.

What comes in: a TOML file (see ``configs/``), keyword arguments, ``key=value`` strings from the command line.
What goes out: one `Config`, passed whole or by sub-model to the functions that need it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

OF_DATA = ("label_key", "layer", "genes_join", "obs_filter", "census_version", "census_uri", "protect")  # by name alone
_SECRET = re.compile(r"secret|token|password|key|sas|credential", re.IGNORECASE)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class DataConfig(_Settings):
    """Where in the source the values and the batches are."""

    batch_key: str = Field(
        "batch",
        min_length=1,
        description="obs column that names the batch of each cell; several, joined: dataset,assay",
    )
    layer: str = Field("X", min_length=1, description="X, raw, or the name of a layer")
    values: Literal["auto", "counts", "linear", "log"] = Field(
        "auto", description="what the values are; auto decides from the data and says so"
    )
    label_key: str | None = Field(None, min_length=1, description="obs column of cell types, if some are known")
    unknown_label: str = Field("unknown", description="in label_key: not known (any case; missing values neither)")
    protect: tuple[str, ...] = Field((), description="obs columns (condition, time) whose effect is not batch")
    obs_columns: tuple[str, ...] | None = Field(None, description="obs columns carried into the run; all by default")
    genes_join: Literal["intersection", "union"] = Field(
        "intersection", description="of several files: the genes that all have, or all genes (some not measured in all)"
    )
    obs_filter: str | None = Field(None, min_length=1, description="SOMA and Census: which cells, as a value filter")
    measurement: str = Field("RNA", min_length=1, description="SOMA: the measurement that is read")
    timestamp: int | None = Field(None, ge=0, description="SOMA: read as of this time (milliseconds since 1970)")
    tiledb: dict[str, str] = Field({}, description='SOMA: settings of TileDB, as "vfs.s3.region"')
    census_version: str = Field("stable", min_length=1, description="Census: a release date, stable or latest")
    census_uri: str | None = Field(None, min_length=1, description="Census: a local or mirrored one")

    @field_serializer("tiledb", when_used="json")
    def _without_keys(self, value: dict[str, str]) -> dict[str, str]:
        """Leave keys to the cloud out of whatever is written: runs are shared, and keys change while data do not."""
        return {name: text for name, text in value.items() if not _SECRET.search(name)}


class SketchConfig(_Settings):
    """The sample of cells on which all statistics are fitted."""

    max_cells: int = Field(100_000, ge=100)
    rare_fraction: float = Field(0.2, ge=0, le=0.9, description="share drawn evenly over expression space")


class GenesConfig(_Settings):
    """Highly variable genes and their split into Anchors and Variants."""

    n_hvg: int = Field(2_000, ge=20)
    min_batch_cells: int = Field(200, ge=1, description="smaller batches do not vote for variable genes")
    iterations: int = Field(3, ge=1, le=10, description="rounds of clustering and partition")
    cut: Literal["auto", "median", "otsu"] = "auto"
    min_anchor_share: float = Field(0.35, gt=0, lt=1)
    max_anchor_share: float = Field(0.75, gt=0, lt=1)
    permutations: int = Field(10, ge=2, description="batch permutations of the no-batch-signal null")
    min_signal: float = Field(0.0005, ge=0, description="batch share of variance below which nothing is corrected")
    partition: Literal["sensitivity", "random", "all"] = Field(
        "sensitivity", description="an ablation: Anchors drawn at random, as many; or all genes are Anchors"
    )

    @model_validator(mode="after")
    def _shares(self) -> GenesConfig:
        if self.min_anchor_share >= self.max_anchor_share:
            raise ValueError("min_anchor_share must be less than max_anchor_share")
        return self


class FeaturesConfig(_Settings):
    """Stream features: PCA of each stream and the mixture correction of the Anchors."""

    anchor_dims: int = Field(30, ge=2, le=200)
    variant_dims: int = Field(30, ge=2, le=200)
    scale_power: float = Field(0.75, ge=0, le=1, description="genes are divided by sd**scale_power")
    correct: bool = Field(True, description="an ablation if false: no mixture correction, of Anchors or Variants")


class GraphConfig(_Settings):
    """Neighbours and the diffusion operator."""

    k: int = Field(30, ge=2, le=500)
    method: Literal["auto", "exact", "ivf", "pynndescent"] = Field(
        "auto", description="exact, ivf (lists of nearby cells, then neighbours of neighbours), or pynndescent"
    )
    exact_below: int = Field(20_000, ge=0, description="auto searches exactly below this number of cells, else ivf")
    theta: float = Field(1.0, ge=0, description="strength of the batch reweighting")
    kernel_neighbor: int = Field(7, ge=1, description="the neighbour whose distance is a cell's kernel width")
    restart: float = Field(0.3, ge=0, le=1)
    hops: tuple[int, ...] = Field((0, 1, 3), min_length=1)
    min_recall: float = Field(0.95, ge=0, le=1)
    audit_cells: int = Field(500, ge=10)
    cache_dir: str | None = Field(
        None, min_length=1, description="a directory of operators that several runs share; found again by content"
    )

    @field_validator("hops")
    @classmethod
    def _hops(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 0 or len(set(value)) < len(value):
            raise ValueError("hops are different numbers of steps, none negative, such as [0, 1, 3]")
        return tuple(sorted(value))


class TrainConfig(_Settings):
    """The dual-stream model and its Align - Refine - Fuse training."""

    enabled: bool = True
    width: int = Field(128, ge=8)
    anchor_residual: float = Field(0.4, ge=0, description="bound r_A on the Anchor encoder's residual")
    gate: float = Field(0.2, ge=0, description="bound rho on what Anchors absorb from Variants; keep it below .4")
    alignment: Literal["asymmetric", "symmetric"] = Field(
        "asymmetric", description="symmetric lets the Anchors move towards the Variants as well"
    )
    batch_size: int = Field(1024, ge=8, description="cells of a step; an eighth of the cells if that is less")
    align_steps: int = Field(400, ge=1)
    refine_steps: int = Field(400, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    temperature: float = Field(0.2, gt=0)
    reach: int = Field(32, ge=1, le=1000, description="steps of the walk to the cells that Refine pulls towards")
    label_share: float = Field(0.5, ge=0, le=1, description="of walks that meet a known label, how many lead to it")
    pull: float = Field(0.7, ge=0, lt=1, description="how far Refine pulls: 0 stays at the backbone")
    max_epochs: int = Field(40, ge=1, description="bounds the steps of a phase on small data")
    evaluate_every: int = Field(50, ge=1)
    patience: int = Field(4, ge=1, description="evaluations without progress before a phase stops")
    refresh: bool = Field(False, description="rebuild the graph from the Anchor latent between the phases")
    refresh_blend: float = Field(0.5, ge=0, le=1)
    refresh_jaccard: float = Field(0.9, ge=0, le=1)
    input: Literal["cache", "stream"] = Field(
        "cache", description="where a step's own cells come from: their cached features, or their expression"
    )
    loadings: Literal["frozen", "learned"] = Field(
        "frozen", description='whether the first layers, PCA of the sketch, learn; learned needs input = "stream"'
    )
    checkpoint_every: int | None = Field(None, ge=1, description="steps; there is one at every evaluation anyway")
    checkpoints_kept: int = Field(2, ge=1)
    cache_device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where cached features lie while a GPU trains: on it if they fit (auto), or on disk"
    )
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the model's products in training")
    compile: bool = Field(False, description="compile the model with torch.compile")
    deterministic: bool = Field(False, description="refuse operations that differ from time to time on a GPU")
    tensorboard: bool = Field(False, description="also write checkpoints/tensorboard/ (pip install tensorboard)")

    @model_validator(mode="after")
    def _learning_needs_expression(self) -> TrainConfig:
        if self.loadings == "learned" and self.input != "stream":
            raise ValueError('loadings = "learned" needs expression to learn from; set train.input = "stream" too')
        return self


class EmbedConfig(_Settings):
    """What is written for every cell."""

    streams: bool = Field(False, description="also write the backbone and both streams beside the embedding")
    fuse: Literal["gate", "concatenate"] = Field(
        "gate", description="an ablation: the Variant latent beside the fused one, as more dimensions"
    )


class Config(_Settings):
    """All settings of a run."""

    seed: int = Field(0, ge=0)
    strength: float = Field(1.0, ge=0, le=1, description="how much is corrected and smoothed; 0 is PCA, 1 all of it")
    threads: int | None = Field(None, ge=1, description="threads of numeric libraries; all cores by default")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    max_memory: str | None = Field(None, description="e.g. 4GB; half of RAM by default")
    scheduler: str | None = Field(
        None,
        description="a dask.distributed cluster for the pass over all cells, e.g. tcp://10.0.0.1:8786; else threads",
    )
    data: DataConfig = DataConfig()
    sketch: SketchConfig = SketchConfig()
    genes: GenesConfig = GenesConfig()
    features: FeaturesConfig = FeaturesConfig()
    graph: GraphConfig = GraphConfig()
    train: TrainConfig = TrainConfig()
    embed: EmbedConfig = EmbedConfig()

    @model_validator(mode="after")
    def _labels_need_training(self) -> Config:
        train = self.train
        used = train.enabled and self.strength > 0 and train.pull > 0 and train.label_share > 0
        if self.data.label_key is not None and not used:
            raise ValueError(
                "data.label_key: labels play their part in training, which strength, train.pull or train.label_share = "
                "0 or train.enabled = false leave out; change that, or give no labels"
            )
        if train.input == "stream" and 0 not in self.graph.hops:
            raise ValueError(
                'train.input = "stream" reads hop 0 of the features, which graph.hops leaves out; add 0 to them'
            )
        if train.loadings == "learned" and self.graph.hops == (0,):
            raise ValueError(
                'train.loadings = "learned" would move the backbone, hop 0, that it is held by; add a hop to graph.hops'
            )
        if self.embed.fuse == "concatenate" and self.strength < 1:
            raise ValueError('embed.fuse = "concatenate" is an ablation of the full method; it needs strength = 1')
        return self

    @field_validator("scheduler")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and not _ADDRESS.fullmatch(value):
            raise ValueError(f"{value!r} is no address of a dask.distributed scheduler, such as tcp://10.0.0.1:8786")
        return value

    @field_validator("max_memory")
    @classmethod
    def _memory(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value


_ADDRESS = re.compile(r"(tcp|tls|ucx|ws|wss)://\S+")
_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
WATCHING = frozenset({"checkpoint_every", "checkpoints_kept", "cache_device", "tensorboard"})  # no result changes


def parse_bytes(text: str) -> int:
    """Return the number of bytes that ``text`` names: ``4GB`` is 4e9, ``2GiB`` is 2 * 2**30, ``512`` is 512.

    Raises
    ------
    ValueError
        Not a positive number with an optional unit (B, KB, MB, GB, TB, KiB, MiB, GiB, TiB).
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is not an amount of memory; write a number and a unit, such as 500MB, 4GB or 2GiB")
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise ValueError(f"{text!r} is no memory at all; write a number and a unit, such as 500MB, 4GB or 2GiB")
    return size


def memory_budget(config: Config) -> int:
    """Return how many bytes the run may use: ``max_memory``, by default half of what this process may have."""
    if config.max_memory is not None:
        return parse_bytes(config.max_memory)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_cgroup_limits(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))]) // 2


def _cgroup_limits(root: Path, membership: Path) -> Iterator[int]:
    """Yield every memory limit on the way from this process' control group to the root (versions 1 and 2)."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        here = base / group.lstrip("/")
        for directory in (here, *here.parents):
            try:
                yield int((directory / name).read_text())
            except (OSError, ValueError):  # not there, or "max"
                pass
            if directory == base:
                break
