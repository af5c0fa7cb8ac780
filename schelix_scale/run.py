"""A finished run as its user sees it: a run directory comes in, genes, cells, embedding and AnnData go out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

from schelix_scale.config import Config
from schelix_scale.errors import RunError
from schelix_scale.records import AGAIN, Artifact, StageRecord, read_json
from schelix_scale.run_directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from anndata import AnnData

__all__ = ["Artifact", "Run", "RunDirectory", "StageRecord"]


@final
class Run:
    """A finished run, as its user sees it: genes, cells and embedding, in row order of the source.

    Examples
    --------
    >>> run = Run.open("atlas-run")  # doctest: +SKIP
    >>> run.embedding.shape  # doctest: +SKIP
    (68579, 30)
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self.manifest: dict[str, Any] = read_json(directory.path / "manifest.json")

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open the run in directory ``path``.

        Raises
        ------
        RunError
            It is not a run, or not a finished one.
        """
        return cls(RunDirectory.open(path, finished=True))

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._directory.path

    @property
    def config(self) -> Config:
        """The settings of the run."""
        return self._directory.config

    @property
    def genes(self) -> pd.DataFrame:
        """One row a gene: its statistics and role (read anew at each access)."""
        import pandas as pd

        return pd.read_parquet(self._artifact("genes.parquet"))

    @property
    def cells(self) -> pd.DataFrame:
        """One row a cell: batch and the obs columns carried into the run (read anew at each access)."""
        import pandas as pd

        return pd.read_parquet(self._artifact("cells.parquet"))

    @property
    def embedding(self) -> np.ndarray:
        """The integrated embedding, ``z_nd`` (n, d) float32 (read anew at each access)."""
        import numpy as np
        import zarr

        return np.asarray(zarr.open_array(self._artifact("embedding.zarr") / "obsm" / "X_schelix", mode="r")[:], "f4")

    def to_anndata(self) -> AnnData:
        """Return the cells with obs, ``obsm["X_schelix"]`` and the provenance in uns (in memory)."""
        import anndata

        return anndata.read_zarr(self._artifact("embedding.zarr"))

    def verify(self) -> list[str]:
        """Recompute every checksum and return the problems, each with its remedy."""
        return self._directory.verify()

    def __repr__(self) -> str:
        """Return path, summary and version."""
        summary = self.manifest.get("summary", {})
        facts = [f"{k}={_short(v)}" for k, v in summary.items() if isinstance(v, int | float | str)]
        made = f"finished {self.manifest.get('finished')} by schelix {self.manifest.get('schelix_version')}"
        return f"Run({str(self.path)!r}: {', '.join([*facts[:6], made])})"

    def _artifact(self, name: str) -> Path:
        path = self.path / name
        if not path.exists():
            raise RunError(f"the run {self.path} has lost {name}. {AGAIN} to rebuild it.")
        return path


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
