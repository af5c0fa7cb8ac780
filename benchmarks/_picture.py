"""The picture of the results: what is kept of biology against what is removed of batches, a panel a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from _report import Row, by_data, by_method, summary

# Okabe and Ito's colours, which colour-blind readers can tell apart
STYLES = {
    "schelix": ("#d55e00", "o"),
    "schelix:backbone": ("#e69f00", "o"),
    "pca": ("#999999", "s"),
    "harmony": ("#0072b2", "s"),
    "scanorama": ("#56b4e9", "^"),
    "scvi": ("#009e73", "D"),
    "scanvi": ("#009e73", "v"),
    "concord": ("#cc79a7", "X"),
}
_COLUMNS = 3


def points(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Return batch and bio of every method that has a style, means over its seeds."""
    found = {}
    for method, group in by_method(rows).items():
        batch, bio = summary(group, "batch"), summary(group, "bio")
        if method in STYLES and batch and bio:
            found[method] = (batch[0], bio[0])
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw one dot a method in a panel a data set, with lines of equal total, and write a PNG file."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure

    sets = by_data(rows)
    n_rows = -(-len(sets) // _COLUMNS)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(3.4 * min(_COLUMNS, len(sets)) + 0.4, 3.1 * n_rows + 0.7), layout="constrained")
        axes = figure.subplots(n_rows, min(_COLUMNS, len(sets)), squeeze=False).ravel()
        handles = {}
        for axis, ((data, key), members) in zip(axes, sets.items(), strict=False):
            dots = points(members)
            for method, (batch, bio) in dots.items():
                color, marker = STYLES[method]
                handles[method] = axis.scatter(batch, bio, s=70, c=color, marker=marker, edgecolors="white", zorder=3)
            axis.margins(0.15)
            axis.autoscale_view()
            low, high = axis.get_xlim()
            bottom, top = axis.get_ylim()
            for total in np.arange(0, 1, 0.05):
                axis.plot([low, high], [(total - 0.4 * x) / 0.6 for x in (low, high)], c="0.9", lw=0.8, zorder=1)
            axis.set(xlim=(low, high), ylim=(bottom, top), title=f"{data} ({key})", xlabel="batch", ylabel="bio")
        for axis in axes[len(sets) :]:
            axis.axis("off")
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(8, len(handles) or 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        figure.savefig(partial, dpi=110, metadata={"Software": None})
    partial.replace(path)
