"""Goals met and controls kept over data and learning rate, one panel a format."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

NAMES = {
    "packed": "packed, nearest",
    "packed_stochastic": "packed, stochastic",
    "packed_residual": "packed + int8 residual",
    "fp32": "fp32 master",
}
MOMENTS = {"nvfp4": "NVFP4 moments, single level", "nvfp4_two_level": "NVFP4 moments, two levels", "fp32": "fp32 moments"}
DARK = 0.55  # share of kept controls below which a cell's text is white
COLUMNS = 3


def save(runs: pd.DataFrame, path: Path) -> None:
    """`runs` are mixes_table.py's; of several seeds the mean of what is kept and the least of goals."""
    formats = list(dict.fromkeys(zip(runs["master"], runs["state"], strict=True)))
    mixes, rates = list(runs["mix"].cat.categories), sorted(runs["lr"].unique())
    columns = min(COLUMNS, len(formats))
    lines = -(-len(formats) // columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 0.9 + 3.3 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes, form in zip(panels.flat, formats, strict=False):
        mine = runs[(runs["master"] == form[0]) & (runs["state"] == form[1])]
        image = _panel(axes, mine, mixes, rates)
        axes.set_title(f"{NAMES[form[0]]}\n{MOMENTS[form[1]]}, {mine['state_mib'].iloc[0]:.0f} MiB", fontsize=9)
    for axes in list(panels.flat)[len(formats) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=panels, shrink=0.8, pad=0.02, label="control answers kept (worst path)")
    bar.ax.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    title = "Goals met of 3, and controls kept. Framed: 3 of 3 within the bounds on controls. Empty: not run"
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("learning rate", fontsize=9)
    figure.savefig(path, dpi=130)


def _panel(axes, runs: pd.DataFrame, mixes: list[str], rates: list[float]):
    grid = np.full((len(mixes), len(rates)), np.nan)
    for (mix, rate), cell in runs.groupby(["mix", "lr"], observed=True):
        y, x = mixes.index(mix), rates.index(rate)
        grid[y, x] = cell["controls_kept"].mean()
        text = f"{cell['goals_met'].min():.0f}/{cell['goals'].max():.0f}\n{grid[y, x]:.0%}"
        axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if grid[y, x] < DARK else "black")
        if (cell["verdict"] == "reached").all():
            axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, ec="#D55E00", lw=2))
    axes.set_xticks(range(len(rates)), [f"{r:.0e}".replace("e-0", "e-") for r in rates], fontsize=8)
    axes.set_yticks(range(len(mixes)), mixes, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return axes.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
