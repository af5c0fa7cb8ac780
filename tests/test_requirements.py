"""What a run demands of obs: protected levels."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd

from schelix_scale.config import Config, DataConfig
from schelix_scale.requirements import requirements
from schelix_scale.stores import MemoryStore


def test_protected_levels_are_combinations_of_values_whatever_their_texts() -> None:
    obs = pd.DataFrame({"a": ["x | y", "x", "x", "x | y"] * 2, "b": ["z", "y | z", "z", "z"] * 2})
    obs["c"] = [1, 1, 1, 2] * 2
    obs["batch"] = ["one", "two"] * 4
    cells = ad.AnnData(np.ones((8, 25), np.float32), obs=obs.set_axis([f"cell{i}" for i in range(8)], axis=0))
    for columns in (["a", "b"], ["b", "a", "c"], ["a"]):
        found = requirements(MemoryStore(cells), Config(data=DataConfig(protect=tuple(columns))))["levels"]()
        expected = obs.groupby(columns).ngroup().to_numpy()
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)
