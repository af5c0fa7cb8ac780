"""Batches that are off as a whole: known cells are not taken for novel, and cells of an unseen type still are."""

from __future__ import annotations

from collections.abc import Callable

import anndata
import numpy as np
import pytest
from scipy import sparse

from schelix_scale import Reference
from tests.mapping.conftest import NOVEL, Atlas


def with_counts(query: anndata.AnnData, counts: np.ndarray) -> anndata.AnnData:
    out = query.copy()
    out.X = sparse.csr_matrix(counts.astype(np.float32))
    return out


def thinned(query: anndata.AnnData) -> anndata.AnnData:
    """Half of the counts."""
    return with_counts(query, np.random.default_rng(1).binomial(query.X.toarray().astype(int), 0.5))


def ambient(query: anndata.AnnData) -> anndata.AnnData:
    """A tenth of the counts more, of the batch's mean profile."""
    counts = query.X.toarray()
    profile = counts.sum(axis=0) / counts.sum()
    more = np.random.default_rng(2).poisson(0.1 * counts.sum(axis=1, keepdims=True) * profile)
    return with_counts(query, counts + more)


def biased(query: anndata.AnnData) -> anndata.AnnData:
    """Genes that are found half again as often, or as seldom."""
    rng = np.random.default_rng(3)
    return with_counts(query, rng.poisson(query.X.toarray() * np.exp(rng.normal(0, 0.4, query.n_vars))))


@pytest.mark.parametrize("change", [thinned, ambient, biased])
def test_a_batch_that_is_off_is_not_novel(
    change: Callable[[anndata.AnnData], anndata.AnnData], reference: Reference, atlas: Atlas
) -> None:
    mapped = reference.map(change(atlas.query), batch_key="batch", label_key="cell_type")
    novel = (atlas.query.obs["cell_type"] == NOVEL).to_numpy()
    p = mapped.obs["schelix_novelty_p"].to_numpy()
    assert (p[~novel] <= 0.01).mean() <= 0.02
    assert (p[novel] <= 0.01).mean() > 0.8


def test_small_batches_are_calibrated_as_such(reference: Reference, atlas: Atlas) -> None:
    """Ten batches of 16 cells each, all of known types."""
    query = atlas.known
    query.obs["batch"] = [f"small{i % 10}" for i in range(query.n_obs)]
    mapped = reference.map(query, batch_key="batch", label_key="cell_type")
    assert (mapped.obs["schelix_novelty_p"] <= 0.01).mean() <= 0.03
    large = reference.map(atlas.known, batch_key="batch", label_key="cell_type").obs["schelix_novelty"].mean()
    assert abs(mapped.obs["schelix_novelty"].mean() - large) < 1.5, "scores of small and large batches are comparable"
