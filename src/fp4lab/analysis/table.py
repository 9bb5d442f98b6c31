"""Runs side by side: the table at the end of a sweep, and summary.csv."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4lab.analysis.against import EXACT, Difference
from fp4lab.analysis.rows import RESULTS
from fp4lab.analysis.select import missing

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

SUMMARY = "summary.csv"
PIPE_WIDTH = 120  # columns, where there is no terminal to ask
_SPARE = (
    "long names",
    "first loss",
    "codes\nmoved",
    "slowest phase",
    "trained",
)  # left out of narrow tables, first to go first
_ALWAYS = ("status", "loss", "peak\nMiB", "s")  # of other columns only those that some run has a value for
_BEST, _WORST = "*", "!"  # after the lowest and the highest of a column where less is better
_RANKED = ("loss", "worst\nKL", "1st token\nms", "a token\nms", "peak\nMiB", "s")
_WELL = ("completed", "stopped")
_COLOURS = {"completed": "green", "stopped": "green", "unfinished": "yellow", "interrupted": "yellow"}


def options(runs: "pd.DataFrame") -> tuple[list[str], dict[str, str]]:
    """The options that differ between runs (column names), and those that all runs share with one value."""
    given = [c for c in runs.columns if c not in RESULTS]
    swept = [c for c in given if runs[c].nunique(dropna=False) > 1]
    return swept, {c: str(runs[c].iloc[0]) for c in given if c not in swept}


def sweep_table(runs: "pd.DataFrame", width: int = PIPE_WIDTH) -> "Table":
    """What was swept, then status, loss, first-token agreement, peak memory, slowest phase, time; for `width` columns.

    `runs` is that of load_runs. Options that all runs share are in the caption. What does not fit is left out, in the order of
    _SPARE; summary.csv has it still. Of runs that ended well the best and the worst are marked.
    """
    from rich.console import Console
    from rich.measure import Measurement

    endless = Console(width=10_000)
    for count in range(len(_SPARE) + 1):
        table = _table(runs, frozenset(_SPARE[:count]))
        if Measurement.get(endless, endless.options, table).maximum <= width:
            break
    return table


def _table(runs: "pd.DataFrame", without: frozenset[str]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    swept, shared = options(runs)
    rows = runs.to_dict("records")
    kept = [c for c in _columns("first loss" not in without) if c[0] not in without]
    kept = [c for c in kept if c[0] in _ALWAYS or any(c[2](row) for row in rows)]
    marks = {header: _marks(header, rows) for header, _, _ in kept}
    caption = ["all runs: " + " ".join(f"{k}={v}" for k, v in shared.items())] if shared else []
    caption += [f"{_BEST} best, {_WORST} worst of the column"] if any(marks.values()) else []
    table = Table(
        box=None, pad_edge=False, header_style="bold", caption=escape("\n".join(caption)) or None, caption_justify="left"
    )
    table.add_column("run", justify="right", no_wrap=True)
    for name in swept:
        header = _short(name, swept) if "long names" in without else name
        table.add_column(escape(header), justify="right", overflow="fold")
    for header, justify, _ in kept:
        table.add_column(header, justify=justify, no_wrap=True)
    for at, row in enumerate(rows):
        given = ("" if missing(row[c]) else escape(str(row[c])) for c in swept)
        cells = (_marked(cell(row), marks[header].get(at), bool(marks[header])) for header, _, cell in kept)
        table.add_row(str(row["run"]), *given, *cells)
    return table


def _marks(header: str, rows: list[dict[str, Any]]) -> dict[int, str]:
    """Row number: mark. Values that look the same in the table are the same."""
    if header not in _RANKED:
        return {}
    cell = next(c[2] for c in _columns(False) if c[0] == header)
    value = {"loss": "loss", "worst\nKL": "worst_kl", "1st token\nms": "first_token_ms", "a token\nms": "ms_per_token"}
    name = value.get(header, "peak_mib" if header == "peak\nMiB" else "seconds")
    known = {at: row for at, row in enumerate(rows) if row["status"] in _WELL and not missing(row[name])}
    if len(known) < 2:
        return {}
    low, high = (cell(pick(known.values(), key=lambda r: r[name])) for pick in (min, max))
    if low == high:
        return {}
    return {at: mark for at, row in known.items() if (mark := {low: _BEST, high: _WORST}.get(cell(row)))}


def _marked(text: str, mark: str | None, ranked: bool) -> str:
    if mark is None:
        return text + " " if ranked and text else text
    return f"[{'bold' if mark == _BEST else 'dim'}]{text}[/]{mark}"


def _columns(first_loss: bool) -> list[tuple[str, Any, Callable[[dict[str, Any]], str]]]:
    """Header, justification, and a cell of a row."""
    return [
        ("status", "left", lambda r: f"[{_COLOURS.get(r['status'], 'red')}]{r['status']}[/]"),
        ("loss", "right", lambda r: _loss(r, first_loss)),
        ("trained", "left", lambda r: "" if missing(r["trained"]) else "yes" if r["trained"] else "no"),
        ("first\ntoken", "left", _agreement),
        ("worst\nKL", "right", _kl),
        ("codes\nmoved", "right", lambda r: _shown(r["codes_changed"], ".1%")),
        ("goals", "right", _goals),
        ("controls\nkept", "right", lambda r: _shown(r["controls_kept"], ".0%")),
        ("context\ntokens", "right", lambda r: _shown(r["context_tokens"], ".0f")),
        ("1st token\nms", "right", lambda r: _shown(r["first_token_ms"], ".1f")),
        ("a token\nms", "right", lambda r: _shown(r["ms_per_token"], ".1f")),
        ("peak\nMiB", "right", lambda r: _shown(r["peak_mib"], ".0f")),
        ("slowest phase", "left", _phase),
        ("s", "right", lambda r: _shown(r["seconds"], ".1f")),
    ]


def html_rows(runs: "pd.DataFrame") -> tuple[list[str], list[list[str | tuple[str, str]]], frozenset[int]]:
    """The same table for a page: header, rows of cells (text, or text and a CSS class), columns that are numbers."""
    from rich.text import Text

    swept, _ = options(runs)
    rows = runs.to_dict("records")
    kept = [c for c in _columns(True) if c[0] in _ALWAYS or any(c[2](row) for row in rows)]
    marks = {header: _marks(header, rows) for header, _, _ in kept}
    names = {_BEST: " best", _WORST: " worst"}
    said: list[list[str | tuple[str, str]]] = []
    for at, row in enumerate(rows):
        cells: list[str | tuple[str, str]] = [str(row["run"]), *("" if missing(row[c]) else str(row[c]) for c in swept)]
        for name, _, cell in kept:
            mark, text = marks[name].get(at, ""), Text.from_markup(cell(row)).plain
            css = "good" if mark == _BEST else "ended" if name == "status" and row["status"] not in _WELL else ""
            cells.append((text + names.get(mark, ""), css))
        said.append([*cells, row["last_phase"] or ""])
    header = ["run", *swept, *(c[0].replace("\n", " ") for c in kept), "last phase"]
    ranked = {1 + len(swept) + i for i, c in enumerate(kept) if c[1] == "right"}
    return header, said, frozenset({0, *range(1, 1 + len(swept)), *ranked})


def print_runs(runs: "pd.DataFrame", console: "Console | None" = None) -> None:
    """The table, then a line for each run that has a reason to give."""
    console = console or terminal()
    console.print(sweep_table(runs, console.width))
    for line in reasons(runs):
        console.print(line, style="red" if console.is_terminal else None, highlight=False, markup=False, soft_wrap=True)


def terminal() -> "Console":
    """Standard output: as wide as the terminal is; without one, PIPE_WIDTH (or COLUMNS) wide and without colour."""
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal:
        return console
    asked = os.environ.get("COLUMNS", "")
    return Console(width=int(asked) if asked.isdigit() and int(asked) else PIPE_WIDTH, highlight=False, color_system=None)


def write_summary(runs: "pd.DataFrame", folder: Path) -> Path:
    """`folder`/summary.csv: every column of load_runs(...).runs at full precision. Returns its path."""
    path = Path(folder) / SUMMARY
    runs.to_csv(path, index=False)
    return path


def reasons(runs: "pd.DataFrame") -> list[str]:
    """One line for each run that has something to explain: "run 3: oom after model_loaded: ..."."""
    return [
        f"run {r['run']}: {r['status']}{_after(r)}: {_first_line(r['reason'])}" for r in runs.to_dict("records") if r["reason"]
    ]


def _after(row: dict[str, Any]) -> str:
    told = missing(row["last_phase"]) or row["status"] in _WELL or row["last_phase"] in row["reason"]
    return "" if told else f" after {row['last_phase']}"


def _short(name: str, names: list[str]) -> str:
    """`step.chunk_rows` as `chunk_rows`, where no other name ends the same; long names on two lines."""
    last = name.rpartition(".")[2]
    name = last if [n.rpartition(".")[2] for n in names].count(last) == 1 else name
    return name if len(name) < 9 else name.replace("_", "_\n").replace(".", ".\n")


def _loss(row: dict[str, Any], with_first: bool) -> str:
    first, last = _shown(row["first_loss"], ".4f"), _shown(row["loss"], ".4f")
    return f"{first}→{last}" if with_first and first and row["first_loss"] != row["loss"] else last


def _agreement(row: dict[str, Any]) -> str:
    return row["first_token"] + (" [bold red]FAULT[/]" if not missing(row["faults"]) and row["faults"] else "")


def _kl(row: dict[str, Any]) -> str:
    if row["worst_kl"] is None or row["worst_pair"] is None or missing(row["worst_pair"]):
        return ""
    return "0" if row["worst_kl"] == 0 else f"{row['worst_kl']:.0e} {row['worst_pair']}"


def _goals(row: dict[str, Any]) -> str:
    return "" if missing(row["goals"]) else f"{row['goals_met']:.0f}/{row['goals']:.0f}"


def _phase(row: dict[str, Any]) -> str:
    if missing(row["slowest_phase"]):
        return ""
    ms, name = row["slowest_ms"], row["slowest_phase"].removesuffix("_done")
    return f"{name} {ms / 1000:.1f} s" if ms >= 1000 else f"{name} {ms:.0f} ms"


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0]


def _shown(x: Any, spec: str) -> str:
    return "" if missing(x) else format(x, spec)


def print_against(count: int, found: list[Difference], fixed: dict[str, tuple[str, str]], tolerance: dict[str, float]) -> None:
    """What compare_sweeps found, and what the sweeps differ in as a whole (`fixed`: option -> (was, now))."""
    from rich.markup import escape
    from rich.table import Table

    console = terminal()
    for name, (was, now) in fixed.items():
        console.print(f"{name}: {was or 'not given'} → {now or 'not given'}", markup=False)
    allowed = ", ".join([*EXACT, *(f"{k} within {v:.3g}" for k, v in tolerance.items())])
    if found:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for header, justify in (("run", "right"), ("options", "left"), ("what", "left"), ("was", "right"), ("now", "right")):
            table.add_column(header, justify=justify, overflow="fold")  # type: ignore[arg-type]
        table.add_column("change", justify="right")
        for d in found:
            change = "" if d.change is None else f"{d.change:+.2%}"
            table.add_row(d.run, escape(d.options), d.what, _value(d.was), _value(d.now), change)
        console.print(table)
    console.print(f"{count} runs compared ({allowed}); differences: {len(found)}", markup=False, soft_wrap=True)


def _value(x: Any) -> str:
    return "unknown" if missing(x) else f"{x:.6g}" if isinstance(x, float) else str(x)
