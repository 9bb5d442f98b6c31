"""Where two paths part: relative error of their hidden states, layer by layer."""

import math
import textwrap
from typing import TYPE_CHECKING

from fp4lab.analysis.plots.style import BLUE, CYCLE, GREEN, INK, MUTED, ORANGE, PURPLE, SKY, VERMILION, clean, figure, label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fp4lab.analysis.frames import Frames

_LINES = {  # colour, dashes, marker: pairs often lie on each other, so the later ones leave gaps
    "A-B": (BLUE, "-", "o"),
    "A-C": (SKY, "--", "s"),
    "B-C": (GREEN, ":", "^"),
    "A-R": (VERMILION, "-", "D"),
    "B-R": (ORANGE, "--", "v"),
    "C-R": (PURPLE, ":", "P"),
}


def layer_divergence(frames: "Frames") -> "Figure | None":
    """A panel a run that compared paths (task=compare), one scale; None if none did."""
    rows = [r for r in frames.runs.to_dict("records") if (frames.layers["run"] == r["run"]).any()]
    if not rows:
        return None
    across = min(len(rows), 3)
    down = math.ceil(len(rows) / across)
    fig = figure(max(3.6 * across, 5.0), 2.5 * down + 0.4)
    grid = fig.subplots(down, across, sharey=True, squeeze=False)
    for axes, row in zip(grid.flat, rows, strict=False):
        title = textwrap.fill(label(row, frames.runs), 52)
        draw_layers(axes, frames.layers[frames.layers["run"] == row["run"]], title)
    for axes in list(grid.flat)[len(rows) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("|a - b| / smaller of |a|, |b|", fontsize=7, color=INK)
    title = "Hidden states of two paths: relative error by layer, worst prompt"
    fig.suptitle(title, fontsize=10, x=0.01, ha="left", color=INK)
    return fig


def draw_layers(axes: "Axes", records: "pd.DataFrame", title: str) -> None:
    """Relative error by layer, a line a pair, the worst prompt; pairs that are equal are left out.

    A short line at the right is what is expected of the pair at most. Errors that are not finite are crosses at the top.
    """
    from matplotlib.ticker import MaxNLocator

    drawn, last = 0, int(records["layer"].max())
    for pair, rows in records.groupby("pair"):
        worst = rows.assign(relative_error=rows["relative_error"].astype(float).fillna(math.inf))
        worst = worst.groupby("layer")["relative_error"].max()
        if not (worst > 0).any():
            continue
        colour, dashes, marker = _LINES.get(str(pair), (CYCLE[-1], "-", "X"))
        finite = worst[worst.map(math.isfinite)]
        axes.plot(finite.index, finite, dashes, marker=marker, markersize=3.5, color=colour, label=str(pair))
        bad = worst.index[~worst.map(math.isfinite)]
        if len(bad):
            top = axes.get_xaxis_transform()
            axes.plot(bad, [0.97] * len(bad), "X", color=colour, markersize=5, transform=top, clip_on=False)
        expected = float(rows["expected"].max())
        axes.plot([last + 0.3, last + 0.8], [expected] * 2, color=colour, linewidth=2.5, solid_capstyle="butt")
        drawn += 1
    clean(axes, title)
    axes.set_xlabel("layer; at the right: expected at most" if drawn else "layer", fontsize=7, color=INK)
    axes.set_xlim(-0.3, last + 0.9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if drawn:
        axes.set_yscale("log")
        axes.legend(fontsize=7, frameon=False, labelcolor=INK)
    else:
        axes.text(0.5, 0.5, "all pairs equal", transform=axes.transAxes, ha="center", fontsize=8, color=MUTED)
