from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from schelix_scale.model.streams import DualStream
from tests.training.tools import Cache, Counting, run


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices are faster on one thread, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[DualStream, Cache, Counting, Path]:
    """A training that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return *run(folder), folder
