"""How many cells a second does a loader deal, shuffled, from the same cells in zarr, h5ad and SOMA? Beside its peers.

    python benchmarks/make_atlas.py --cells 200000 -o atlas200k.zarr
    python benchmarks/loader.py atlas200k.zarr --cells 50000 -o results/loader.json

Every loader runs in a process of its own, one after the other, round by round; the first round warms the page cache
and is not counted. Time is from asking for the first minibatch to the last one: starting Python, importing and opening
are left out. All deal CSR matrices of all genes. Peers are scDataset (anndata's backed matrices) and TileDB-SOMA-ML,
with the settings that they recommend and with the blocks and buffers that ours has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _machine import circumstances, versions_of
from _tasks import HERE, ROOT
from _watch import CommandFailed, python, watch

sys.path.append(str(ROOT))
MEMORY = 1_000_000_000
PEERS = ("scDataset", "tiledbsoma-ml", "tiledbsoma", "zarr", "h5py")


@dataclass(frozen=True)
class Contender:
    """A loader with its settings, on a format; ``label`` is its name in the table."""

    kind: str
    loader: str
    label: str
    settings: dict[str, int]


def contenders(batch: int, block: int, buffer: int) -> list[Contender]:
    """Return all contenders, ours first on each format; ``block`` and ``buffer`` (cells) are ours."""
    fetch = max(1, buffer // batch)
    found = []
    for kind in ("zarr", "h5ad", "soma"):
        found.append(Contender(kind, "schelix", "schelix", {"memory": MEMORY}))
        if kind == "soma":
            found.append(
                Contender(kind, "TileDB-SOMA-ML", "TileDB-SOMA-ML, its defaults", {"chunk": 64, "fetch": 1 << 16})
            )
            rounded = max(1, buffer // block) * block
            found.append(
                Contender(kind, "TileDB-SOMA-ML", "TileDB-SOMA-ML, our blocks", {"chunk": block, "fetch": rounded})
            )
            continue
        for label, size, factor, workers in (
            ("recommended", 16, 16, 0),  # block_size = fetch_factor, of which 16 is the default
            ("our blocks", block, fetch, 0),
            ("our blocks, 2 workers", block, fetch, 2),
        ):
            settings = {"block": size, "fetch": factor, "workers": workers}
            found.append(Contender(kind, "scDataset", f"scDataset, {label}", settings))
    return found


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("atlas", type=Path, help="made by make_atlas.py, or any store of cells")
    parser.add_argument("--cells", type=int, help="read the first ones only (default: all)")
    parser.add_argument("--batch", type=int, default=4_096, help="cells of a minibatch (default: %(default)s)")
    parser.add_argument("--batches", type=int, help="minibatches (default: one epoch)")
    parser.add_argument("--rounds", type=int, default=3, help="that are counted (default: %(default)s)")
    parser.add_argument("--formats", default="zarr,h5ad,soma", help="default: %(default)s")
    parser.add_argument("--scratch", type=Path, help="where copies are kept (default: a folder that is removed)")
    parser.add_argument("-o", "--out", type=Path, default=HERE / "results" / "loader.json", help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when all was done, 1 when something failed, 2 for bad usage."""
    arguments = parser().parse_args(argv)
    formats = arguments.formats.split(",")
    if not arguments.atlas.exists() or not set(formats) <= {"zarr", "h5ad", "soma"} or arguments.rounds < 1:
        print(
            f"loader.py: {arguments.atlas} must be there (write it with make_atlas.py), formats must be some of zarr, "
            "h5ad, soma, and --rounds 1 or more",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="loader-") as temporary:
        try:
            row = measure(arguments, formats, arguments.scratch or Path(temporary), Path(temporary))
        except CommandFailed as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
    print(table(row))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")
    return 0


def measure(arguments: argparse.Namespace, formats: Sequence[str], scratch: Path, temporary: Path) -> dict[str, Any]:
    """Write the copies and run all contenders in turn."""
    from _loader_data import copies

    from schelix_scale.stores import open_store
    from schelix_scale.training.loader import shuffle_for

    paths = copies(arguments.atlas, arguments.cells, scratch)
    store = open_store(paths["zarr"])
    shuffle = shuffle_for(store, MEMORY)
    chosen = [one for one in contenders(arguments.batch, *shuffle) if one.kind in formats]
    found: list[list[dict[str, float]]] = [[] for _ in chosen]
    for number in range(1 + arguments.rounds):
        for contender, results in zip(chosen, found, strict=True):
            result = run(contender, paths[contender.kind], arguments, temporary)
            speed = result["cells"] / result["seconds"]
            print(f"round {number}: {contender.kind} {contender.label}: {speed:,.0f} cells/s", flush=True)
            if number:
                results.append({**result, "cells_per_second": speed})
    dealt = {(result["cells"], result["values"]) for results in found for result in results}
    if arguments.batches is None and len(dealt) != 1:
        raise CommandFailed(f"loaders dealt different cells and values: {sorted(dealt)}")
    return {
        "atlas": arguments.atlas.name,
        **{"cells": store.n_cells, "genes": len(store.gene_names), "values_per_cell": store.nonzeros_per_cell},
        **{"batch": arguments.batch, "batches": arguments.batches, "block": shuffle.block, "buffer": shuffle.buffer},
        "page_cache": "warm",
        "loaders": [
            {**vars(one), "rounds": results, "cells_per_second": median(results), "peak_mb": median(results, "peak_mb")}
            for one, results in zip(chosen, found, strict=True)
        ],
        **circumstances(),
        "peer_versions": versions_of(PEERS),
    }


def run(contender: Contender, path: Path, arguments: argparse.Namespace, temporary: Path) -> dict[str, float]:
    """Run a contender in a process of its own."""
    out = temporary / "found.json"
    task = {"loader": contender.loader, "path": str(path), "settings": contender.settings}
    task |= {"batch": arguments.batch, "batches": arguments.batches}
    seen = watch(python(str(HERE / "_loader_tasks.py"), json.dumps(task), str(out)), temporary / "log.txt")
    return {**json.loads(out.read_text(encoding="utf-8")), "peak_mb": seen.peak / 1e6}


def median(rounds: Sequence[dict[str, float]], name: str = "cells_per_second") -> float:
    """Return the median of what was found in the rounds."""
    return round(statistics.median(found[name] for found in rounds), 1)


def table(row: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"### {row['cells']:,} cells x {row['genes']:,} genes, {row['values_per_cell']:,.0f} values a cell, "
        f"minibatches of {row['batch']:,}; {row['machine']['cores']} cores, warm page cache",
        "",
        "| format | loader | cells/s | lowest - highest | ours is | CPU s | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in row["loaders"]:
        speeds = [found["cells_per_second"] for found in one["rounds"]]
        first = next(other for other in row["loaders"] if other["kind"] == one["kind"])
        ratio = "" if one is first else f"{first['cells_per_second'] / one['cells_per_second']:.2f} x"
        lines.append(
            f"| {one['kind']} | {one['label']} | {one['cells_per_second']:,.0f} | {min(speeds):,.0f} - "
            f"{max(speeds):,.0f} | {ratio} | {median(one['rounds'], 'cpu_seconds'):.1f} | {one['peak_mb'] / 1e3:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
