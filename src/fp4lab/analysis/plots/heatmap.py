"""Peak memory over two swept options: which cells fit, which were killed, and how far the limit is."""

import math
from typing import TYPE_CHECKING, Any

from fp4lab.analysis.plots.style import (
    ALLOCATED,
    INK,
    MUTED,
    PANEL,
    PEAK_OF,
    VERMILION,
    WELL,
    clean,
    figure,
    in_order,
    in_unit,
    short,
)
from fp4lab.analysis.select import column, missing
from fp4lab.analysis.table import options

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from fp4lab.analysis.frames import Frames

_MOST_PANELS = 6
_WORDS = {"guard_killed": "guard", "killed_by_other": "killed", "unfinished": "no end"}


def memory_heatmap(frames: "Frames", x: str | None = None, y: str | None = None) -> "Figure | None":
    """A cell for each pair of values of the options `x` and `y`, by default the two with the most values.

    A third option makes panels, where it has at most six values; over all others a cell shows its highest run. A cell whose
    run did not end well has a cross and its status, and its figure is what was seen before the end: at least that much.
    The limit is a line on the scale. None if no run knows its memory, or nothing was swept.
    """
    from matplotlib.colors import Normalize

    runs = frames.runs
    known = runs[runs["peak_mib"].notna()]
    x, y, panels, rest = _axes(runs, x, y)
    if known.empty or x is None:
        return None
    highest = float(known["peak_mib"].max())
    limits = {float(v) for v in runs["limit_mib"].dropna()}
    limit = limits.pop() if len(limits) == 1 else None
    scale, unit = in_unit(highest)
    low, top = float(known["peak_mib"].min()), highest
    if limit is not None and limit < 2 * highest:
        top, low = max(top, limit), min(low, limit)
    if top == low:
        low, top = 0.99 * low, 1.01 * top
    norm = Normalize(low / scale, top / scale)
    values = in_order(runs[panels]) if panels else [None]
    xs, ys = (in_order(runs[c]) if c else [""] for c in (x, y))
    across = min(len(values), max(1, int(12 // (0.75 * len(xs) + 1.2))))
    down = math.ceil(len(values) / across)
    fig = figure(max(across * (0.75 * len(xs) + 1.2) + 1.0, 4.8), down * (0.42 * len(ys) + 0.8) + 0.7)
    grid = fig.subplots(down, across, squeeze=False)
    for at, axes in enumerate(grid.flat):
        if at >= len(values):
            axes.set_visible(False)
            continue
        mine = runs if panels is None else runs[runs[panels] == values[at]]
        _draw(axes, mine, (x, xs), (y, ys), norm, scale)
        clean(axes, f"{short(panels)}={values[at]}" if panels else "")
        axes.spines[["left", "bottom"]].set_visible(False)
    sources = {PEAK_OF[s] for s in known["peak_of"].dropna()}
    of = " of all the process tree has" if ALLOCATED.text in sources else ""
    text = f"Peak memory ({unit}): {'; '.join(sorted(sources))}"
    if rest:
        text += f"\nof the runs of a cell (over {', '.join(short(c) for c in rest)}) the highest"
    fig.suptitle(text, fontsize=10, x=0.01, ha="left", color=INK)
    _scale(fig, grid, norm, limit, scale, unit, limits, of)
    return fig


def _axes(runs: "pd.DataFrame", x: str | None, y: str | None) -> tuple[str | None, str | None, str | None, list[str]]:
    """Options of the two axes, of the panels, and the rest. None: there is none."""
    x, y = (column(runs, name) if name else None for name in (x, y))
    swept, _ = options(runs)
    left = sorted((c for c in swept if c not in (x, y)), key=lambda c: -runs[c].nunique())
    x = x or (left.pop(0) if left else None)
    y = y or (left.pop(0) if left else None)
    panels = next((c for c in left if 1 < runs[c].nunique() <= _MOST_PANELS), None)
    return x, y, panels, [c for c in left if c != panels]


def _draw(
    axes: Any, runs: "pd.DataFrame", x: tuple[str | None, list], y: tuple[str | None, list], norm: Any, scale: float
) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    cells: dict[tuple[int, int], dict[str, Any]] = {}
    for row in runs.to_dict("records"):
        if any(name is not None and missing(row[name]) for name, _ in (x, y)):
            continue
        at = (x[1].index(row[x[0]]) if x[0] else 0, y[1].index(row[y[0]]) if y[0] else 0)
        if at not in cells or _height(row) > _height(cells[at]):
            cells[at] = row
    for i in range(len(x[1])):
        for j in range(len(y[1])):
            row = cells.get((i, j), {})
            peak = row.get("peak_mib")
            if peak is None or missing(peak):
                axes.add_patch(Rectangle((i - 0.48, j - 0.46), 0.96, 0.92, facecolor="none", edgecolor=MUTED, linewidth=0.5))
                axes.text(i, j, "no run" if not row else "✕ " + _status(row), ha="center", va="center", fontsize=6, color=MUTED)
                continue
            colour = colormaps["cividis"](norm(peak / scale))
            ink = "#000000" if 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 0.45 else "#ffffff"
            well = row["status"] in WELL
            edge: dict[str, Any] = {"edgecolor": "none"} if well else {"edgecolor": VERMILION, "linewidth": 2, "hatch": "////"}
            axes.add_patch(Rectangle((i - 0.48, j - 0.46), 0.96, 0.92, facecolor=colour, **edge))
            text = f"{peak / scale:.4g}" if scale > 1 else f"{peak:.0f}"
            shown = text if well else f"✕ {_status(row)}\n≥ {text}"
            backed = {} if well else {"bbox": {"facecolor": colour, "edgecolor": "none", "pad": 1}}
            axes.text(i, j, shown, ha="center", va="center", fontsize=7, color=ink, **backed)
    for set_ticks, (name, values) in ((axes.set_xticks, x), (axes.set_yticks, y)):
        set_ticks(range(len(values)), [str(v) for v in values] if name else [])
    axes.set_xlabel(short(x[0]) if x[0] else "")
    axes.set_ylabel(short(y[0]) if y[0] else "")
    axes.set_xlim(-0.5, len(x[1]) - 0.5)
    axes.set_ylim(len(y[1]) - 0.5, -0.5)
    axes.tick_params(length=0)


def _height(row: dict[str, Any]) -> tuple[bool, float]:
    """A run that was killed counts as higher than any that was not."""
    return row["status"] not in WELL, -1.0 if missing(row["peak_mib"]) else row["peak_mib"]


def _status(row: dict[str, Any]) -> str:
    return _WORDS.get(row["status"], row["status"])


def _scale(
    fig: "Figure", grid: Any, norm: Any, limit: float | None, scale: float, unit: str, several: set[float], of: str
) -> None:
    """The colour scale, with the limit as a line."""
    from matplotlib.cm import ScalarMappable

    bar = fig.colorbar(ScalarMappable(norm, "cividis"), ax=list(grid.flat), shrink=0.9, pad=0.01, aspect=14)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, colors=MUTED, labelcolor=INK)
    bar.ax.set_facecolor(PANEL)
    if limit is not None and limit / scale <= norm.vmax:
        bar.ax.axhline(limit / scale, color=VERMILION, linewidth=2.5)
        text = f"guard limit {limit / scale:.4g} {unit}{of}: the line"
    elif limit is not None:
        text = f"guard limit {limit / scale:.4g} {unit}{of}, above the scale"
    else:
        text = "guard limits differ: see the runs" if several else "no guard limit"
    bar.set_label(text, fontsize=7, color=INK)
