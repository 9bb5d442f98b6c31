"""Pictures of runs as matplotlib figures: for notebooks, PNG files and the report.

Each takes the frames of `load_runs` and returns a Figure, or None if no run has what it shows. Every axis has its unit and
every memory its source; colours are those of Okabe and Ito, and nothing is told by colour alone.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from fp4lab.analysis.frames import Frames
from fp4lab.analysis.plots.curves import loss_curves, state_health, turn_latencies
from fp4lab.analysis.plots.heatmap import memory_heatmap
from fp4lab.analysis.plots.layers import layer_divergence
from fp4lab.analysis.plots.memory import memory_over_time
from fp4lab.analysis.plots.sweep import MOST_RUNS, save_figure, sweep_figure
from fp4lab.analysis.plots.tokens import first_token_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# file name: figure; the order of the report
FIGURES: dict[str, Callable[[Frames], "Figure | None"]] = {
    "memory_heatmap": memory_heatmap,
    "memory_over_time": memory_over_time,
    "loss_curves": loss_curves,
    "first_tokens": first_token_table,
    "layer_divergence": layer_divergence,
    "state_health": state_health,
    "turn_latencies": turn_latencies,
}

__all__ = [
    "FIGURES",
    "MOST_RUNS",
    "first_token_table",
    "layer_divergence",
    "loss_curves",
    "memory_heatmap",
    "memory_over_time",
    "save_figure",
    "state_health",
    "sweep_figure",
    "turn_latencies",
]
