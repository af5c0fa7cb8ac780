"""Runs of a store that is open already: what they record of how it was opened suffices to open it again."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import tiledbsoma
import tiledbsoma.io
from scipy import sparse

from schelix_scale.config import Config, DataConfig
from schelix_scale.export_soma import export_into_source
from schelix_scale.run import RunDirectory
from schelix_scale.stores import open_recorded, open_store
from schelix_scale.stores.joined import source_address

from .stores.truth import make_truth, to_anndata
from .test_export import write


def test_a_run_of_an_open_store_is_exported_into_its_experiment(tmp_path: Path) -> None:
    truth, experiment = make_truth(), tmp_path / "cells.soma"
    tiledbsoma.io.from_anndata(str(experiment), to_anndata(truth), "gene")
    with tiledbsoma.Experiment.open(str(experiment), "w") as opened:
        tiledbsoma.io.add_X_layer(opened, "gene", "twice", sparse.csr_matrix(truth.x_ng * 2))
    settings = {"obs_filter": "batch == 'b1'", "measurement": "gene", "timestamp": None}
    tuned = {"soma.init_buffer_bytes": "1000000"}
    keys = {**tuned, "vfs.s3.aws_secret_access_key": "SECRET"}
    store = open_store(f"file://{experiment}/", "twice", tiledb=keys, **settings)
    source = {"uri": source_address(store), "layer": store.layer, "fingerprint": store.fingerprint()}
    source |= store.provenance()
    assert source["opened"] == {"layer": "twice", "tiledb": tuned, **settings}

    again = open_recorded(json.loads(json.dumps(source)), DataConfig(tiledb={"vfs.s3.region": "eu-west-1"}))
    chosen = np.flatnonzero(truth.obs["batch"] == "b1")
    np.testing.assert_array_equal(again.read(np.arange(again.n_cells)).toarray(), truth.x_ng[chosen] * 2)
    assert again.fingerprint() == source["fingerprint"]
    assert dict(again.address.settings)["vfs.s3.region"] == "eu-west-1"

    z_nd = np.random.default_rng(0).normal(size=(chosen.size, 3)).astype(np.float32)
    with RunDirectory.claim(tmp_path / "run", Config(), source) as run:
        run.begin("embed")
        with run.publish("embedding.zarr") as partial:
            write(ad.AnnData(obs=truth.obs.iloc[chosen], obsm={"X_schelix": z_nd}), partial)
        run.finish("embed", "0", ["embedding.zarr"], 1.0)
        run.finish_run({"cells": chosen.size})
    export_into_source(tmp_path / "run", f"{experiment}/")
    with tiledbsoma.Experiment.open(str(experiment)) as opened:
        table = opened.ms["gene"].obsm["X_schelix"].read().tables().concat().to_pandas()
    found = table.pivot(index="soma_dim_0", columns="soma_dim_1", values="soma_data")
    assert list(found.index) == list(chosen)
    np.testing.assert_array_equal(found, z_nd)
