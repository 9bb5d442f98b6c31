"""One picture of a sweep: memory by phase, a small panel a run on one scale, and under them the losses."""

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4lab.analysis.frames import load_runs
from fp4lab.analysis.plots.curves import draw_ends, draw_latencies
from fp4lab.analysis.plots.layers import draw_layers
from fp4lab.analysis.plots.style import ALLOCATED, BLUE, RESIDENT, SKY, VERMILION, WELL, Source, label
from fp4lab.config import PHASES
from fp4lab.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_RUNS = 48  # more panels than this cannot be read


def sweep_figure(folder: str | Path) -> "Figure":
    """The figure of all runs in `folder`. Raises UserError if there are none, or more than MOST_RUNS."""
    from matplotlib.figure import Figure

    frames = load_runs(folder)
    runs, phases = frames.runs, frames.phases
    if len(runs) > MOST_RUNS:
        raise UserError(f"{folder}: {len(runs)} runs; a picture holds at most {MOST_RUNS}; use `fp4lab compare --csv`")
    source = _source(phases)
    columns = min(len(runs), 3 if len(runs) in (3, 5, 6, 9) else 4)
    rows = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(max(3.2 * columns, 8.0), 2.3 * rows + 2.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.3 * rows + 0.4, 2.2])[:, 0]
    upper.suptitle(
        f"Memory (MiB), {source.text}: line at a phase's end, bar its peak; dashed: reached after the last phase",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    panels = upper.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    seen = set(phases["name"])
    order = [p for p in PHASES if p in seen] + sorted(seen - set(PHASES))
    for axes, row in zip(panels, runs.to_dict("records"), strict=False):
        mine = phases[phases["run"] == row["run"]]
        _memory(axes, row, mine, order, source, label(row, runs))
    for axes in list(panels)[len(runs) :]:
        axes.set_visible(False)
    turns, depths = frames.turns, frames.layers
    if len(depths):
        _layers(lower, depths, runs)
    elif len(turns) and (runs["trained"] == False).all():  # noqa: E712  (a column of objects)
        draw_latencies(lower.subplots(1, 2), turns, runs)
    else:
        draw_ends(lower.subplots(), runs)
    return figure


def save_figure(folder: str | Path, path: str | Path) -> Path:
    """Writes `sweep_figure` to `path` (.png, .pdf or .svg). Raises UserError."""
    path = Path(path)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"{path}: expected a name that ends in .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")
    sweep_figure(folder).savefig(path, dpi=130)
    return path


def _source(phases: "pd.DataFrame") -> Source:
    """The device's memory where any run has it, else resident memory."""
    return ALLOCATED if phases["torch_allocated_mib"].notna().any() else RESIDENT


def _memory(axes: "Axes", row: dict[str, Any], phases: "pd.DataFrame", order: list[str], source: Source, title: str) -> None:
    level, peak = source.level, source.peak
    # A run of several steps passes a phase several times; its highest is what must fit.
    by_name = phases.groupby("name")[[level, peak]].max().astype(float) if len(phases) else None
    if by_name is not None:
        at = [order.index(n) for n in by_name.index]
        axes.bar(at, by_name[peak].fillna(by_name[level]), width=0.85, color=SKY)
        axes.hlines(by_name[level], [x - 0.42 for x in at], [x + 0.42 for x in at], color=BLUE, linewidth=1.6)
    else:
        axes.text(0.5, 0.5, "no phase reached", transform=axes.transAxes, ha="center", fontsize=8, color="0.4")
    well = row["status"] in WELL
    if not well and row["peak_of"] == "resident" and len(phases) and level == "proc_rss_mib":
        # It ended in the phase after the last one it reported; the supervisor's looks know how high it got.
        axes.bar(max(at) + 1, row["peak_mib"], width=0.85, facecolor="none", edgecolor=VERMILION, linestyle="--")
    title = textwrap.fill(title, 40)
    axes.set_title(title + ("" if well else f"\n{row['status']}"), fontsize=8, color="black" if well else VERMILION, loc="left")
    axes.set_xticks(range(len(order)), [p.removesuffix("_done") for p in order], rotation=60, ha="right", fontsize=6)
    axes.set_xlim(-0.6, max(len(order), 1) - 0.4)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _layers(figure: Any, depths: "pd.DataFrame", runs: "pd.DataFrame") -> None:
    """Relative error by layer, a panel a run that compared paths."""
    rows = [r for r in runs.to_dict("records") if (depths["run"] == r["run"]).any()]
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    figure.suptitle("Hidden states of two paths: relative error by layer, worst prompt", fontsize=10, x=0.01, ha="left")
    for axes, row in zip(panels, rows, strict=True):
        draw_layers(axes, depths[depths["run"] == row["run"]], label(row, runs))
