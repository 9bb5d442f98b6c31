"""The table at the end of a sweep, and summary.csv."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

SUMMARY = "summary.csv"
# columns of load_runs that are results; the rest are what was swept
RESULTS = frozenset(
    {"run", "status", "reason", "loss", "first_loss", "trained", "first_token", "worst_kl", "codes_changed", "updates_lost"}
    | {"peak_mib", "peak_of", "slowest_phase", "slowest_ms", "last_phase", "seconds"}
)
_COLOURS = {"completed": "green", "stopped": "green"}


def sweep_table(runs: "pd.DataFrame", title: str = "") -> Table:
    """Runs side by side: what was swept, then status, loss, first-token agreement, peak memory, slowest phase, time."""
    swept = [c for c in runs.columns if c not in RESULTS]
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("run", justify="right")
    for name in swept:
        table.add_column(name, justify="right")
    for name in ("status", "loss", "first token", "worst KL", "codes moved", "peak MiB", "slowest phase", "s"):
        table.add_column(name, justify="left" if name in ("status", "first token", "slowest phase") else "right")
    for row in runs.to_dict("records"):
        colour = _COLOURS.get(row["status"], "red")
        untrained = " (not trained)" if row["trained"] is False else ""
        slowest = "" if _missing(row["slowest_phase"]) else f"{row['slowest_phase']} {row['slowest_ms']:.0f} ms"
        table.add_row(
            str(row["run"]),
            *("" if _missing(row[c]) else str(row[c]) for c in swept),
            f"[{colour}]{row['status']}[/]{untrained}",
            *(_shown(row["loss"], ".4f"), row["first_token"], _shown(row["worst_kl"], ".1e")),
            *(_shown(row["codes_changed"], ".2%"), _shown(row["peak_mib"], ".0f"), slowest),
            _shown(row["seconds"], ".1f"),
        )
    return table


def write_summary(runs: "pd.DataFrame", folder: Path) -> Path:
    """summary.csv beside the runs."""
    path = folder / SUMMARY
    runs.to_csv(path, index=False)
    return path


def reasons(runs: "pd.DataFrame") -> list[str]:
    """One line for each run that has something to explain."""
    return [f"run {r['run']}: {r['status']}: {r['reason']}" for r in runs.to_dict("records") if r["reason"]]


def _missing(x: Any) -> bool:
    return x is None or (isinstance(x, float) and math.isnan(x))


def _shown(x: Any, spec: str) -> str:
    return "" if _missing(x) else format(x, spec)
