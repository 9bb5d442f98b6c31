"""Hydra's hook at the end of a sweep: the table on the terminal and summary.csv in the sweep's folder."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepTable(Callback):
    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if config.dry_run:
            return
        from rich.console import Console

        from fp4lab.analysis.frames import load_runs
        from fp4lab.analysis.table import reasons, sweep_table, write_summary

        folder = Path(config.hydra.sweep.dir)
        runs = load_runs(folder)
        console = Console()
        if not console.is_terminal:
            console = Console(width=160, highlight=False)
        console.print()
        console.print(sweep_table(runs, str(folder)))
        for line in reasons(runs):
            console.print(line, highlight=False)
        console.print(f"{write_summary(runs, folder)} holds the table; fp4lab compare {folder} prints it again.")
