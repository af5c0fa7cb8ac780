"""Write an atlas of any size whose cell types and batch-sensitive genes are known, from real cells.

    python benchmarks/make_atlas.py --cells 1000000 --genes 20000 -o atlas.zarr --template kang.h5ad
    python benchmarks/make_atlas.py --cells 200000 -o atlas.h5ad --template kang.h5ad
    python benchmarks/make_atlas.py --cells 200000 -o atlas.soma --template kang.h5ad

Each cell is a multinomial draw around the mean profile of a real cell and its 29 nearest of the same type; batches
differ in size, depth, composition (some types are absent) and in how they catch the genes that var["batch_sensitive"]
marks. obs["batch"] and obs["cell_type"] are the truth. The same arguments give the same cells in every format.
Memory follows the template (about 1.5 GB for 14,000 cells), not the number of cells.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from _atlas import MOLECULES, Atlas, Settings
from _atlas_write import FORMATS, write_atlas
from _tasks import ROOT

sys.path.append(str(ROOT))
from schelix_scale.progress import RichReporter

TEMPLATE = ROOT.parent / "shared" / "data" / "kang_ifnb_donor.h5ad"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, required=True)
    parser.add_argument("--genes", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--batches", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--molecules", type=float, default=MOLECULES, help="median of a cell (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--template", type=Path, default=TEMPLATE, help=".h5ad file of real counts (default: %(default)s)"
    )
    parser.add_argument("--label-key", default="cell_type", help="obs column of its types (default: %(default)s)")
    parser.add_argument("-o", "--out", type=Path, required=True, help=f"where to write: {', '.join(FORMATS)}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when the atlas was written, 2 for bad usage."""
    arguments = parser().parse_args(argv)
    try:
        settings = Settings(arguments.cells, arguments.genes, arguments.batches, arguments.seed, arguments.molecules)
        if not arguments.template.is_file():
            raise ValueError(f"there is no file {arguments.template}; name a .h5ad file of real counts with --template")
        if arguments.out.suffix not in FORMATS or arguments.out.exists():
            raise ValueError(f"{arguments.out} must be new and end in {', '.join(FORMATS)}")
    except ValueError as error:
        print(f"make_atlas.py: {error}", file=sys.stderr)
        return 2
    atlas = Atlas(arguments.template, settings, arguments.label_key)
    with RichReporter().stage(f"write {arguments.out.name}", settings.cells) as progress:
        uns = {"template": arguments.template.name, "seed": settings.seed, "cells": settings.cells}
        write_atlas(atlas, arguments.out, {"make_atlas": str(uns)}, progress.advance)
    print(f"wrote {arguments.out}: {settings.cells:,} cells, {settings.batches} batches")
    return 0


if __name__ == "__main__":
    sys.exit(main())
