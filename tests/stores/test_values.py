"""Counts, linear or log: synthetic batches of each kind, and the real data sets when they are there."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from schelix_scale.errors import DataError
from schelix_scale.stores.values import ValueDecision, decide_values

REAL = Path("/work/shared/data")


def counts(seed: int = 0, n: int = 40, g: int = 60) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(0.5, 4.0, g) * rng.lognormal(0, 0.6, (n, 1)) + 0.05, (n, g)).astype(float)


def normalised(total: float, seed: int = 0) -> np.ndarray:
    x_ng = counts(seed)
    return x_ng / x_ng.sum(axis=1, keepdims=True) * total


def decide(*batches: np.ndarray, asked: str = "auto") -> ValueDecision:
    x_ng = sparse.csr_matrix(np.vstack(batches).astype(np.float32))
    codes = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    return decide_values(x_ng, codes, [f"b{i}" for i in range(len(batches))], asked)


@pytest.mark.parametrize(
    ("x_ng", "kind", "reason"),
    [
        (counts(), "counts", "all values are integral and at most"),
        (np.minimum(counts(), 3), "counts", "at most 3"),
        (np.log1p(counts()), "log", "exp(x) - 1 is integral: a logarithm of counts that were not normalised"),
        (np.log2(counts() + 1), "log", "2^x - 1 is integral"),
        (np.log1p(normalised(1e4)), "log", "row sums of exp(x) - 1 are all about 10,000"),
        (np.log2(normalised(1e6) + 1), "log", "row sums of 2^x - 1 are all about 1,000,000"),
        (np.log1p(normalised(1e4))[:, ::3], "log", "values are not integral and at most"),
        (np.log1p(normalised(1e4)).astype(np.float16), "log", "log: "),
        (normalised(1e4), "linear", "values are not integral"),
        (normalised(20), "linear", "row sums are all about 20"),
        (normalised(1)[:, ::3], "linear", "no value is above 1: fractions"),
        (counts() * 1.01, "linear", "values are not integral"),
    ],
)
def test_one_kind(x_ng: np.ndarray, kind: str, reason: str) -> None:
    decision = decide(x_ng, x_ng[:20])
    assert decision.kind == kind
    assert decision.reason.startswith(f"{kind}: ")
    assert reason in decision.reason


def test_counts_and_linear_are_linear() -> None:
    decision = decide(counts(), counts(1) * 1.37, counts(2))
    assert decision.kind == "linear"
    assert "not integral in 1 of 3 batches (b1) and counts in the others" in decision.reason


def test_log_and_others_are_an_error_unless_asked() -> None:
    batches = counts(), np.log1p(normalised(1e4, 1)), counts(2) * 1.37
    with pytest.raises(DataError, match=r"1 look log-transformed \(b1\), 2 do not \(b0, b2\)"):
        decide(*batches)
    assert decide(*batches, asked="linear").kind == "linear"


def test_batch_without_values_has_no_vote() -> None:
    assert decide(np.log1p(normalised(1e4)), np.zeros((5, 60))).kind == "log"
    with pytest.raises(DataError, match="All values of the 5 sampled cells are zero"):
        decide(np.zeros((5, 60)))


def test_asked() -> None:
    assert decide(counts(), asked="counts").reason.startswith("counts: as asked; all values are integral")
    assert decide(np.minimum(counts(), 9), asked="log").kind == "log"
    with pytest.raises(
        DataError, match=r'"counts" was asked, but \d+ of \d+ sampled values are not integral.*"linear"'
    ):
        decide(normalised(1e4), asked="counts")
    with pytest.raises(DataError, match=r'"log" was asked, but the largest sampled value is .*"linear"'):
        decide(counts() * 50, asked="log")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("human_dc", "log"),
        ("pancreas_cross", "linear"),
        ("worm_l2_neurons", "counts"),
        ("sc_mixology_5cl_10x", "counts"),
        ("kang_ifnb_donor", "counts"),
    ],
)
def test_real(name: str, kind: str) -> None:
    path = REAL / f"{name}.h5ad"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    adata = ad.read_h5ad(path)[::5]
    batch = adata.obs["batch"].astype("category").cat
    decision = decide_values(sparse.csr_matrix(adata.X), batch.codes.to_numpy(), list(batch.categories))
    assert decision.kind == kind
