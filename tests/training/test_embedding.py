"""What several machines write into one embedding is complete before it is published."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

from schelix_scale import embedding
from schelix_scale.errors import TrainingError
from schelix_scale.training.dist import Ranks
from schelix_scale.training.loop import build_model
from tests.training.tools import CONFIG, cached

KEYS = {"X_schelix": "fused"}


class Apart(Ranks):
    """The first of two ranks, whose other one works on a machine that is heard of late."""

    def agree(self, value: object) -> object:
        """Wait for nobody."""
        return value


def write(path: Path, ranks: Ranks) -> None:
    features = cached()
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(features.n_cells)])
    embedding.write_embedding(
        path, build_model(features, CONFIG, 0), features, KEYS, obs, {}, torch.device("cpu"), ranks=ranks
    )


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(embedding, "ENCODE_CELLS", 50)
    write(tmp_path / "expected.zarr", Ranks())
    return tmp_path / "expected.zarr"


def test_chunks_that_appear_late_are_waited_for(expected: Path, tmp_path: Path) -> None:
    source, target = (path / "obsm" / "X_schelix" / "c" for path in (expected, tmp_path / "found.zarr"))

    def other_machine() -> None:
        for number in ("1", "3"):
            shutil.copytree(source / number, target / number)

    late = threading.Timer(1.0, other_machine)
    late.start()
    write(tmp_path / "found.zarr", Apart(0, 2))
    late.join()
    found = anndata.read_zarr(tmp_path / "found.zarr").obsm["X_schelix"]
    np.testing.assert_array_equal(found, anndata.read_zarr(expected).obsm["X_schelix"])
    assert np.abs(found).sum(axis=1).min() > 0


@pytest.mark.usefixtures("expected")
def test_chunks_that_never_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "SEEN_SECONDS", 0.3)
    with pytest.raises(TrainingError, match=r"X_schelix.c does not have the 5 chunks .* Do all machines see the same"):
        write(tmp_path / "found.zarr", Apart(0, 2))
