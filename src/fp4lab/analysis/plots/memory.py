"""Memory over time, a panel a run: by phase, with the guard's limit and the death."""

import math
import textwrap
from typing import TYPE_CHECKING, Any

from fp4lab.analysis.plots.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    WELL,
    YELLOW,
    Source,
    clean,
    in_unit,
    label,
    watched,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fp4lab.analysis.frames import Frames

# What a phase belongs to; a phase is named after its end.
GROUPS = {
    "start": "load",
    "model_loaded": "load",
    "session_disposed": "load",
    "post_load_compacted": "load",
    "first_token_done": "first token",
    "turn_done": "turn",
    "forward_done": "forward",
    "backward_done": "backward",
    "optimizer_step_done": "optimizer step",
}
COLOURS = {
    "load": SKY,
    "first token": ORANGE,
    "turn": YELLOW,
    "forward": GREEN,
    "backward": PURPLE,
    "optimizer step": BLUE,
    "other": "#a8b0b8",
    "until its end": "#e8c4ae",
}
_CLOSE = 2.5  # a limit further than this many times the highest reading is named, not drawn


def memory_over_time(frames: "Frames", run: str | None = None) -> "Figure | None":
    """Memory of every run, or of the one called `run`, on one scale: what the guard watches.

    The line is the reading at each phase's end and sample; its area has the colour of the phase, a thin line above is the
    phase's own peak. Dashed: the limit. A cross is where a run ended that did not end well. None if no run has readings.
    """
    source = watched(frames)
    runs = frames.runs if run is None else frames.runs[frames.runs["run"] == run]
    rows = [r for r in runs.to_dict("records") if len(_readings(frames, r["run"], source))]
    if not rows:
        return None
    count = len(rows)
    across = 1 if count == 1 else min(count, 3 if count <= 12 else 5)
    down = math.ceil(count / across)
    fig, grid = _panels(across, down, 3.0 if count == 1 else 2.0 if count <= 12 else 1.5)
    highest = max(float(_readings(frames, r["run"], source)["mib"].max()) for r in rows)
    scale, unit = in_unit(highest)
    limits = [r["limit_mib"] for r in rows if _near(r, highest)]
    for axes, row in zip(grid.flat, rows, strict=False):
        axes.set_autoscale_on(False)
        axes.set_ylim(0, 1.12 * max([highest, *limits]) / scale)
        _draw(axes, frames, row, source, scale, unit, highest)
        clean(axes, textwrap.fill(label(row, frames.runs), 60 if count <= 12 else 38), 8 if count <= 12 else 6)
        if row["status"] not in WELL:
            axes.title.set_color(VERMILION)
            axes.set_title(
                f"{axes.get_title(loc='left')}\n✕ {row['status']}",
                fontsize=8 if count <= 12 else 6,
                loc="left",
                color=VERMILION,
            )
    for axes in list(grid.flat)[count:]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(unit, fontsize=7, color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("seconds since the run's start", fontsize=7, color=INK)
    for axes in grid[:, 1:].flat:
        axes.set_yticklabels([])
    seen = {GROUPS.get(name, "other") for name in frames.phases["name"]} | {"until its end"}
    _legend(fig, source, unit, seen)
    return fig


def _panels(across: int, down: int, each: float) -> tuple["Figure", Any]:
    """Laid out in inches, and no shared axes: with sixty panels matplotlib's own ways take a quarter of a minute."""
    from matplotlib.figure import Figure

    width, height = 9.0 if across == 1 else 12.0, down * each + 0.9
    fig = Figure(figsize=(width, height))
    wide, tall = (width - 0.7 - 0.2 * (across - 1)) / across, each - 0.75  # of a panel; above it are its title, below its ticks
    spaces = {"wspace": 0.2 / wide, "hspace": 0.75 / tall, "left": 0.6 / width, "right": 1 - 0.1 / width}
    grid = fig.subplots(down, across, squeeze=False)
    fig.subplots_adjust(top=1 - (0.6 if across * down == 1 else 0.85) / height, bottom=0.8 / height, **spaces)
    return fig, grid


def _readings(frames: "Frames", run: str, source: Source) -> Any:
    """t and mib of a run in order: its phases, samples, and what made the guard act. Ends with the process."""
    import pandas as pd

    parts = [pd.DataFrame({"t": f["t"], "mib": source.levels(f)})[f["run"] == run] for f in (frames.phases, frames.samples)]
    acted = frames.guards.loc[frames.guards["run"] == run, ["t", "reading_mib"]].set_axis(["t", "mib"], axis=1)
    # A reading far from all others is of something else: the machine's available memory, or a time limit's none.
    parts.append(acted[acted["mib"] < 10 * max((p["mib"].max() for p in parts), default=0)])
    found = pd.concat([p for p in parts if len(p)] or parts).dropna().sort_values("t")
    found = found[found["t"] >= 0].reset_index(drop=True)
    held = found.index[found["mib"] > 0]
    return found[found.index <= (held[-1] if len(held) else -1)]


def _near(row: dict[str, Any], highest: float) -> bool:
    return row["limit_mib"] is not None and row["limit_mib"] <= _CLOSE * highest


def _draw(axes: "Axes", frames: "Frames", row: dict[str, Any], source: Source, scale: float, unit: str, highest: float) -> None:
    import numpy as np

    readings = _readings(frames, row["run"], source)
    t, mib = readings["t"].to_numpy(), readings["mib"].to_numpy() / scale
    phases = frames.phases[frames.phases["run"] == row["run"]]
    end = max(float(t[-1]), row["seconds"] or 0.0)
    before = 0.0
    spans = [(p["t"], GROUPS.get(p["name"], "other"), p[source.peak]) for p in phases.to_dict("records")]
    for until, group, peak in [*spans, (end, "until its end", math.nan)]:
        edges = np.array([before, *t[(t > before) & (t < until)], until])
        axes.fill_between(edges, np.interp(edges, t, mib), color=COLOURS[group], linewidth=0, alpha=0.85)
        if source.peak != source.level and not math.isnan(peak):
            axes.hlines(peak / scale, before, until, color=MUTED, linewidth=0.7)
        before = until
    axes.plot(t, mib, color=INK, linewidth=0.9)
    if _near(row, highest):
        axes.axhline(row["limit_mib"] / scale, color=VERMILION, linestyle="--", linewidth=1.1)
    elif row["limit_mib"] is not None and row["limit_mib"] == row["limit_mib"]:
        text = f"limit {row['limit_mib'] / scale:.4g} {unit}, above the scale"
        axes.text(0.99, 0.97, text, transform=axes.transAxes, ha="right", va="top", fontsize=6, color=VERMILION)
    if row["status"] not in WELL:
        breach = frames.guards[(frames.guards["run"] == row["run"]) & (frames.guards["verdict"] == "breach")]
        seen = breach[breach["reading_mib"].isin(readings["mib"])]
        at = (float(seen["t"].iloc[0]), float(seen["reading_mib"].iloc[0]) / scale) if len(seen) else (float(t[-1]), mib[-1])
        axes.plot(
            *at,
            marker="X",
            color=VERMILION,
            markeredgecolor="white",
            markeredgewidth=0.6,
            markersize=8,
            zorder=5,
            clip_on=False,
        )
    axes.set_xlim(0, end * 1.02 or 1.0)


def _legend(fig: "Figure", source: Source, unit: str, seen: set[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=c, alpha=0.85, label=name) for name, c in COLOURS.items() if name in seen]
    handles.append(Line2D([], [], color=VERMILION, linestyle="--", label="guard limit"))
    handles.append(Line2D([], [], color=VERMILION, marker="X", linestyle="", label="ended here"))
    if source.peak != source.level:
        handles.append(Line2D([], [], color=MUTED, linewidth=0.7, label="peak of the phase"))
    fig.suptitle(f"Memory over time ({unit}): {source.text}", fontsize=10, x=0.01, ha="left", color=INK)
    fig.legend(
        handles=handles,
        loc="outside lower left",
        ncols=len(handles),
        fontsize=7,
        frameon=False,
        labelcolor=INK,
        handlelength=1.5,
        columnspacing=1.2,
    )
