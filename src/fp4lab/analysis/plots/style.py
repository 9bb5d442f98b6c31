"""What all figures share: colours, how a run is drawn and called, which memory is shown."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fp4lab.analysis.select import missing, number
from fp4lab.analysis.table import options

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fp4lab.analysis.frames import Frames

# Okabe and Ito, "Color Universal Design" (2008), but black, which the dark page has no use for.
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, YELLOW = "#cc79a7", "#56b4e9", "#f0e442"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, "#8c8c8c")
Dashes: TypeAlias = Literal["-", "--", ":", "-."]
DASHES: tuple[Dashes, ...] = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK, MUTED, GRID, PANEL = "#1b1f24", "#6a737d", "#d8dde3", "#f2f4f7"  # text, lesser text, lines, background of a panel
WELL = ("completed", "stopped")
GIB = 1024.0


@dataclass(frozen=True)
class Source:
    """The memory that figures show, columns of phases (and samples): where it stands and its peak since the last phase."""

    level: str
    peak: str
    text: str
    plus: str | None = None  # a column to be added to `level`

    def levels(self, records: "pd.DataFrame") -> "pd.Series":
        """MiB of each record; NaN where it is unknown."""
        found = records[self.level].astype(float)
        return found if self.plus is None else found + records[self.plus].astype(float)


ALLOCATED = Source("torch_allocated_mib", "torch_peak_mib", "allocated by torch on the device")
DEVICE = Source("pid_mem_mib", "pid_mem_mib", "device memory of the process tree, NVML")
UNIFIED = Source("pid_mem_mib", "pid_mem_mib", "device memory (NVML) and resident set of the process tree", "proc_rss_mib")
RESIDENT = Source("proc_rss_mib", "proc_peak_rss_mib", "resident set of the process tree")
PEAK_OF = {"allocated": ALLOCATED.text, "device": DEVICE.text, "resident": RESIDENT.text}


def watched(frames: "Frames") -> Source:
    """What the guard compares with its limit, and samples show (supervise/guard.py: used).

    The device's memory where processes have any, and the resident set with it where the two are one memory; else resident.
    """
    parts = (frames.phases, frames.samples)
    if not any(f["pid_mem_mib"].max() > 0 for f in parts):
        return RESIDENT
    return UNIFIED if any((f["unified"] == True).any() for f in parts) else DEVICE  # noqa: E712  (a column of objects)


def figure(width: float, height: float) -> "Figure":
    """An empty figure, inches, outside pyplot: nothing to close."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def clean(axes: "Axes", title: str = "", size: float = 8) -> None:
    """Thin lines, no box, title at the left."""
    axes.set_title(title, fontsize=size, loc="left", color=INK)
    axes.tick_params(which="both", labelsize=7, colors=MUTED, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.set_facecolor("none")
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_fontsize(7)
        axis.label.set_color(INK)


def in_unit(highest_mib: float) -> tuple[float, str]:
    """What to divide MiB by, and the unit's name, so that numbers stay short."""
    return (GIB, "GiB") if highest_mib >= 10 * GIB else (1.0, "MiB")


def label(row: dict[str, Any], runs: "pd.DataFrame") -> str:
    """ "2: chunk_rows=32 seq_len=8": the run and what was swept of it."""
    swept, _ = options(runs)
    given = " ".join(f"{short(n)}={row[n]}" for n in swept if isinstance(row[n], str))
    return f"{row['run']}: {given}" if given else str(row["run"])


def short(option: str) -> str:
    """`step.chunk_rows` as `chunk_rows`."""
    return option.rpartition(".")[2].removeprefix("option ")


def in_order(values: Any) -> list[Any]:
    """Distinct values: numbers by size, then text as it came."""
    known = dict.fromkeys(v for v in values if not missing(v))
    return sorted(known, key=lambda v: (number(v) is None, number(v) or 0.0))


@dataclass(frozen=True)
class Look:
    """How a run is drawn."""

    colour: str
    dashes: Dashes
    marker: str


def looks(runs: "pd.DataFrame") -> tuple[dict[str, Look], list[tuple[str, Look]]]:
    """Run: its look; and the legend.

    Up to eight runs have a colour each. More of them share: an option decides the colour, another the dashes, so that the
    legend stays readable and a curve still tells where it comes from.
    """
    rows = runs.to_dict("records")
    if len(rows) <= len(CYCLE):
        each = {r["run"]: Look(CYCLE[i], DASHES[i % len(DASHES)], MARKERS[i]) for i, r in enumerate(rows)}
        return each, [(label(r, runs), each[r["run"]]) for r in rows]
    swept = sorted(options(runs)[0], key=lambda c: runs[c].nunique(), reverse=True)
    by = next((c for c in swept if runs[c].nunique() <= len(CYCLE)), None)
    then = next((c for c in swept if c != by and runs[c].nunique() <= len(DASHES)), None)
    first = in_order(runs[by]) if by else []
    second = in_order(runs[then]) if then else []
    colours = {v: CYCLE[i] for i, v in enumerate(first)}
    dashes = {v: i for i, v in enumerate(second)}
    drawn = {}
    for r in rows:
        at = dashes.get(r[then], 0) if then else 0
        drawn[r["run"]] = Look(colours.get(r[by], BLUE) if by else BLUE, DASHES[at], MARKERS[at])
    legend = [(f"{short(by)}={v}", Look(colours[v], "-", "")) for v in first] if by else []
    if then:
        legend += [(f"{short(then)}={v}", Look(MUTED, DASHES[dashes[v]], MARKERS[dashes[v]])) for v in second]
    return drawn, legend


def draw_legend(axes: "Axes", entries: list[tuple[str, Look]]) -> None:
    """At the right of `axes`."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=k.colour, linestyle=k.dashes, marker=k.marker or None, markersize=4) for _, k in entries]
    axes.legend(
        lines,
        [text for text, _ in entries],
        fontsize=7,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        labelcolor=INK,
        handlelength=3,
    )
