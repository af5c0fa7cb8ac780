"""A trained model and its cached features -> the latent of every cell, by row number, as an AnnData zarr."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.nn.functional import normalize

from schelix_scale.config import EmbedConfig
from schelix_scale.errors import TrainingError
from schelix_scale.graph.vectors import row_blocks
from schelix_scale.model.streams import DualStream, Latent
from schelix_scale.training.data import CachedFeatures
from schelix_scale.training.dist import ALONE, Ranks
from schelix_scale.training.expression import Expression
from schelix_scale.training.refresh import ENCODE_CELLS, encode

KEY = "X_schelix"
CONCATENATED, BESIDE = "concatenated", 0.4
SEEN_SECONDS = 120.0  # after which files of other machines must have appeared
STREAM_KEYS = {"backbone": f"{KEY}_backbone", "anchor": f"{KEY}_anchor", "variant": f"{KEY}_variant"}


def output_keys(model: DualStream, trained: bool, config: EmbedConfig) -> dict[str, str]:
    """Return which latent goes to which obsm key; the embedding of an untrained run is the backbone."""
    keys = {KEY: "fused" if trained else "backbone"}
    if trained and config.fuse == "concatenate" and not model.single_stream:
        keys[KEY] = CONCATENATED
    if config.streams and not trained:  # the streams of a network that learned nothing mean nothing
        keys |= {STREAM_KEYS["backbone"]: "backbone"}
    elif config.streams:
        keys |= {key: part for part, key in STREAM_KEYS.items() if part != "variant" or not model.single_stream}
    return keys


def embedding_dims(features: CachedFeatures, part: str) -> int:
    """Return how many dimensions a latent has."""
    dims: int = features.anchor_nta.shape[2]
    return 2 * dims if part == CONCATENATED else dims


def _part(latent: Latent, part: str) -> torch.Tensor:
    if part == CONCATENATED:  # Variant latents were trained by their directions: at unit length, and less than Anchors
        return torch.cat([latent.fused, BESIDE * normalize(latent.variant, dim=1)], dim=1)
    chosen: torch.Tensor = getattr(latent, part)
    return chosen


def write_embedding(
    path: Path,
    model: DualStream,
    features: CachedFeatures,
    keys: Mapping[str, str],
    obs: pd.DataFrame,
    uns: Mapping[str, Any],
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
    expression: Expression | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Write ``path``, readable by `anndata.read_zarr`: obs, uns and one (n, d) float32 array per obsm key.

    Rows are written block by block at their row numbers, each zarr chunk by one block, and blocks in turn by the
    ranks: what is written does not depend on how many there are. A model with learned loadings reads the
    ``expression`` of all cells once more.

    Raises
    ------
    TrainingError
        A latent is not finite, or what other ranks have written does not appear.
    """
    import zarr

    if ranks.main:
        _create(path, features, keys, obs, uns)
    ranks.wait()
    obsm = zarr.open_group(path / "obsm", mode="r+")
    model.eval()
    for number, (start, stop) in enumerate(row_blocks(features.n_cells, ENCODE_CELLS)):
        if number % ranks.world == ranks.rank:
            latent: Latent = encode(model, features, start, stop, device, expression)
            if not torch.isfinite(latent.fused).all():
                raise TrainingError(
                    f"the embedding of cells {start} to {stop} is not finite; train again with another seed."
                )
            for key, part in keys.items():
                array = obsm[key]
                assert isinstance(array, zarr.Array)
                with zarr.config.set({"array.write_empty_chunks": True}):  # their number is checked
                    array[start:stop] = _part(latent, part).numpy()
        advance(stop - start)
    ranks.wait()
    if ranks.main:
        _await_chunks(path, keys, -(-features.n_cells // ENCODE_CELLS))
        with warnings.catch_warnings():  # anndata writes consolidated metadata too, and reads faster with it
            warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
            zarr.consolidate_metadata(path)


def _await_chunks(path: Path, keys: Iterable[str], count: int) -> None:
    """Wait until this machine sees the chunks that others have written: a shared file system may take a while."""
    until = time.monotonic() + SEEN_SECONDS
    folders = [path / "obsm" / key / "c" for key in keys]
    while missing := [folder for folder in folders if len(list(folder.glob("*"))) < count]:
        if time.monotonic() > until:
            raise TrainingError(
                f"{missing[0]} does not have the {count:,} chunks that the ranks have written, {SEEN_SECONDS:.0f} s "
                "after they have. Do all machines see the same run directory? Run the same command again."
            )
        time.sleep(0.2)


def _create(
    path: Path, features: CachedFeatures, keys: Mapping[str, str], obs: pd.DataFrame, uns: Mapping[str, Any]
) -> None:
    """Write all but the values of the embedding."""
    import anndata
    import zarr

    with warnings.catch_warnings(), anndata.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        anndata.AnnData(obs=obs, uns={"schelix": dict(uns)}).write_zarr(path)
    obsm = zarr.open_group(path / "obsm", mode="r+")
    for key, part in keys.items():
        width = embedding_dims(features, part)
        array = obsm.create_array(key, shape=(features.n_cells, width), chunks=(ENCODE_CELLS, width), dtype="float32")
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
