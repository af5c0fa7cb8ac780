"""A demonstration on real cells that scanpy ships: data, run, scores before and after, and a picture, in one folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from schelix_scale.config_io import load_config
from schelix_scale.errors import RunError
from schelix_scale.metrics import batch_mixing, label_conservation
from schelix_scale.pipeline import integrate
from schelix_scale.progress import Reporter, RichReporter
from schelix_scale.publish import publish, write_json
from schelix_scale.run import Run

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

BATCH, LABEL = "gem_well", "bulk_labels"
# The same as configs/demo.toml, which is not installed with the package.
SETTINGS: dict[str, Any] = {
    "data.batch_key": BATCH,
    "graph.k": 15,
}
COMPONENTS = 30
NEIGHBORS = 15
VIEWS = {"before": "X_pca", "after": "X_schelix"}
TITLES = {"before": "before: principal components", "after": "after: scHelix-Scale"}


@dataclass(frozen=True)
class DemoResult:
    """What `run_demo` has made.

    Attributes
    ----------
    run, data, picture
        The finished run, the file of its cells, and the UMAP picture.
    seconds
        What each stage of the run took when it was done.
    before, after
        Scores of the principal components and of the embedding by name, all 0 to 1 and better when higher.
    mixing_at_random
        Batch mixing of the embedding if the wells are dealt to its cells at random: as good as it gets.
    single_stream
        Whether no batch signal was found, so that nothing was corrected.
    """

    run: Run
    data: Path
    picture: Path
    seconds: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]
    mixing_at_random: float
    single_stream: bool


def run_demo(out: str | Path = "demo-run", reporter: Reporter | None = None) -> DemoResult:
    """Integrate 700 blood cells of 8 GEM wells, score the result and draw it.

    The cells are `scanpy.datasets.pbmc68k_reduced`, which comes with scanpy: log-normalised values of 765 genes
    (``raw``), the well from the barcode's suffix, and labels by correlation with sorted cells. ``out`` gets
    ``pbmc68k.h5ad``, ``run/``, ``scores.json`` and ``umap.png``; what is there from before is not done again.

    Parameters
    ----------
    out
        The folder, made if it is not there.
    reporter
        Where progress goes; standard error by default.

    Raises
    ------
    RunError
        ``out`` is a file, or ``out/run`` holds a run of other settings.

    References
    ----------
    G. X. Y. Zheng et al., "Massively parallel digital transcriptional profiling of single cells", Nature
    Communications 2017.
    """
    folder, reporter = Path(out).expanduser(), reporter or RichReporter()
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file, not a directory. Choose another output directory with -o.")
    data, picture = folder / "pbmc68k.h5ad", folder / "umap.png"
    if not data.exists():
        with reporter.stage("cells of scanpy", None, "steps"), publish(data) as partial:
            demo_cells().write_h5ad(partial)
    run = integrate(data, out=folder / "run", config=load_config(None, SETTINGS), reporter=reporter)
    scores = _finished_scores(folder, run)
    if scores is None:
        scores = _score_and_draw(run, data, picture, reporter)
        write_json(folder / "scores.json", {"embedding": _checksum(run), **scores})
    stages = {name: record["seconds"] for name, record in run.manifest["stages"].items()}
    single = run.manifest["summary"]["single_stream"]
    random = scores["random"]["batch mixing"]
    return DemoResult(run, data, picture, stages, scores["before"], scores["after"], random, single)


def demo_cells() -> AnnData:
    """Return the cells with log-normalised values, ``obs["gem_well"]`` and ``obs["bulk_labels"]``, and nothing else."""
    import anndata
    import scanpy

    shipped = scanpy.datasets.pbmc68k_reduced()
    obs = shipped.obs[[LABEL]].copy()
    obs[BATCH] = shipped.obs_names.str.rpartition("-").get_level_values(2)
    obs, var = obs.astype("category").rename_axis(None), shipped.raw.var[[]].rename_axis(None)
    return anndata.AnnData(shipped.raw.X, obs=obs, var=var)


def _finished_scores(folder: Path, run: Run) -> dict[str, dict[str, float]] | None:
    """Return the scores of an earlier call if they and the picture are of this embedding."""
    try:
        found: dict[str, Any] = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    current = found.get("embedding") == _checksum(run) and (folder / "umap.png").exists()
    return {name: found[name] for name in ("before", "after", "random")} if current else None


def _checksum(run: Run) -> str:
    artifacts = [artifact for record in run.manifest["stages"].values() for artifact in record["artifacts"]]
    return str(next(artifact["sha256"] for artifact in artifacts if artifact["path"] == "embedding.zarr"))


def _score_and_draw(run: Run, data: Path, picture: Path, reporter: Reporter) -> dict[str, dict[str, float]]:
    """Score and draw the principal components and the embedding of the same cells."""
    import anndata
    import scanpy

    cells = anndata.read_h5ad(data)
    with reporter.stage("scores", 2, "embeddings") as stage:
        cells.X = cells.X.toarray()
        scanpy.pp.scale(cells, max_value=10)
        scanpy.pp.pca(cells, n_comps=COMPONENTS, random_state=0)
        cells.obsm["X_schelix"] = run.embedding
        scores = {}
        for name, key in VIEWS.items():
            scores[name] = _scores(cells.obsm[key], cells.obs)
            stage.advance()
        shuffled = np.random.default_rng(0).permutation(cells.obs[BATCH])
        scores["random"] = {"batch mixing": batch_mixing(run.embedding, shuffled)}
    with reporter.stage("picture", 2, "embeddings") as stage:
        maps = {}
        for name, key in VIEWS.items():
            scanpy.pp.neighbors(cells, n_neighbors=NEIGHBORS, use_rep=key, random_state=0)
            scanpy.tl.umap(cells, random_state=0)
            maps[name] = cells.obsm["X_umap"].copy()
            stage.advance()
        with publish(picture) as partial:
            _draw(maps, cells.obs, partial)
    return scores


def _scores(embedding_nd: np.ndarray, obs: pd.DataFrame) -> dict[str, float]:
    labels = label_conservation(embedding_nd, obs[LABEL])
    return {"batch mixing": batch_mixing(embedding_nd, obs[BATCH])} | {f"labels: {k}": v for k, v in labels.items()}


def _draw(maps: dict[str, np.ndarray], obs: pd.DataFrame, path: Path) -> None:
    """Draw wells above labels and before beside after, with one legend a row."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    order = np.random.default_rng(0).permutation(len(obs))  # so that no group covers the others
    for row, (column, title, colors) in enumerate([(BATCH, "GEM well", "Dark2"), (LABEL, "cell type", "tab10")]):
        groups = obs[column].cat.categories
        color_of = {group: colormaps[colors](i) for i, group in enumerate(groups)}
        for axis, (name, xy) in zip(axes[row], maps.items(), strict=True):
            axis.scatter(*xy[order].T, c=[color_of[group] for group in obs[column].iloc[order]], s=14, linewidths=0)
            axis.set(xticks=[], yticks=[], title=TITLES[name] if row == 0 else "")
            axis.spines[:].set_color("0.8")
        axes[row, 0].set_ylabel(f"coloured by {title}")
        for group, color in color_of.items():
            axes[row, 1].scatter([], [], color=color, s=40, label=group)
        axes[row, 1].legend(title=title, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, alignment="left")
    figure.suptitle("700 blood cells (pbmc68k_reduced), UMAP", fontsize=13)
    figure.savefig(path)
