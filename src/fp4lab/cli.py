"""`fp4lab`: look at runs and checkpoints. What runs them is run.py."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp4lab.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from fp4lab.checkpoint.export import Target
    from fp4lab.checkpoint.quantise import Recipe

PROGRESS_S = 10.0  # between lines about progress where standard error is no terminal

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="a sweep's folder, or one run's")],
    sort: Annotated[list[str] | None, typer.Option(help="column to sort by; -NAME from the largest; again for ties")] = None,
    filter_: Annotated[list[str] | None, typer.Option("--filter", help="e.g. status=completed, peak_mib<300; all hold")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="print comma-separated values, every column")] = False,
    json: Annotated[bool, typer.Option("--json", help="print JSON, every column")] = False,
    against: Annotated[Path | None, typer.Option(help="an earlier sweep: print what differs from it")] = None,
    tolerance: Annotated[list[str] | None, typer.Option(help="with --against: RESULT=RELATIVE or RESULT=off")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="also write memory by phase and losses to this .png")] = None,
    golden: Annotated[Path | None, typer.Option("--golden", help="hold a task=compare run against this file")] = None,
    save: Annotated[bool, typer.Option("--save", help="write the --golden file instead")] = False,
) -> None:
    """Runs side by side: status, loss, first token, memory, time. --golden and --against: exit code 1 on a difference."""
    if golden is not None:
        raise typer.Exit(_golden(folder, golden, save))
    if save:
        raise UserError("--save writes the file that --golden names; give --golden FILE")
    if tolerance and against is None:
        raise UserError("--tolerance is of --against; give --against SWEEP")
    from fp4lab.analysis.frames import load_runs
    from fp4lab.analysis.paths import print_paths
    from fp4lab.analysis.select import filtered, ordered
    from fp4lab.analysis.table import print_runs

    runs = ordered(filtered(load_runs(folder).runs, filter_ or []), sort or [])
    if against is not None:
        raise typer.Exit(_against(runs, filtered(load_runs(against).runs, filter_ or []), tolerance or [], json))
    if csv:
        runs.to_csv(sys.stdout, index=False)
    elif json:
        runs.to_json(sys.stdout, orient="records", indent=1, force_ascii=False, double_precision=15)
        typer.echo()
    else:
        print_runs(runs)
        print_paths(folder)
    if plot is not None:
        from fp4lab.analysis.plots import save_figure

        typer.echo(f"wrote {save_figure(folder, plot)}", err=True)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="a sweep's folder, or one run's; with --devlog any number")],
    png: Annotated[bool, typer.Option("--png", help="also write every figure as PNG, into its folder plots/")] = False,
    devlog: Annotated[bool, typer.Option("--devlog", help="the reference log's rows beside these runs")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="with --devlog: write .md, .html or .json instead of printing")
    ] = None,
) -> None:
    """A sweep as one HTML file, report.html in its folder. With --devlog: runs of +experiment=devlog_* beside the log."""
    if devlog:
        from fp4lab.analysis.devlog_report import report as write_devlog

        write_devlog(folders, out)
        return
    if len(folders) != 1 or out is not None:
        raise UserError("report takes one folder; several, and --out, go with --devlog")
    from fp4lab.analysis.report import write_report

    typer.echo(f"wrote {write_report(folders[0], png)}")


@app.command()
def sync(folder: Annotated[Path, typer.Argument(help="a sweep's folder, or one run's")]) -> None:
    """Event files into offline wandb runs: those tracked off, or killed before wandb had their data. Again changes nothing."""
    from fp4lab.analysis.sync import sync

    for run, done in sync(folder):
        typer.echo(f"{run} {done}")
    typer.echo("to look at them: wandb leet; to send them: wandb sync (doc/wandb.md)")


def _against(now: "pd.DataFrame", was: "pd.DataFrame", given: list[str], as_json: bool) -> int:
    from dataclasses import asdict

    from fp4lab.analysis.against import compare_sweeps, shared_differences, tolerances
    from fp4lab.analysis.table import print_against
    from fp4lab.encoding import encode

    allowed, fixed = tolerances(given, now), shared_differences(now, was)
    count, found = compare_sweeps(now, was, allowed)
    if as_json:
        differences = [{**asdict(d), "change": d.change} for d in found]
        typer.echo(encode({"compared": count, "fixed": fixed, "differences": differences}))
    else:
        print_against(count, found, fixed, allowed)
    return 1 if found or not count else 0


def _golden(folder: Path, path: Path, save: bool) -> int:
    from fp4lab.analysis import golden
    from fp4lab.analysis.paths import print_differences

    if save:
        golden.save(folder, path)
        typer.echo(f"wrote {path}")
        return 0
    found = golden.differences(folder, path)
    print_differences(found)
    return 1 if found else 0


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="a run's folder (or a sweep's), or a checkpoint")],
    verify: Annotated[bool, typer.Option("--verify", help="hold a checkpoint's files against its manifest instead")] = False,
) -> None:
    """A run: its phases, losses and reasons. A checkpoint (.dat, or a Hugging Face folder): its entries."""
    if verify:
        _verify(path)
    elif path.is_file() or any(path.glob("*.safetensors")):
        _inspect_weights(path)
    elif path.is_dir():
        _inspect_runs(path)
    else:
        raise UserError(f"{path}: no such file or folder; expected a run's folder or a checkpoint (.dat, or a folder)")


def _verify(path: Path) -> None:
    from fp4lab.checkpoint.export import manifest_of, verify

    manifest = manifest_of(path)
    wrong = verify(manifest)
    for text in wrong:
        typer.echo(text)
    typer.echo(f"{manifest}: {f'{len(wrong)} files differ' if wrong else 'every file is as it was written'}")
    raise typer.Exit(1 if wrong else 0)


def _inspect_runs(folder: Path) -> None:
    from fp4lab.analysis.records import read_events, read_result, run_folders
    from fp4lab.analysis.rows import RunRow
    from fp4lab.tracking.console import ConsoleTracker

    for run in run_folders(folder):
        records = read_events(run)
        refused = {} if records else read_result(run)
        overrides = refused.get("overrides") or (records[0].get("overrides") if records else None) or []
        console, summed = ConsoleTracker("  ".join([str(run), *overrides])), RunRow()
        for record in records:
            console.record(record)
            summed.add(record)
        if not any(r["kind"] == "end" for r in records):  # refused before it began, or killed with its supervisor
            end = refused or summed.row()
            console.record({"kind": "end", **{k: end[k] for k in ("status", "reason")}, "seconds": end["seconds"] or 0.0})


def _inspect_weights(path: Path) -> None:
    from fp4lab.checkpoint.entries import entries

    found = list(entries(path))
    typer.echo(f"{'#':>5}  {'type':<18} {'shape':<18} {'bytes':>13}  {'scale bytes':<11}  key")
    for e in found:
        scale = f"{e.scale_min:#04x}-{e.scale_max:#04x}" if e.scale_min is not None else ""
        typer.echo(f"{e.number:>5}  {e.type:<18} {list(e.shape)!s:<18} {e.nbytes:>13,}  {scale:<11}  {e.key}")
        if e.refused:
            typer.echo(f"{'':>5}  refused: {e.refused}")
    pairs, refused = sum(e.pair is not None for e in found) // 2, sum(e.refused is not None for e in found)
    typer.echo(f"{len(found)} entries, {pairs} pairs, {sum(e.nbytes for e in found):,} bytes of tensors; {refused} refused")
    raise typer.Exit(1 if refused else 0)


@app.command(context_settings={"allow_interspersed_args": False})
def guard(
    command: Annotated[list[str], typer.Argument(help="after --, the command and its arguments")],
    limit_gb: Annotated[float | None, typer.Option(help="memory of its process tree, GB of 1024 MiB")] = None,
    over_s: Annotated[float, typer.Option(help="how long it may be over the limit; 0 = not at all")] = 0.0,
    poll_s: Annotated[float, typer.Option(help="seconds between two looks near the limit, from 0.005")] = 0.5,
    host_available_min_gb: Annotated[float | None, typer.Option(help="end it when the machine has less available")] = None,
    wall_s: Annotated[float | None, typer.Option(help="longest run time")] = None,
    term_grace_s: Annotated[float, typer.Option(help="seconds between SIGTERM and SIGKILL")] = 5.0,
    blind: Annotated[str, typer.Option(help="memory cannot be read for 15 s: warn or refuse")] = "warn",
    out: Annotated[Path | None, typer.Option(help="folder of the records; default outputs/guard_<time>")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing of the guard's own")] = False,
) -> None:
    """Any command under the guard: fp4lab guard --limit-gb 108 -- python train.py"""
    from fp4lab.choices import check_guard
    from fp4lab.supervise.command import guard_command

    limits = {
        "name": "command",
        "limit_gb": limit_gb,
        "over_s": over_s,
        "poll_s": poll_s,
        "sample_s": 1.0,
        "host_available_min_gb": host_available_min_gb,
        "wall_s": wall_s,
        "phase_wall_s": None,
        "term_grace_s": term_grace_s,
        "blind": blind,
    }
    check_guard(limits, option=lambda key: "--" + key.removeprefix("guard.").replace("_", "-"))
    out = out or Path("outputs") / (time.strftime("guard_%Y-%m-%d_%H-%M-%S_") + str(os.getpid()))
    raise typer.Exit(guard_command(command, limits, out, quiet))


@app.command()
def chat(
    overrides: Annotated[list[str] | None, typer.Argument(help="as for run.py, e.g. kvc=persistent backend=bridge")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the records; default outputs/chat_<time>")] = None,
) -> None:
    """Talk to a model: a line is a turn, /reset forgets, the end of input ends. With a limit: fp4lab guard -- fp4lab chat"""
    from fp4lab.interactive import compose, talk

    out = out or Path("outputs") / (time.strftime("chat_%Y-%m-%d_%H-%M-%S_") + str(os.getpid()))
    raise typer.Exit(talk(compose(["task=chat", "kvc=persistent", *(overrides or [])], Path("conf")), out))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="a .dat file, or a Hugging Face folder (bf16, compressed-tensors, ModelOpt)")],
    out: Annotated[Path, typer.Argument(help="the folder, or with --to dat the file, to write")],
    to: Annotated[str, typer.Option(help="compressed-tensors, modelopt, dat or hf (floats)")],
    rule: Annotated[
        str | None, typer.Option(help="ct, torchao, native, nearest or four_over_six; default: the format's")
    ] = None,
    levels: Annotated[str | None, typer.Option(help="second-level scale: single (none), tensor, row (dat alone)")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="modules to leave unquantised, e.g. '*.layers.0.*'; again for more")
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="lm_head: keep (also tied), nvfp4, float; default nvfp4 for dat, else keep")
    ] = None,
    dtype: Annotated[str, typer.Option(help="of floats: auto, keep, bfloat16, float16, float32")] = "auto",
    scales: Annotated[
        str, typer.Option(help="block scales of a .dat file: e4m3, or float16 as the first exporter wrote")
    ] = "e4m3",
    config: Annotated[
        Path | None, typer.Option(help="folder with config.json and tokenizer; default: the source's own")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is at OUT")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Quantise a checkpoint, or change its format, a tensor at a time. What is packed already is never quantised again."""
    from fp4lab.checkpoint.convert import recipe_for
    from fp4lab.checkpoint.export import Target

    target = Target(out, to, dtype, scales, config, overwrite)
    recipe = None
    if to != "hf":
        recipe = recipe_for(to, rule, levels, tuple(ignore or ()), head)
    elif rule or levels or ignore or head:
        raise UserError("--to hf writes floats: --rule, --levels, --ignore and --head have no effect; leave them out")
    asked = [f"--{key} {value}" for key, value in (("rule", rule), ("levels", levels)) if value]
    _convert(source, target, recipe, quiet, asked)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="a .dat file, or a folder in one of the public formats")],
    out: Annotated[Path, typer.Argument(help="the folder, or with --to dat the file, to write")],
    to: Annotated[str, typer.Option(help="compressed-tensors, modelopt, hf (bf16) or dat")],
    dtype: Annotated[str, typer.Option(help="of floats: auto, keep, bfloat16, float16, float32")] = "auto",
    config: Annotated[
        Path | None, typer.Option(help="folder with config.json and tokenizer; default: the source's own")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is at OUT")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """A packed checkpoint for other engines. Codes and block scales are relabelled; nothing is quantised."""
    from fp4lab.checkpoint.export import Target

    _convert(source, Target(out, to, dtype, config=config, overwrite=overwrite), None, quiet)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="a folder in compressed-tensors or ModelOpt format")],
    out: Annotated[Path, typer.Argument(help="the .dat file to write")],
    dtype: Annotated[str, typer.Option(help="of floats: auto (float16), keep, bfloat16, float32")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is at OUT")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """A packed checkpoint of other tools as a .dat file. Codes and block scales are relabelled; nothing is quantised."""
    from fp4lab.checkpoint.export import Target

    _convert(source, Target(out, "dat", dtype, overwrite=overwrite), None, quiet)


def _convert(source: Path, target: "Target", recipe: "Recipe | None", quiet: bool, asked: Sequence[str] = ()) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from fp4lab.analysis.errors import print_errors
    from fp4lab.checkpoint.convert import convert as run
    from fp4lab.checkpoint.convert import return_freed_memory

    console = Console(stderr=True, highlight=False)
    return_freed_memory()
    said = time.monotonic()
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        row = bar.add_task("", total=None)

        def progress(n: int, total: int, name: str) -> None:
            nonlocal said
            bar.update(row, completed=n, total=total, description=name)
            if not quiet and not console.is_terminal and time.monotonic() - said >= PROGRESS_S:
                said = time.monotonic()
                typer.echo(f"{n / total:4.0%} of {total / 2**20:,.0f} MiB: {name}", err=True)

        done = run(source, target, recipe, progress, asked)
    print_errors(done.errors)
    for info in done.files:
        typer.echo(f"{info.sha256[:12]}  {info.bytes:>13,}  {info.path}")
    for note in done.notes:
        typer.echo(f"note: {note}", err=True)


@app.command()
def doctor(
    end_stale: Annotated[bool, typer.Option("--end-stale", help="kill what dead supervisors left running")] = False,
) -> None:
    """What would make a run fail here: devices, other processes, memory, disk, versions. Exit code 1 if something would."""
    from dataclasses import asdict

    from rich.console import Console

    from fp4lab.config import GuardConfig
    from fp4lab.supervise import doctor as checks

    if end_stale:
        ended = checks.end_stale()
        typer.echo(f"ended: {', '.join(map(str, ended))}" if ended else "nothing to end")
    console = Console(highlight=False, soft_wrap=True)
    worst = 0
    for f in checks.examine(asdict(GuardConfig()), Path("outputs")):
        style = {"ok": "green", "warn": "yellow", "fail": "red"}[f.level]
        console.print(f"[{style}]{f.level:<5}[/]{f.topic:<10}", end="")
        console.print(f.text, markup=False)
        worst = max(worst, f.level == "fail")
    raise typer.Exit(worst)


def main() -> None:
    """The console script: a UserError becomes its message on standard error and exit status 2."""
    try:
        app()
    except UserError as e:
        typer.echo(f"fp4lab: {e}", err=True)
        raise SystemExit(2) from None
