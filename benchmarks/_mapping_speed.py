"""How fast is a large reference mapped onto and extended? The command line is run and measured as its users run it.

    python benchmarks/_mapping_speed.py RUN QUERY --batch-key batch --label-key cell_type
    python benchmarks/_mapping_speed.py RUN QUERY --label-key cell_type --symphony --integrate --readme

Measures `schelix map` of all of QUERY and `schelix extend` with its first batches (--extend-cells), and keeps rows in
results/mapping-speed.json: seconds of each stage and of the whole command, CPU seconds, cells a second with and without
what is done once for a reference (calibration), peak memory. QUERY and the source of RUN are anndata zarr.

--symphony maps the same query with symphonypy, onto Harmony of some cells of the reference (--symphony-cells).
--integrate integrates reference and new cells whole, for the cost of an extension and the scib total it loses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from _machine import ROOT, circumstances, threads
from _mapping_report import read_rows, update_readme
from _sections import save_rows

HERE = ROOT / "benchmarks"
ONCE = ("calibrate",)


def measure(command: Sequence[str]) -> dict[str, float]:
    """Run a command; return its seconds, CPU seconds and peak memory."""
    started = time.perf_counter()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen([sys.executable, *command], env={**os.environ, "PYTHONPATH": path})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(usage.ru_maxrss * unit / 1e6, 1),
    }


def run_verb(verb: str, arguments: Sequence[str], out: Path) -> dict[str, Any]:
    """Run ``schelix VERB ... -o OUT``; return what it took and what its manifest says."""
    found = measure(["-m", "schelix_scale", verb, *arguments, "-o", str(out), "--quiet"])
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    stages = {name: record["seconds"] for name, record in manifest["stages"].items()}
    summary = manifest["summary"]
    new = summary.get("extension", summary)["cells"]
    steady = sum(value for name, value in stages.items() if name not in ONCE)
    before = summary.get("reference_cells", summary["cells"] - new)
    return {
        "verb": f"schelix {verb}",
        "cells": new,
        "reference_cells": before or None,
        "stages": stages,
        **found,
        "cells_per_second": round(new / found["seconds"], 1),
        "cells_per_second_steady": round(new / steady, 1) if verb == "map" else None,
    }


def write_new(query: str, cells: int, batch_key: str, out: Path) -> None:
    """Write so many cells of a query, batch after batch, under names of their own.

    No name of a batch or cell is one of the reference, so that a whole integration has the same batches.
    """
    import anndata

    adata = anndata.read_zarr(query)
    batch = adata.obs[batch_key].astype(str)
    rows = np.sort(np.argsort(batch.to_numpy(), kind="stable")[:cells])
    new = adata[rows].copy()
    new.obs[batch_key] = "new-" + new.obs[batch_key].astype(str)
    new.obs_names = "new-" + new.obs_names.astype(str)
    new.write_zarr(out)


def symphony(job: Path) -> None:
    """Map a query with symphonypy, as `_mapping_methods` does; the job says what, and gets the seconds."""
    import anndata
    from _mapping_methods import Job
    from _mapping_methods import symphony as map_with_symphony

    content = json.loads(job.read_text(encoding="utf-8"))
    adata = anndata.read_zarr(content["source"])
    rows = np.random.default_rng(0).choice(adata.n_obs, min(content["cells"], adata.n_obs), replace=False)
    paths = [job.with_name(f"{name}.h5ad") for name in ("reference", "query")]
    adata[np.sort(rows)].copy().write_h5ad(paths[0])
    del adata
    anndata.read_zarr(content["query"]).write_h5ad(paths[1])
    found = map_with_symphony(Job("symphony", *map(str, paths), content["batch_key"], content["label_key"]), job.parent)
    answer = {"map_seconds": float(found["map_seconds"]), "cells": len(found["label"]), "reference_cells": len(rows)}
    job.write_text(json.dumps(answer), encoding="utf-8")


def totals(extended: Path, whole: Path, batch_key: str, label_key: str, cells: int) -> tuple[float, float]:
    """Return the scib totals of two runs of the same cells, on a sample of which half are new ones."""
    from _scores import score

    from schelix_scale import Run

    runs = [Run.open(path) for path in (extended, whole)]
    n, new = len(runs[0].embedding), runs[0].manifest["summary"]["extension"]["cells"]
    rng, half = np.random.default_rng(0), min(cells // 2, new)
    rows = np.sort(np.r_[rng.choice(n - new, cells - half, replace=False), n - new + rng.choice(new, half, False)])
    obs = runs[0].cells.iloc[rows][[batch_key, label_key]].astype(str)
    if not (obs.to_numpy() == runs[1].cells.iloc[rows][[batch_key, label_key]].astype(str).to_numpy()).all():
        raise SystemExit(f"{extended} and {whole} are not runs of the same cells in the same order")
    obs.columns = ["batch", "label"]
    pca = np.load(whole / "features" / "anchor.npy", mmap_mode="r")[rows]
    found = [score(np.asarray(run.embedding)[rows], np.asarray(pca), obs.astype("category"))["total"] for run in runs]
    return float(found[0] or np.nan), float(found[1] or np.nan)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = parser().parse_args(argv)
    if arguments.symphony_job is not None:
        symphony(arguments.symphony_job)
        return 0
    if arguments.run is None or arguments.query is None:
        if not arguments.readme:
            parser().error("name a finished RUN and a QUERY, or give --readme alone")
        write_tables(arguments.out)
        return 0
    batch = ["--batch-key", arguments.batch_key]
    label = ["--label-key", arguments.label_key] if arguments.label_key else []
    about = {**circumstances(), "threads": threads()}

    def keep(row: dict[str, Any]) -> None:
        kept = {old["verb"]: old for old in read_rows(arguments.out)}  # what is not measured now stays as it was
        save_rows(arguments.out, list({**kept, row["verb"]: {**row, **about}}.values()))
        print({name: row[name] for name in row if name != "stages"}, row.get("stages", ""), flush=True)

    with tempfile.TemporaryDirectory(prefix="mapping-speed-", dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        keep(run_verb("map", [arguments.run, arguments.query, *batch, *label], folder / "map"))
        source = json.loads((Path(arguments.run) / "manifest.json").read_text(encoding="utf-8"))["source"]["uri"]
        if arguments.symphony:
            keep(measured_symphony(arguments, source, folder))
        new = folder / "new.zarr"
        apart = (arguments.query, arguments.extend_cells, arguments.batch_key, new)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a child's peak is never below its parent's
            pool.submit(write_new, *apart).result()
        extended = run_verb("extend", [arguments.run, str(new), *batch], folder / "extended")
        keep(extended)
        if arguments.integrate:
            whole = run_verb("integrate", [source, str(new), *batch], folder / "whole")
            keys = arguments.batch_key, arguments.label_key
            pair = totals(folder / "extended", folder / "whole", *keys, 10_000)
            share = extended["seconds"] / whole["seconds"]
            note = f"extend takes {share:.1%} of it; scib total {pair[0]:.3f} against {pair[1]:.3f} of 10,000 cells"
            keep({**whole, "totals": pair, "extend_share": share, "note": note})
    if arguments.readme:
        write_tables(arguments.out)
    return 0


def write_tables(out: Path) -> None:
    """Write what was measured before, and now, into the README beside."""
    update_readme(HERE / "README.md", read_rows(out.with_name("mapping.json")), read_rows(out))


def measured_symphony(arguments: argparse.Namespace, source: str, folder: Path) -> dict[str, Any]:
    """Return the row of Symphony, in a process of its own."""
    job = folder / "symphony" / "job.json"
    job.parent.mkdir()
    content = {"source": source, "query": arguments.query, "cells": arguments.symphony_cells}
    content |= {"batch_key": arguments.batch_key, "label_key": arguments.label_key}
    job.write_text(json.dumps(content), encoding="utf-8")
    whole = measure([str(HERE / "_mapping_speed.py"), "--symphony-job", str(job)])
    answer = json.loads(job.read_text(encoding="utf-8"))
    seconds = answer.pop("map_seconds")
    note = f"mapping alone, in memory; {whole['seconds']:,.0f} s with reading and Harmony of that many cells"
    rate = round(answer["cells"] / seconds, 1)
    return {
        "verb": "symphony",
        **answer,
        "seconds": round(seconds, 2),
        "cells_per_second_steady": rate,
        "peak_mb": whole["peak_mb"],
        "note": note,
    }


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a finished run")
    parser.add_argument("query", nargs="?", metavar="QUERY", help="new cells, an anndata zarr")
    parser.add_argument("--batch-key", default="batch")
    parser.add_argument("--label-key", default=None, help="transfer labels too")
    parser.add_argument("--extend-cells", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--symphony", action="store_true", help="map with symphonypy too; needs --label-key")
    parser.add_argument("--symphony-cells", type=int, default=50_000, help="of its reference (default: %(default)s)")
    parser.add_argument("--symphony-job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--integrate", action="store_true", help="integrate all cells too; needs --label-key")
    parser.add_argument("--scratch", help="a folder on a disk with room for it all")
    parser.add_argument(
        "--readme", action="store_true", help="write the tables into the README beside; nothing else without RUN"
    )
    parser.add_argument("-o", "--out", type=Path, default=HERE / "results" / "mapping-speed.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
