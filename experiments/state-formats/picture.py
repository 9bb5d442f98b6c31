"""Bits a weight against held-out loss over that of fp32 / fp32, one panel a regime, with the Pareto front."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe and Ito's colours; every master and every state has a shape of its own besides
MASTERS = {
    "packed": ("#D55E00", "packed, nearest"),
    "packed_stochastic": ("#0072B2", "packed, stochastic"),
    "packed_residual": ("#CC79A7", "packed + int8 residual"),
    "bf16_stochastic": ("#009E73", "bf16, stochastic"),
    "fp32": ("#000000", "fp32"),
}
STATES = {
    "nvfp4": ("v", "NVFP4, single level"),
    "nvfp4_two_level": ("D", "NVFP4, two levels"),
    "int8": ("s", "int8 a row"),
    "int8_block": ("P", "int8 blocks, dynamic"),
    "bf16": ("^", "bf16"),
    "fp32": ("o", "fp32"),
}
LINEAR = 2.0  # per cent: the axis is linear up to here and logarithmic beyond
TITLES = {"scratch": "From scratch", "finetune": "Fine-tuning the shipped model"}


def save(cells: pd.DataFrame, path: Path) -> None:
    """`cells` are table.py's, with `front`."""
    regimes = [r for r in TITLES if (cells["regime"] == r).any()]
    figure = Figure(figsize=(6.6 * len(regimes), 7.4), layout="constrained")
    for axes, regime in zip(figure.subplots(1, len(regimes), squeeze=False)[0], regimes, strict=True):
        _panel(axes, cells[cells["regime"] == regime], TITLES[regime])
    shapes = [Line2D([], [], ls="", marker=m, color="#777777", label=f"moments {text}") for m, text in STATES.values()]
    colours = [Line2D([], [], ls="", marker="o", color=c, label=f"master {text}") for c, text in MASTERS.values()]
    lines = [
        Line2D([], [], color="#555555", lw=1.2, drawstyle="steps-post", label="Pareto front"),
        Line2D([], [], color="#555555", lw=1, ls="--", label="1 % over fp32 master and moments"),
        Line2D([], [], ls="", marker="o", mfc="none", color="#777777", label="hollow: diverged, drawn at the top"),
    ]
    columns = max(3, -(-(len(shapes) + len(colours) + len(lines)) // 4))
    figure.legend(handles=[*colours, *shapes, *lines], loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _panel(axes, cells: pd.DataFrame, title: str) -> None:
    lived = cells[cells["gap"].notna()]
    low, high = 100 * lived["gap"].min(), 100 * lived["gap"].max()
    top = 3 * max(high, LINEAR)
    exact = lived[(lived["master"] == "fp32") & (lived["state"] == "fp32")]["loss"]
    for r in cells.to_dict("records"):
        colour, marker = MASTERS[r["master"]][0], STATES[r["state"]][0]
        lost = np.isnan(r["gap"])
        style = {"marker": marker, "color": colour, "ms": 7, "mfc": "none" if lost else colour, "ls": "", "capsize": 2, "lw": 1}
        spread = None if lost or np.isnan(r["gap_sd"]) else 100 * r["gap_sd"]
        axes.errorbar(r["bits"], top if lost else 100 * r["gap"], yerr=spread, zorder=3, **style)
    best = lived[lived["front"]].sort_values("bits")
    axes.step(best["bits"], 100 * best["gap"], where="post", color="#555555", lw=1.2, zorder=1)
    names = []
    for n, r in enumerate(best.to_dict("records"), start=1):
        where = {"textcoords": "offset points", "xytext": (-8, -5), "ha": "center", "va": "top"}
        axes.annotate(str(n), (r["bits"], 100 * r["gap"]), fontsize=8, fontweight="bold", zorder=4, **where)
        names.append(f"{n}  {MASTERS[r['master']][1]} · {STATES[r['state']][1]}, {r['bits']:.1f} bits, {100 * r['gap']:+.1f} %")
    axes.axhline(1, color="#555555", lw=1, ls="--", zorder=1)
    axes.axhline(0, color="#bbbbbb", lw=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=LINEAR, linscale=1.5)
    axes.set_ylim(min(low, 0) - 0.35 * LINEAR if low > -LINEAR else 1.5 * low, 1.6 * top)
    axes.set_title(f"{title}   (fp32 / fp32: {exact.iloc[0]:.3f} nats a token)", fontsize=11)
    axes.set_ylabel(f"held-out loss over fp32 / fp32 (%; linear to {LINEAR:g})")
    axes.set_xlabel("stored bits a weight: master, image, m and v\n\nPareto front\n" + "\n".join(names), fontsize=9)
    ticks = [12, 16, 24, 32, 48, 64, 100]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    steps = [
        t for t in (-30, -10, -5, -2, -1, 0, 1, 2, 5, 10, 30, 100, 300, 1000) if axes.get_ylim()[0] <= t <= 1.2 * max(high, 3)
    ]
    axes.set_yticks(steps, [str(t) for t in steps])
    axes.minorticks_off()
    axes.grid(color="#eeeeee", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
