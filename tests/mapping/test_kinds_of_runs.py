"""Whatever the settings of the reference: its own cells land on themselves, new ones among their types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import schelix_scale
from schelix_scale.progress import QuietReporter
from tests.mapping.conftest import SETTINGS, cells

KINDS = {
    "half strength, all streams, graph refreshed": {
        "strength": 0.5,
        "embed__streams": True,
        "train__refresh": True,
        "train__refresh_jaccard": 1.0,
    },
    "learned loadings, other hops, an index": {
        "train__input": "stream",
        "train__loadings": "learned",
        "graph__method": "ivf",
        "graph__hops": (0, 4),
    },
    "single stream, untrained": {"genes__min_signal": 1.0, "train__enabled": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_maps_and_extends(kind: str, tmp_path: Path) -> None:
    made = cells()
    new = (made.obs["batch"] == "b3").to_numpy()
    seen, query = made[~new].copy(), made[new].copy()
    seen.write_h5ad(tmp_path / "seen.h5ad")
    settings = {**SETTINGS, **KINDS[kind]}
    quiet = QuietReporter()
    run = schelix_scale.integrate(
        tmp_path / "seen.h5ad", batch_key="batch", out=tmp_path / "run", reporter=quiet, **settings
    )
    assert run.manifest["summary"]["single_stream"] == (kind == "single stream, untrained")
    reference, z = schelix_scale.Reference.open(run.path), run.embedding
    own = (seen.obs["batch"] == "b1").to_numpy()
    again = reference.map(seen[own].copy(), batch_key="batch", label_key="cell_type")
    spread = np.linalg.norm(z - z.mean(axis=0), axis=1).mean()
    assert np.median(np.linalg.norm(again.embedding - z[own], axis=1)) < 0.03 * spread
    mapped = reference.map(query, batch_key="batch", label_key="cell_type")
    assert (mapped.obs["schelix_cell_type"].to_numpy() == query.obs["cell_type"].to_numpy()).mean() > 0.95
    obsm = set(run.to_anndata().obsm)
    assert set(mapped.adata.obsm) == obsm
    extended = schelix_scale.extend(run.path, query, batch_key="batch", out=tmp_path / "run2", reporter=quiet)
    assert extended.verify() == []
    assert extended.manifest["summary"]["extension"]["recall"] > 0.95
    assert set(extended.to_anndata().obsm) == obsm
    np.testing.assert_array_equal(extended.embedding[: len(z)], z)
    one = schelix_scale.Reference.open(extended.path).map(query[:1].copy(), label_key="cell_type")
    assert one.obs["schelix_cell_type"].tolist() == query.obs["cell_type"].tolist()[:1]
