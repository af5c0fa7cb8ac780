"""`Mapped`: what a mapping has found, read from its directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

import numpy as np

from schelix_scale.errors import RunError
from schelix_scale.mapping.encode import MAPPED
from schelix_scale.mapping.reference import MAPPED_ONTO
from schelix_scale.records import read_json
from schelix_scale.run_directory import RunDirectory

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

KEY = "X_schelix"


@final
class Mapped:
    """Cells mapped onto a reference: their latent, labels and novelty, in the order of the query.

    Attributes
    ----------
    adata
        obs (the query's columns and ours, which begin with ``schelix_``), ``obsm["X_schelix"]``, provenance in uns.
    manifest
        Reference, genes that were matched, batches, settings, checksums.
    path
        The directory; None if the mapping was not kept.
    """

    def __init__(self, adata: AnnData, manifest: dict[str, Any], path: Path | None) -> None:
        self.adata, self.manifest, self.path = adata, manifest, path

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read the mapping in directory ``path``.

        Raises
        ------
        RunError
            It is not a finished mapping.
        """
        directory = RunDirectory.open(path, finished=True)
        if MAPPED_ONTO not in directory.source:
            raise RunError(f"{directory.path} is a run, not a mapping. Read it with Run.open.")
        return cls(read_mapped(directory.path), read_json(directory.path / "manifest.json"), directory.path)

    @property
    def embedding(self) -> np.ndarray:
        """The latent of the query's cells, ``z_nd`` (n, d) float32."""
        return np.asarray(self.adata.obsm[KEY])

    @property
    def obs(self) -> pd.DataFrame:
        """One row a cell."""
        return self.adata.obs

    def __repr__(self) -> str:
        """Return size, reference and share of novel cells."""
        summary = self.manifest["summary"]
        return f"Mapped({summary['cells']:,} cells onto {summary['reference']}, {summary['novel_share']:.1%} novel)"


def read_mapped(folder: Path) -> AnnData:
    """Read the cells of a mapping."""
    import anndata

    return anndata.read_zarr(folder / MAPPED)
