"""How long and how much memory does `schelix integrate` take as an atlas grows? With the peer in memory, and floors.

    python benchmarks/make_atlas.py --cells 200000 -o atlas200k.zarr
    python benchmarks/make_atlas.py --cells 1000000 -o atlas1m.zarr
    python benchmarks/scale.py atlas200k.zarr --peer
    python benchmarks/scale.py atlas200k.zarr atlas1m.zarr --max-memory 4GB

Every run is a process of its own. Ten times a second the resident memory (RSS) of the processes of its tree is summed,
mapped files included; a page that several of them share counts several times, which the sum of proportional memory
(PSS), where the system tells it, does not.
Floors: reading the store once, pynndescent alone on the run's features, one pass of all cells through a network. The
peer is scanpy (read, normalise, variable genes, PCA) and harmonypy with their defaults. Both are judged by the atlas'
known types and batches on the same 20,000 cells.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _machine import circumstances
from _scale_tasks import TASKS
from _tasks import HERE, ROOT
from _watch import CommandFailed, Watched, python, watch

sys.path.append(str(ROOT))
from schelix_scale.metrics import batch_mixing, label_conservation
from schelix_scale.run import Run, RunDirectory
from schelix_scale.stores import open_store

PEER = "scanpy + harmonypy"
FLOORS = tuple(name for name in TASKS if name != PEER)
JUDGED_CELLS, JUDGED_NEIGHBORS = 20_000, 30


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("atlases", type=Path, nargs="+", metavar="ATLAS", help="made by make_atlas.py, small first")
    parser.add_argument("--max-memory", default="4GB", help="budget of schelix (default: %(default)s)")
    parser.add_argument("--peer", action="store_true", help=f"also run {PEER}, in memory")
    parser.add_argument("--no-floors", action="store_true", help="leave out the floors")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting for schelix")
    parser.add_argument("--scratch", type=Path, help="where runs are kept (default: a folder that is removed)")
    parser.add_argument("-o", "--out", type=Path, default=HERE / "results" / "scale.json", help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when all was done, 1 when something failed, 2 for bad usage."""
    arguments = parser().parse_args(argv)
    missing = [str(atlas) for atlas in arguments.atlases if not atlas.exists()]
    if missing:
        print(f"scale.py: there is no {', '.join(missing)}; write it with make_atlas.py", file=sys.stderr)
        return 2
    rows = []
    with tempfile.TemporaryDirectory(prefix="scale-") as temporary:
        scratch = arguments.scratch or Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            for atlas in arguments.atlases:
                rows.append(measure(atlas, arguments, scratch))
                print(table(rows[-1]), flush=True)
                save(arguments.out, rows[-1])
        except CommandFailed as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
    for smaller, larger in pairwise(rows):
        cells, seconds = larger["cells"] / smaller["cells"], larger["seconds"] / smaller["seconds"]
        print(f"{smaller['cells']:,} -> {larger['cells']:,} cells (x {cells:.2f}): time x {seconds:.2f}")
    print(f"written to {arguments.out}")
    return 0


def measure(atlas: Path, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Integrate an atlas, run the floors and the peer, and judge the embeddings."""
    run = scratch / f"run-{atlas.stem}"
    command = [str(atlas), "--batch-key", "batch", "-o", str(run), "--max-memory", arguments.max_memory, "--overwrite"]
    settings = [part for setting in arguments.set for part in ("--set", setting)]
    seen = watch(python("-m", "schelix_scale", "integrate", *command, *settings), scratch / "schelix.log")
    opened = Run.open(run)
    obs = open_store(atlas).obs(["batch", "cell_type"])
    rows = judged_rows(len(obs))
    row = {
        "atlas": atlas.name,
        **{"cells": len(obs), "genes": len(opened.genes), "max_memory": arguments.max_memory},
        **{"settings": arguments.set, "seconds": round(seen.seconds, 1)},
        **peaks(seen),
        "stages": stages(RunDirectory.open(run), seen),
        "quality": judge(np.asarray(opened.embedding[rows]), obs.iloc[rows]),
        "genes_found": sensitive_genes_found(atlas, opened.genes),
        "floors": {} if arguments.no_floors else {name: run_task(name, atlas, run, scratch)[0] for name in FLOORS},
        **circumstances(),
    }
    if arguments.peer:
        cost, out = run_task(PEER, atlas, run, scratch)
        found = {"harmony": out, "pca": out.with_name("pca.npy")}
        quality = {name: judge(np.load(path, mmap_mode="r")[rows], obs.iloc[rows]) for name, path in found.items()}
        row["peer"] = {"name": PEER, **cost, "quality": quality}
    return row


def run_task(name: str, atlas: Path, run: Path, scratch: Path) -> tuple[dict[str, Any], Path]:
    """Run one of `TASKS` in a process of its own; return its cost and its output file."""
    out = scratch / "out.npy"
    seen = watch(
        python(str(HERE / "_scale_tasks.py"), name, str(atlas), str(run), str(out)),
        scratch / "task.log",
        {"PYTHONPATH": str(ROOT)},
    )
    return {"seconds": round(seen.seconds, 1), **peaks(seen)}, out


def peaks(seen: Watched) -> dict[str, int | None]:
    """Return the peaks of summed RSS (``peak_bytes``) and of summed PSS (``peak_pss_bytes``, None if unknown)."""
    return {"peak_bytes": seen.peak, "peak_pss_bytes": seen.pss_peak}


def stages(directory: RunDirectory, seen: Watched) -> list[dict[str, Any]]:
    """Return seconds, share of the whole and peak summed RSS of each stage, and of what is around them."""
    found = []
    for record in directory.records():
        stop = datetime.datetime.fromisoformat(record.finished).timestamp() + 1  # recorded to the second
        peak = seen.peak_between(stop - record.seconds - 1, stop)
        found.append({"stage": record.stage, "seconds": round(record.seconds, 1), "peak_bytes": peak})
    rest = seen.seconds - sum(stage["seconds"] for stage in found)
    found.append({"stage": "start, checksums", "seconds": round(rest, 1), "peak_bytes": None})
    return [{**stage, "share": round(stage["seconds"] / seen.seconds, 3)} for stage in found]


def judged_rows(n: int) -> np.ndarray:
    """Return the rows that embeddings are judged on, sorted."""
    return np.sort(np.random.default_rng(0).choice(n, min(n, JUDGED_CELLS), replace=False))


def judge(z_nd: np.ndarray, obs: pd.DataFrame) -> dict[str, float]:
    """Score an embedding of some cells by their known batches and types."""
    from sklearn.neighbors import NearestNeighbors

    types = obs["cell_type"].to_numpy().astype(str)
    near = NearestNeighbors(n_neighbors=JUDGED_NEIGHBORS).fit(z_nd).kneighbors(return_distance=False)
    pure = (types[near] == types[:, None]).mean(axis=1)
    purity = float(np.mean([pure[types == kind].mean() for kind in np.unique(types)]))
    scores = {"batch_mixing": batch_mixing(z_nd, obs["batch"]), "type_purity": purity}
    return {name: round(score, 4) for name, score in (scores | label_conservation(z_nd, types)).items()}


def sensitive_genes_found(atlas: Path, genes: pd.DataFrame) -> float | None:
    """Return the AUROC with which rho tells the genes that the atlas' batches disturb, among variable genes."""
    import anndata as ad
    from sklearn.metrics import roc_auc_score

    if atlas.suffix == ".zarr":
        import zarr

        var = ad.io.read_elem(zarr.open_group(atlas, mode="r")["var"])
    elif atlas.suffix == ".h5ad":
        var = ad.read_h5ad(atlas, backed="r").var
    else:
        return None
    used = genes[genes["role"] != "unused"]
    truth = var.loc[used.index, "batch_sensitive"].to_numpy()
    return round(float(roc_auc_score(truth, used["rho"])), 4)


def table(row: dict[str, Any]) -> str:
    """Return a row as Markdown."""
    lines = [
        f"### {row['atlas']}: {row['cells']:,} cells, {row['genes']:,} genes, budget {row['max_memory']}",
        "",
        "| what | seconds | share | peak GB, RSS summed | PSS summed |",
        "|---|---|---|---|---|",
        f"| **schelix integrate** | {row['seconds']:,} | | {both(row)} |",
    ]
    lines += [
        f"| {stage['stage']} | {stage['seconds']:,} | {stage['share']:.0%} | {both(stage)} |" for stage in row["stages"]
    ]
    lines += [
        f"| floor: {name} | {cost['seconds']:,} | {cost['seconds'] / row['seconds']:.0%} | {both(cost)} |"
        for name, cost in row["floors"].items()
    ]
    judged = {"schelix": row["quality"]}
    if "peer" in row:
        peer = row["peer"]
        lines.append(f"| **{peer['name']}** | {peer['seconds']:,} | | {both(peer)} |")
        judged |= peer["quality"]
    names = list(row["quality"])
    lines += ["", f"| embedding | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {who} | {' | '.join(f'{scores[name]:.3f}' for name in names)} |" for who, scores in judged.items()]
    if row["genes_found"] is not None:
        lines += ["", f"AUROC of rho for the genes that batches disturb: {row['genes_found']:.3f}"]
    return "\n".join(lines)


def both(cost: dict[str, Any]) -> str:
    """Return the two peaks of a cost as cells of a table."""
    return f"{gb(cost['peak_bytes'])} | {gb(cost.get('peak_pss_bytes'))}"


def gb(size: int | None) -> str:
    """Return bytes as GB."""
    return "" if size is None else f"{size / 1e9:.2f}"


def save(path: Path, row: dict[str, Any]) -> None:
    """Replace the results of the same atlas with the same settings in a JSON file."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["atlas"], row["cells"], row["max_memory"], sorted(row["settings"])

    rows = [other for other in rows if key(other) != key(row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
