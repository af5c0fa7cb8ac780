"""Embeddings in a SOMA experiment are replaced as a whole: an export that is stopped leaves the old or the new ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiledbsoma
import tiledbsoma.io

from schelix_scale.export_soma import export_into_source
from schelix_scale.progress import QuietReporter, Reporter, Stage

from .stores.truth import make_truth, to_anndata
from .test_export import Z, finished_run


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    tiledbsoma.io.from_anndata(str(tmp_path / "cells.soma"), to_anndata(make_truth()), "RNA")
    return tmp_path / "cells.soma"


class Stopping(Reporter):
    """Ctrl-C comes when the first array is written."""

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "cells") -> Iterator[Stage]:
        """Let the stage be interrupted."""
        yield self

    def advance(self, n: int = 1) -> None:
        """Interrupt."""
        raise KeyboardInterrupt

    def say(self, message: str) -> None:
        """Do nothing."""

    warn = say


def obsm_of(experiment: Path) -> dict[str, np.ndarray]:
    """Read obsm with TileDB-SOMA alone."""
    with tiledbsoma.Collection.open(str(experiment / "ms" / "RNA" / "obsm")) as obsm:
        tables = {name: obsm[name].read().tables().concat().to_pandas() for name in obsm}
    return {
        name: table.pivot(index="soma_dim_0", columns="soma_dim_1", values="soma_data").to_numpy()
        for name, table in tables.items()
    }


def writes(experiment: Path) -> int:
    """Return how many times members of obsm were written."""
    return len(list((experiment / "ms" / "RNA" / "obsm" / "__group").iterdir()))


def folders(experiment: Path) -> set[str]:
    return {path.name for path in (experiment / "ms" / "RNA" / "obsm").iterdir() if "X_schelix" in path.name}


def test_an_interrupted_export_leaves_the_old_embedding_and_nothing_else(experiment: Path, tmp_path: Path) -> None:
    old = finished_run(tmp_path / "old", experiment, X_schelix_anchor=Z + 1)
    new = finished_run(tmp_path / "new", experiment, X_schelix=Z + 2)
    with pytest.raises(KeyboardInterrupt):
        export_into_source(old, experiment, reporter=Stopping())
    assert (obsm_of(experiment), folders(experiment)) == ({}, set())
    export_into_source(old, experiment)
    before = folders(experiment)
    with pytest.raises(KeyboardInterrupt):
        export_into_source(new, experiment, overwrite=True, reporter=Stopping())
    found = obsm_of(experiment)
    assert set(found) == {"X_schelix", "X_schelix_anchor"}
    np.testing.assert_array_equal(found["X_schelix"], Z)
    assert folders(experiment) == before


def test_old_embeddings_are_replaced_in_one_write(experiment: Path, tmp_path: Path) -> None:
    export_into_source(finished_run(tmp_path / "old", experiment, X_schelix_anchor=Z + 1), experiment)
    before = writes(experiment)
    export_into_source(finished_run(tmp_path / "new", experiment, X_schelix=Z + 2), experiment, overwrite=True)
    assert writes(experiment) == before + 1, "a process that is killed between two would lose the embedding"
    found = obsm_of(experiment)
    assert set(found) == {"X_schelix"}
    np.testing.assert_array_equal(found["X_schelix"], Z + 2)
    assert len(folders(experiment)) == 1


def test_old_arrays_that_cannot_be_removed_are_told_of(experiment: Path, tmp_path: Path) -> None:
    export_into_source(finished_run(tmp_path / "old", experiment), experiment)
    (stuck,) = (experiment / "ms" / "RNA" / "obsm" / name for name in folders(experiment))
    reporter = QuietReporter()
    stuck.rename(tmp_path / "elsewhere")
    stuck.symlink_to(tmp_path / "elsewhere")  # a link is not followed
    new = finished_run(tmp_path / "new", experiment, X_schelix=Z + 2)
    export_into_source(new, experiment, overwrite=True, reporter=reporter)
    np.testing.assert_array_equal(obsm_of(experiment)["X_schelix"], Z + 2)
    assert any("cannot be removed" in message for message in reporter.messages)
