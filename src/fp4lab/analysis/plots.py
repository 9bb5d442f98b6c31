"""One picture of a sweep: memory by phase, a small panel a run on one scale, and under them the losses."""

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4lab.analysis.frames import load_runs
from fp4lab.analysis.paths import draw_layers
from fp4lab.analysis.table import options
from fp4lab.config import PHASES
from fp4lab.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREEN, _RED, _BLUE, _PALE = "#2e7d32", "#c62828", "#1f5fa8", "#bcd3ea"
_LINES = ("-", "--", ":")  # after the ten colours are used up
_WELL = ("completed", "stopped")
MOST_RUNS = 48  # more panels than this cannot be read


def sweep_figure(folder: str | Path) -> "Figure":
    """The figure of all runs in `folder`. Raises UserError if there are none, or more than MOST_RUNS."""
    from matplotlib.figure import Figure

    frames = load_runs(folder)
    runs, phases = frames.runs, frames.phases
    if len(runs) > MOST_RUNS:
        raise UserError(f"{folder}: {len(runs)} runs; a picture holds at most {MOST_RUNS}; use `fp4lab compare --csv`")
    level, peak, what = _readings(phases)
    columns = min(len(runs), 3 if len(runs) in (3, 5, 6, 9) else 4)
    rows = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(max(3.2 * columns, 8.0), 2.3 * rows + 2.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.3 * rows + 0.4, 2.2])[:, 0]
    upper.suptitle(
        f"{what} by phase: line at its end, bar its peak; dashed: reached after its last phase", fontsize=10, x=0.01, ha="left"
    )
    panels = upper.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    seen = set(phases["name"]) if "name" in phases else set()
    order = [p for p in PHASES if p in seen] + sorted(seen - set(PHASES))
    for axes, row in zip(panels, runs.to_dict("records"), strict=False):
        mine = phases[phases["run"] == row["run"]]
        _memory(axes, row, mine, order, level, peak, label(row, runs))
    for axes in list(panels)[len(runs) :]:
        axes.set_visible(False)
    turns, depths = frames.turns, frames.layers
    if len(depths):
        _layers(lower, depths, runs)
    elif len(turns) and (runs["trained"] == False).all():  # noqa: E712  (a column of objects)
        _latencies(lower.subplots(1, 2), turns, runs)
    else:
        _losses(lower.subplots(), runs)
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


def label(row: dict[str, Any], runs: "pd.DataFrame") -> str:
    """ "2: chunk_rows=32 seq_len=8": the run and what was swept of it."""
    swept, _ = options(runs)
    given = " ".join(f"{n.rpartition('.')[2].removeprefix('option ')}={row[n]}" for n in swept if isinstance(row[n], str))
    return f"{row['run']}: {given}" if given else str(row["run"])


def _readings(phases: "pd.DataFrame") -> tuple[str, str, str]:
    """Columns of level and peak, and what they are: the device's where any run has them, else resident memory."""
    if "torch_allocated_mib" in phases and phases["torch_allocated_mib"].notna().any():
        return "torch_allocated_mib", "torch_peak_mib", "Device memory allocated (MiB)"
    return "proc_rss_mib", "proc_peak_rss_mib", "Resident memory (MiB)"


def _memory(
    axes: "Axes", row: dict[str, Any], phases: "pd.DataFrame", order: list[str], level: str, peak: str, title: str
) -> None:
    # A run of several steps passes a phase several times; its highest is what must fit.
    by_name = phases.groupby("name")[[level, peak]].max().astype(float) if len(phases) else None
    if by_name is not None:
        at = [order.index(n) for n in by_name.index]
        axes.bar(at, by_name[peak].fillna(by_name[level]), width=0.85, color=_PALE)
        axes.hlines(by_name[level], [x - 0.42 for x in at], [x + 0.42 for x in at], color=_BLUE, linewidth=1.6)
    else:
        axes.text(0.5, 0.5, "no phase reached", transform=axes.transAxes, ha="center", fontsize=8, color="0.4")
    well = row["status"] in _WELL
    if not well and row["peak_of"] == "resident" and len(phases) and level == "proc_rss_mib":
        # It ended in the phase after the last one it reported; the supervisor's looks know how high it got.
        axes.bar(max(at) + 1, row["peak_mib"], width=0.85, facecolor="none", edgecolor=_RED, linestyle="--")
    title = textwrap.fill(title, 40)
    axes.set_title(title + ("" if well else f"\n{row['status']}"), fontsize=8, color="black" if well else _RED, loc="left")
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


def _latencies(panels: Any, turns: "pd.DataFrame", runs: "pd.DataFrame") -> None:
    """By turn: time to the first token, and of each token after it. A line a run."""
    rows = runs.to_dict("records")
    for axes, column, title in zip(
        panels, ("first_token_ms", "ms_per_token"), ("Time to the first token (ms)", "Each token after it (ms)"), strict=True
    ):
        for at, row in enumerate(rows):
            mine = turns[turns["run"] == row["run"]]
            style = _LINES[at // 10 % len(_LINES)]
            axes.plot(mine["n"] + 1, mine[column].astype(float), style, marker="o", markersize=3, label=label(row, runs))
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("turn", fontsize=7)
        axes.set_xticks(sorted(set(turns["n"] + 1)))
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _losses(axes: "Axes", runs: "pd.DataFrame") -> None:
    rows = runs.to_dict("records")
    finite = [x for r in rows for x in (r["first_loss"], r["loss"]) if x is not None and math.isfinite(x)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > 30:
        axes.set_yscale("log")
    for at, row in enumerate(rows):
        first, last = row["first_loss"], row["loss"]
        ends = [x for x in (first, last) if x is not None and math.isfinite(x)]
        if not ends:
            text = "no loss" if row["status"] not in ("diverged", "collapsed") else "not finite"
            colour = "0.4" if row["status"] in _WELL else _RED
            axes.text(at, 0.06, text, transform=axes.get_xaxis_transform(), ha="center", fontsize=7, color=colour)
            continue
        axes.plot([at] * len(ends), ends, color="0.75", linewidth=1, zorder=1)
        if first is not None and math.isfinite(first):
            axes.scatter(at, first, facecolors="white", edgecolors="0.45", s=26, zorder=2, label="first step")
        if last is not None and math.isfinite(last):
            colour = _GREEN if row["status"] in _WELL else _RED
            axes.scatter(at, last, color=colour, s=26, zorder=3, label="at the end")
            axes.annotate(f"{last:.3g}", (at, last), xytext=(6, 0), textcoords="offset points", fontsize=7, va="center")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if handles:
        axes.legend(handles.values(), handles.keys(), fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title("Loss", fontsize=10, loc="left")
    axes.set_xticks(range(len(rows)), [label(r, runs).replace(" ", "\n") for r in rows], fontsize=7)
    axes.set_xlim(-0.5, len(rows) - 0.35)
    axes.margins(y=0.15)
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
