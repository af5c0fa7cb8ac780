"""Split of one batch in two at random: there is no batch effect, so nothing should change.

A data set comes in; for every method go out rows of how many of the 30 nearest neighbours are as before integration.
Before is the embedding of `pca`, from which Harmony starts; for schelix also its own embedding of the same cells when
it is told to correct nothing (``genes.min_signal=1``), since it does not start from `pca`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from _cache import Cache
from _guards import jaccard, neighbors
from _study import Problem, ask, say, settings_of
from _tasks import Task

BATCH_KEY = "pseudo_batch"
UNCORRECTED = "genes.min_signal=1"
METHODS = ("schelix", "pca", "harmony")
_K = 30


def study_split(
    problem: Problem, seeds: int, settings: Sequence[str], scorer: Executor, scratch: Path, cache: Cache
) -> list[dict[str, Any]]:
    """Split the largest batch with every seed, run the methods, and return a row a method and seed.

    Raises
    ------
    TaskFailed
        A run failed.
    ValueError
        The file lacks batches.
    """
    rows = []
    for seed in range(seeds):
        file = scratch / f"{problem.data.stem}-{seed}.h5ad"
        about = ask(scorer, write_split, str(problem.data), problem.batch_key, seed, str(file))
        made: dict[str, dict[str, str]] = {}
        for name in (*METHODS, "uncorrected"):
            method, more = ("schelix", [UNCORRECTED]) if name == "uncorrected" else (name, [])
            own = settings_of(method, [*settings, *more])
            task = Task(str(file), BATCH_KEY, method, seed, own, problem.label_key)
            outcome = cache.run(task, scratch / f"{seed}-{name}")
            made[name] = outcome.embeddings
            say(f"  {name}, seed {seed}: {outcome.seconds:.1f} s{', kept' * outcome.kept}")
        for method in METHODS:
            z, before = made[method][method], made["pca"]["pca"]
            own_before = made["uncorrected"]["schelix"] if method == "schelix" else before
            against_pca, against_own = ask(scorer, compare_files, [(z, before), (z, own_before)])
            rows.append(
                {
                    "data": problem.data.stem,
                    "batch_key": problem.batch_key,
                    **about,
                    "method": method,
                    "seed": seed,
                    "settings": list(settings) if method == "schelix" else [],
                    "corrected": "schelix:variant" in made[method] if method == "schelix" else method != "pca",
                    "against_pca": against_pca,
                    "against_own": against_own,
                }
            )
    return rows


def write_split(data: str, batch_key: str, seed: int, out: str) -> dict[str, Any]:
    """Write the cells of the largest batch, one random half called ``a``, the other ``b``; say which, and how many."""
    import anndata
    import numpy as np

    adata = anndata.read_h5ad(data)
    names = adata.obs[batch_key].astype(str)
    largest = names.value_counts().index[0]
    adata = adata[(names == largest).to_numpy()].copy()
    half = np.arange(adata.n_obs) < adata.n_obs // 2
    adata.obs[BATCH_KEY] = np.where(np.random.default_rng([seed, 2]).permutation(half), "a", "b")
    adata.write_h5ad(out)
    return {"n_cells": adata.n_obs, "largest": str(largest)}


def compare_files(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Return the mean Jaccard index of the 30 nearest neighbours in the two embeddings of every pair of npy files."""
    import numpy as np

    return [float(jaccard(*(neighbors(np.load(file), _K) for file in pair)).mean()) for pair in pairs]
