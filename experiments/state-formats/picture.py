"""Bits a weight against held-out loss, one panel a regime, with the Pareto front."""

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
TITLES = {"scratch": "From scratch", "finetune": "Fine-tuning the shipped model"}


def save(cells: pd.DataFrame, path: Path) -> None:
    """`cells` are table.py's, with `front`."""
    regimes = [r for r in TITLES if (cells["regime"] == r).any()]
    figure = Figure(figsize=(6.4 * len(regimes), 6.4), layout="constrained")
    for axes, regime in zip(figure.subplots(1, len(regimes), squeeze=False)[0], regimes, strict=True):
        _panel(axes, cells[cells["regime"] == regime], TITLES[regime])
    shapes = [Line2D([], [], ls="", marker=m, color="#777777", label=text) for m, text in STATES.values()]
    colours = [Line2D([], [], ls="", marker="o", color=c, label=text) for c, text in MASTERS.values()]
    lines = [
        Line2D([], [], color="#555555", lw=1.2, drawstyle="steps-post", label="Pareto front"),
        Line2D([], [], color="#555555", lw=1, ls="--", label="fp32 master and moments, + 1 %"),
        Line2D([], [], ls="", marker="o", mfc="none", color="#777777", label="hollow: diverged, drawn at the top"),
    ]
    columns = max(3, -(-(len(shapes) + len(colours) + len(lines)) // 4))
    figure.legend(handles=[*colours, *shapes, *lines], loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def _panel(axes, cells: pd.DataFrame, title: str) -> None:
    lived = cells[cells["gap"].notna()]
    low, high = lived["loss"].min(), lived["loss"].max()
    top = high * (high / low) ** 0.12 if high > low else high * 1.1
    for r in cells.to_dict("records"):
        colour, marker = MASTERS[r["master"]][0], STATES[r["state"]][0]
        lost = np.isnan(r["gap"])
        style = {"marker": marker, "color": colour, "ms": 7, "mfc": "none" if lost else colour, "ls": "", "capsize": 2, "lw": 1}
        spread = None if lost or np.isnan(r["sd"]) else r["sd"]
        axes.errorbar(r["bits"], top if lost else r["loss"], yerr=spread, zorder=3, **style)
    best = lived[lived["front"]].sort_values("bits")
    axes.step(best["bits"], best["loss"], where="post", color="#555555", lw=1.2, zorder=1)
    for n, r in enumerate(best.to_dict("records")):
        name = f"{MASTERS[r['master']][1]}\n{STATES[r['state']][1]}"
        where = {"textcoords": "offset points", "xytext": (4, -16 - 26 * (n % 3)), "ha": "left", "va": "top"}
        arrow = {"arrowstyle": "-", "color": "#999999", "lw": 0.6}
        axes.annotate(name, (r["bits"], r["loss"]), fontsize=7.5, arrowprops=arrow, zorder=4, **where)
    exact = lived[(lived["master"] == "fp32") & (lived["state"] == "fp32")]["loss"]
    if len(exact):
        axes.axhline(1.01 * float(exact.iloc[0]), color="#555555", lw=1, ls="--", zorder=1)
    axes.set(xscale="log", yscale="log", title=title, ylabel="held-out loss (nats a token)")
    axes.set_xlabel("stored bits a weight: master, image, m and v")
    axes.set_ylim(low / (high / low) ** 0.25 if high > low else None, top * (top / low) ** 0.05)
    ticks = [12, 16, 24, 32, 48, 64, 100]
    axes.set_xticks(ticks, [str(t) for t in ticks], minor=False)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.grid(color="#eeeeee", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
