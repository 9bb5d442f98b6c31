"""Lines over steps and turns: losses, the health of weights and optimizer state, latencies of conversations."""

import math
from typing import TYPE_CHECKING, Any

from fp4lab.analysis.plots.style import BLUE, INK, MUTED, VERMILION, WELL, clean, draw_legend, figure, label, looks

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fp4lab.analysis.frames import Frames

_HEALTH = (  # columns of `health`: title, are they shares, on a logarithmic scale
    (("code_changed",), "Weights whose code or scale changed (%)", True),
    (("update_lost",), "Updates that were lost (%)", True),
    (("update_kept",), "Change made / change wanted (1 = all kept)", False),
    (("max_update_over_lr",), "Largest update / learning rate", False),
    (("zero_scale_w", "zero_scale_m", "zero_scale_v"), "Blocks whose scale is zero, worst of w, m, v (%)", True),
    (("saturated_w", "saturated_m", "saturated_v"), "Blocks at the largest scale, worst of w, m, v (%)", True),
)

_COUNTED = {"chat": "turn, from 0", "compare": "prompt, from 0"}  # what a loss's step is in tasks that do not train


def loss_curves(frames: "Frames") -> "Figure | None":
    """Loss (nats a token, or what `loss` names) by step: training at the left, held-out at the right; None without losses.

    Of runs that took one step, a dot before and one after it instead of a curve. A cross is the last finite loss of a run that
    did not end well.
    """
    losses = frames.losses.astype({"loss": float})
    if losses.empty:
        return None
    if losses.groupby(["run", "split"]).size().max() < 3:
        count = len(frames.runs)
        fig = figure(min(max(0.25 * count, 0.9 * min(count, 12), 5.0), 13.0) + 1.0, 3.4)
        axes = fig.subplots()
        draw_ends(axes, frames.runs)
        axes.set_ylabel(f"loss ({_loss_unit(frames)})", fontsize=7, color=INK)
        return fig
    splits = [s for s in ("train", "eval") if (losses["split"] == s).any()]
    drawn, legend = looks(frames.runs)
    counts = {_COUNTED.get(task, "optimizer step (0: before the first)") for task in frames.starts["task"]}
    counted = " or ".join(sorted(counts)) or "step"
    fig = figure(4.2 * len(splits) + 2.6, 3.4)
    panels = fig.subplots(1, len(splits), squeeze=False, sharey=True)[0]
    for axes, split in zip(panels, splits, strict=True):
        mine = losses[losses["split"] == split]
        for row in frames.runs.to_dict("records"):
            _line(axes, mine[mine["run"] == row["run"]], row, "step", "loss", drawn)
        clean(axes, {"train": "Training loss", "eval": "Held-out loss, or of paths that are not trained"}[split])
        axes.set_xlabel(counted, fontsize=7, color=INK)
        _whole(axes, mine["step"])
    panels[0].set_ylabel(f"loss ({_loss_unit(frames)})", fontsize=7, color=INK)
    finite = losses["loss"][losses["loss"].map(math.isfinite)]
    if len(finite) and finite.min() > 0 and finite.max() / finite.min() > 30:
        panels[0].set_yscale("log")
    draw_legend(panels[-1], legend)
    return fig


def draw_ends(axes: "Axes", runs: "pd.DataFrame") -> None:
    """Of each run the loss before the first step (hollow) and at the end."""
    rows = runs.to_dict("records")
    finite = [x for r in rows for x in (r["first_loss"], r["loss"]) if x is not None and math.isfinite(x)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > 30:
        axes.set_yscale("log")
    for at, row in enumerate(rows):
        first, last = row["first_loss"], row["loss"]
        ends = [x for x in (first, last) if x is not None and math.isfinite(x)]
        well = row["status"] in WELL
        if not ends:
            text = "not finite" if row["status"] in ("diverged", "collapsed") else "no loss"
            mark = text if len(rows) <= 12 else "✕"
            axes.text(
                at,
                0.06,
                mark,
                transform=axes.get_xaxis_transform(),
                ha="center",
                fontsize=7,
                color=MUTED if well else VERMILION,
            )
            continue
        axes.plot([at] * len(ends), ends, color="0.75", linewidth=1, zorder=1)
        if first is not None and math.isfinite(first):
            axes.scatter(at, first, facecolors="white", edgecolors="0.45", s=26, zorder=2, label="first step")
        if last is not None and math.isfinite(last):
            name = "at the end" if well else "when it was ended"
            axes.scatter(at, last, color=BLUE if well else VERMILION, marker="o" if well else "X", s=30, zorder=3, label=name)
            if len(rows) <= 24:
                axes.annotate(
                    f"{last:.3g}", (at, last), xytext=(6, 0), textcoords="offset points", fontsize=7, va="center", color=INK
                )
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if handles:
        axes.legend(
            handles.values(),
            handles.keys(),
            fontsize=7,
            frameon=False,
            labelcolor=INK,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
        )
    clean(axes, "Loss before the first step and at the end", 10)
    few = len(rows) <= 12
    axes.set_xticks(range(len(rows)), [label(r, runs).replace(" ", "\n") if few else r["run"] for r in rows], fontsize=7)
    axes.set_xlabel("" if few else "run", fontsize=7, color=INK)
    axes.set_xlim(-0.5, len(rows) - 0.35)
    axes.margins(y=0.15)


def state_health(frames: "Frames") -> "Figure | None":
    """What the optimizer step did to the packed state, by step; a panel for each measure that some run has."""
    health = frames.health
    kept = [m for m in _HEALTH if len(health) and health[list(m[0])].notna().any(axis=None)]
    if not kept:
        return None
    drawn, legend = looks(frames.runs)
    across = min(3, len(kept))
    fig = figure(3.4 * across + 2.4, 2.3 * math.ceil(len(kept) / across))
    grid = fig.subplots(math.ceil(len(kept) / across), across, squeeze=False)
    for axes, (names, title, share) in zip(grid.flat, kept, strict=False):
        worst = health[["run", "step"]].assign(value=health[list(names)].max(axis=1) * (100 if share else 1))
        for row in frames.runs.to_dict("records"):
            _line(axes, worst[worst["run"] == row["run"]], row, "step", "value", drawn)
        clean(axes, title)
        axes.set_xlabel("optimizer step", fontsize=7, color=INK)
        _whole(axes, worst["step"])
        top = worst["value"].max()
        if top == 0:
            axes.text(0.5, 0.65, "none in any run", transform=axes.transAxes, ha="center", fontsize=8, color=MUTED)
            axes.set_yticks([])
        elif share:
            axes.set_ylim(-0.02 * top, 1.15 * top)
        elif top > 30:
            axes.set_yscale("log")
    for axes in list(grid.flat)[len(kept) :]:
        axes.set_visible(False)
    draw_legend(grid[0, -1], legend)
    return fig


def turn_latencies(frames: "Frames") -> "Figure | None":
    """By turn of a conversation: time to the first token, and of each token after it. A line a run; None without turns."""
    if frames.turns.empty:
        return None
    fig = figure(10.5, 3.2)
    draw_latencies(fig.subplots(1, 2), frames.turns, frames.runs)
    return fig


def draw_latencies(panels: Any, turns: "pd.DataFrame", runs: "pd.DataFrame") -> None:
    """The two panels of `turn_latencies`."""
    drawn, legend = looks(runs)
    turns = turns.assign(turn=turns["n"] + 1)
    named = (("first_token_ms", "Time to the first token (ms)"), ("ms_per_token", "Each token after it, median (ms)"))
    for axes, (column, title) in zip(panels, named, strict=True):
        for row in runs.to_dict("records"):
            _line(axes, turns[turns["run"] == row["run"]], row, "turn", column, drawn)
        clean(axes, title)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("turn", fontsize=7, color=INK)
        _whole(axes, turns["turn"])
    draw_legend(panels[1], legend)


def _line(axes: "Axes", found: "pd.DataFrame", row: dict[str, Any], x: str, y: str, drawn: dict) -> None:
    found = found[found[y].notna()].astype({x: float, y: float}).sort_values(x)
    found = found[found[y].map(math.isfinite)]
    if found.empty:
        return
    look = drawn[row["run"]]
    marker = look.marker if len(found) <= 40 else ""
    axes.plot(found[x], found[y], look.dashes, marker=marker, markersize=4, linewidth=1.3, color=look.colour, alpha=0.9)
    if row["status"] not in WELL:
        axes.plot(found[x].iloc[-1], found[y].iloc[-1], marker="X", color=VERMILION, markersize=7, zorder=5, linestyle="")


def _whole(axes: "Axes", steps: "pd.Series") -> None:
    """Ticks at whole steps."""
    from matplotlib.ticker import MaxNLocator

    if steps.nunique() == 1:
        axes.set_xticks([int(steps.iloc[0])])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _loss_unit(frames: "Frames") -> str:
    """Nats where it is cross-entropy; the records know which loss was asked for since they have the configuration."""
    named = {(c or {}).get("loss", "ce") for c in frames.starts["config"]}
    if named <= {"ce"}:
        return "nats a token"
    return "mean |difference|" if named == {"scalar"} else "nats a token, or mean |difference| where loss=scalar"
