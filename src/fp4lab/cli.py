"""`fp4lab`: look at runs and files. Running them is run.py's."""

from pathlib import Path
from typing import Annotated

import typer

from fp4lab.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="a sweep's folder, or one run's")],
    csv: Annotated[bool, typer.Option("--csv", help="print comma-separated values")] = False,
) -> None:
    """Runs side by side: status, loss, first-token agreement, memory, time."""
    import sys

    from rich.console import Console

    from fp4lab.analysis.frames import load_runs
    from fp4lab.analysis.table import reasons, sweep_table

    runs = load_runs(folder)
    if csv:
        runs.to_csv(sys.stdout, index=False)
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=160, highlight=False)
    console.print(sweep_table(runs))
    for line in reasons(runs):
        console.print(line, highlight=False)


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="a .dat checkpoint, or a run's folder")]) -> None:
    """The entries of a checkpoint, or the records of a run in the console's form."""
    if path.is_dir():
        from fp4lab.analysis.frames import read_events, run_folders
        from fp4lab.tracking.console import ConsoleTracker

        for run in run_folders(path):
            console = ConsoleTracker(str(run))
            for record in read_events(run):
                console.record(record)
        return
    from fp4lab.checkpoint.dat import DatFile

    with DatFile.open(path) as file:
        for e in file.entries.values():
            typer.echo(f"{e.number:5d}  type {e.elem_type:<4d} {list(e.dims)!s:<18} {e.nbytes:>12d} bytes  {e.key}")


def main() -> None:
    try:
        app()
    except UserError as e:
        typer.echo(f"fp4lab: {e}", err=True)
        raise SystemExit(2) from None
