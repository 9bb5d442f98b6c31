"""Hydra's hook at the end of a sweep: the table on the terminal and summary.csv in the sweep's folder."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fp4lab.errors import UserError


class SweepTable(Callback):
    """Named in conf/config.yaml. Also right for a sweep that was interrupted half way: it reads folders, not memory."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if config.dry_run:
            return
        from fp4lab.analysis.frames import load_runs
        from fp4lab.analysis.table import print_runs, terminal, write_summary

        folder = Path(config.hydra.sweep.dir)
        console = terminal()
        console.print()
        try:
            runs = load_runs(folder).runs
        except UserError as e:
            console.print(str(e), markup=False)
            return
        print_runs(runs, console)
        said = f"\n{write_summary(runs, folder)} holds this table; `fp4lab compare {folder}` prints it again, "
        said += "`fp4lab report` with the same folder makes report.html of it."
        console.print(said, markup=False, soft_wrap=True)
