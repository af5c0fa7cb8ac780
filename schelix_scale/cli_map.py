"""The verbs that take new batches onto a finished run: map and extend."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from schelix_scale.cli_app import app, make_reporter, one_or_all, reported
from schelix_scale.cli_options import (
    CensusUri,
    CensusVersion,
    ConfigFile,
    Layer,
    ObsFilter,
    Overwrite,
    Quiet,
    RunPath,
    Setting,
    Threads,
)

Queries = Annotated[
    list[str],
    typer.Argument(help="New cells: whatever [bold]integrate[/] reads. Several are joined.", metavar="QUERY"),
]
QueryBatch = Annotated[
    str | None,
    typer.Option(
        "--batch-key",
        "-b",
        help="obs column of QUERY that names each cell's batch. By default that of RUN, if QUERY has it; else each "
        "file, or all of one, is a batch.",
        metavar="COLUMN",
    ),
]
LabelKeys = Annotated[
    list[str] | None,
    typer.Option(help="obs column of RUN whose labels are transferred. May be repeated.", metavar="COLUMN"),
]

MOST_NOVEL = 3  # batches that are named


@app.command(
    name="map",
    epilog="[bold]Examples[/]\n\n"
    "  schelix map atlas-run new.h5ad --batch-key donor --label-key cell_type -o mapped\n\n"
    "  schelix map atlas-run new.h5ad -o mapped --label-key cell_type --set coverage=0.95 --set novelty=0.05\n\n"
    "  schelix map atlas-run census:homo_sapiens --obs-filter \"dataset_id == '...'\" -b donor_id -o mapped\n\n"
    "Then, in Python:  anndata.read_zarr('mapped/mapped.zarr').obs\\['schelix_cell_type']",
)
@reported
def map_verb(
    context: typer.Context,
    run: RunPath,
    query: Queries,
    out: Annotated[str, typer.Option("--out", "-o", help="A directory, made or continued.", metavar="MAPPED")],
    batch_key: QueryBatch = None,
    label_key: LabelKeys = None,
    layer: Layer = None,
    obs_filter: ObsFilter = None,
    census_version: CensusVersion = None,
    census_uri: CensusUri = None,
    config: ConfigFile = None,
    setting: Setting = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Map new batches onto RUN, without training, and give their cells labels.

    RUN is only read. Embedding, labels with probabilities and label sets, and how novel each cell is are written to
    MAPPED/mapped.zarr. When MAPPED is there already, what is done is not done again.
    """
    from schelix_scale.mapping.api import map_cells
    from schelix_scale.mapping.settings import load_map_config
    from schelix_scale.output import counted, print_lines, repeat_warnings

    reporter = make_reporter(quiet)
    mapped = map_cells(
        run,
        one_or_all(query),
        batch_key=batch_key,
        label_key=label_key or (),
        out=out,
        layer=layer or "X",
        overwrite=overwrite,
        config=load_map_config(config, setting or ()),
        threads=threads,
        reporter=reporter,
        obs_filter=obs_filter,
        census_version=census_version,
        census_uri=census_uri,
    )
    repeat_warnings(reporter)
    if quiet:
        return
    summary = mapped.manifest["summary"]
    batches = counted(summary["batches"], "batch", "batches")
    missing = f", {summary['used_genes_missing_share']:.1%} of those used are missing"
    lines = {
        "mapped": f"{summary['cells']:,} cells in {batches}: {mapped.path}/mapped.zarr",
        "genes": f"{summary['genes_matched']:,} of {summary['genes_reference']:,}" + missing,
        "novel": _novel(summary),
    }
    for key in summary["labels"]:
        counts = mapped.obs[f"schelix_{key}"].value_counts()
        lines[key] = ", ".join(f"{name} {count:,}" for name, count in counts[counts > 0].items())
    lines["next"] = f"anndata.read_zarr({str(mapped.path / 'mapped.zarr')!r})  in Python" if mapped.path else ""
    print_lines(lines)


@app.command(
    epilog="[bold]Example[/]\n\n  schelix extend atlas-run new.h5ad --batch-key donor -o atlas-run-2",
)
@reported
def extend(
    context: typer.Context,
    run: RunPath,
    query: Queries,
    out: Annotated[
        str, typer.Option("--out", "-o", help="The directory of the next version, made or continued.", metavar="RUN2")
    ],
    batch_key: QueryBatch = None,
    layer: Layer = None,
    obs_filter: ObsFilter = None,
    census_version: CensusVersion = None,
    census_uri: CensusUri = None,
    config: ConfigFile = None,
    setting: Setting = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Append new batches to RUN as its next version, without training or making anything of RUN again.

    RUN is only read; its cells keep their rows, neighbours and embedding. RUN2 is a run like any other: it can be
    verified, exported, mapped onto and extended.
    """
    from schelix_scale.extending.api import extend as append
    from schelix_scale.mapping.settings import load_map_config
    from schelix_scale.output import print_lines, repeat_warnings

    reporter = make_reporter(quiet)
    extended = append(
        run,
        one_or_all(query),
        out=out,
        batch_key=batch_key,
        layer=layer or "X",
        overwrite=overwrite,
        config=load_map_config(config, setting or ()),
        threads=threads,
        reporter=reporter,
        obs_filter=obs_filter,
        census_version=census_version,
        census_uri=census_uri,
    )
    repeat_warnings(reporter)
    if quiet:
        return
    summary = extended.manifest["summary"]
    version = len(extended.manifest["source"]["extends"]) + 1
    lines = {
        "extended": f"{extended.path}, version {version}: {summary['cells']:,} cells in {summary['batches']:,} batches"
    }
    new = summary.get("extension", {})
    if "batches" in new:
        lines["extended"] += f", {new['cells']:,} and {len(new['batches']):,} of them new"
        lines["neighbours"] = f"{new['recall']:.3f} of the exact ones of new cells were found"
    print_lines({**lines, "embedding": str(extended.path / "embedding.zarr")})


def _novel(summary: dict[str, Any]) -> str:
    """Say which share of the cells is novel, and of which batches most are."""
    by_batch, level = summary["novel_by_batch"], summary["settings"]["novelty"]
    text = f"{summary['novel_share']:.1%} of the cells (about {level:.1%} where nothing is new)"
    most = [(name, share) for name, share in by_batch.items() if share > level and len(by_batch) > 1]
    named = ", ".join(f"{name} {share:.1%}" for name, share in sorted(most, key=lambda one: -one[1])[:MOST_NOVEL])
    return f"{text}; most in {named}" if named else text
