"""`fp4lab`: look at runs and checkpoints. What runs them is run.py."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fp4lab.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="a sweep's folder, or one run's")],
    csv: Annotated[bool, typer.Option("--csv", help="print comma-separated values, every column")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="also write memory by phase and losses to this .png")] = None,
) -> None:
    """Runs side by side: status, loss, first-token agreement, memory, time."""
    from fp4lab.analysis.frames import load_runs
    from fp4lab.analysis.table import print_runs

    runs = load_runs(folder)
    if csv:
        runs.to_csv(sys.stdout, index=False)
    else:
        print_runs(runs)
    if plot is not None:
        from fp4lab.analysis.plots import save_figure

        typer.echo(f"wrote {save_figure(folder, plot)}", err=True)


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="a run's folder (or a sweep's), or a .dat checkpoint")]) -> None:
    """A run: its phases, losses and reasons. A .dat checkpoint: its entries."""
    if path.is_dir():
        _inspect_runs(path)
    elif path.is_file():
        _inspect_dat(path)
    else:
        raise UserError(f"{path}: no such file or folder; expected a run's folder or a .dat checkpoint")


def _inspect_runs(folder: Path) -> None:
    from fp4lab.analysis.frames import read_events, read_result, run_folders
    from fp4lab.tracking.console import ConsoleTracker

    for run in run_folders(folder):
        result, records = read_result(run), read_events(run)
        console = ConsoleTracker("  ".join([str(run), *result.get("overrides", [])]))
        for record in records:
            console.record(record)
        if not any(r["kind"] == "end" for r in records):  # refused before it began, or killed with its supervisor
            end = {"status": result["status"], "reason": result["reason"], "seconds": result["seconds"] or 0.0}
            console.record({"kind": "end", **end})


def _inspect_dat(path: Path) -> None:
    from fp4lab.checkpoint.dat import DatFile

    with DatFile.open(path) as file:
        entries = list(file.entries.values())
    typer.echo(f"{'#':>5}  {'type':<18} {'dims':<18} {'bytes':>13}  key")
    for e in entries:
        kind = f"{e.elem_type} {str(e.dtype).removeprefix('torch.')}" if e.elem_type != 100 else "100 fp4 pairs"
        typer.echo(f"{e.number:>5}  {kind:<18} {list(e.dims)!s:<18} {e.nbytes:>13,}  {e.key}")
    typer.echo(f"{len(entries)} entries, {sum(e.nbytes for e in entries):,} bytes of tensors")


def main() -> None:
    """The console script: a UserError becomes its message on standard error and exit status 2."""
    try:
        app()
    except UserError as e:
        typer.echo(f"fp4lab: {e}", err=True)
        raise SystemExit(2) from None
