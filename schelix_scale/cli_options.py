"""Options and arguments that several verbs of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Sources = Annotated[
    list[str],
    typer.Argument(
        help="An .h5ad file or a .zarr directory in anndata layout, or a TileDB-SOMA experiment (directory or "
        "address); several, or a quoted pattern, are joined by gene names. Or a part of the CELLxGENE Census: "
        "census:homo_sapiens.",
        metavar="SOURCE",
    ),
]
RunPath = Annotated[str, typer.Argument(help="The directory that [bold]integrate -o[/] named.", metavar="RUN")]
BatchKey = Annotated[
    str | None,
    typer.Option(
        "--batch-key",
        "-b",
        help="obs column that names each cell's batch, or several: dataset,assay. 'batch' by default; of several files "
        "without it, each is a batch.",
        metavar="COLUMN",
    ),
]
LabelKey = Annotated[
    str | None,
    typer.Option(
        help="obs column of cell types, if some are known (others: unknown, or empty). Cells are pulled towards "
        "those of their type.",
        metavar="COLUMN",
    ),
]
Layer = Annotated[
    str | None,
    typer.Option(help="Where the values are: X (the default), raw, or the name of a layer.", metavar="NAME"),
]
GenesJoin = Annotated[
    str | None,
    typer.Option(help="Of several files: intersection (the genes that all have, the default) or union.", metavar="HOW"),
]
ObsFilter = Annotated[
    str | None,
    typer.Option(
        help="SOMA and Census: which cells, such as \"tissue_general == 'lung' and is_primary_data == True\".",
        metavar="FILTER",
    ),
]
CensusVersion = Annotated[
    str | None, typer.Option(help="A release date, stable (the default) or latest.", metavar="DATE")
]
CensusUri = Annotated[str | None, typer.Option(help="A local or mirrored census.", metavar="DIR")]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file of settings.", metavar="FILE")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="A single setting; wins over the file. May be repeated.", metavar="KEY=VALUE"),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and errors only.")]
Out = Annotated[str, typer.Option("--out", "-o", help="The run directory, made or continued.", metavar="RUN")]
Strength = Annotated[
    float | None,
    typer.Option(
        help="How much is corrected and smoothed: 1 (the default) is the full method, 0 is plain PCA. "
        "Lower it if biology is lost with the batches.",
        metavar="0..1",
    ),
]
Protect = Annotated[
    list[str] | None,
    typer.Option(help="obs column whose effect is not batch (condition, time). May be repeated.", metavar="COLUMN"),
]
MaxMemory = Annotated[str | None, typer.Option(help="Such as 4GB; half of the memory by default.", metavar="SIZE")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same threads: same embedding. 0 by default.")]
Threads = Annotated[int | None, typer.Option(help="All cores by default.")]
Device = Annotated[
    str | None, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 or mps.", metavar="NAME")
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="A dask.distributed cluster that passes over all cells; threads by default. Its workers need SOURCE "
        "and RUN at the same paths.",
        metavar="tcp://HOST:PORT",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start over: remove what is in the directory that -o names.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", help="Another setting for this stage than RUN has. May be repeated.", metavar="KEY=VALUE"
    ),
]
Nproc = Annotated[
    int,
    typer.Option(
        min=1, help="Processes that train and embed together, one for each GPU or for some of the cores.", metavar="N"
    ),
]
NoSummary = Annotated[bool, typer.Option("--no-summary", hidden=True)]
