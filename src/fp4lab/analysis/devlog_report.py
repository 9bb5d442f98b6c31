"""The reference log beside this machine, to be read: a table in the terminal, Markdown, or one self-contained HTML file."""

import html
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4lab.analysis import devlog
from fp4lab.analysis.devlog import Comparison, Finding
from fp4lab.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

# A mark beside each word, so that nothing hangs on colour alone.
MARKS = dict(zip(devlog.VERDICTS, "=+-!/> ", strict=True))
_COLOURS = {"reproduced": "cyan", "better": "green", "worse": "red", "different": "red"}
SUFFIXES = (".md", ".html", ".json")


def report(folders: Sequence[Path], out: Path | None = None) -> None:
    """Prints the table for the runs below `folders`, or writes `out` (.md, .html or .json). Raises UserError."""
    if out is not None and out.suffix not in SUFFIXES:
        raise UserError(f"{out}: expected a name that ends with {', '.join(SUFFIXES)}")
    runs, comparisons, rows = devlog.load(folders), devlog.catalogue(), devlog.log_rows()
    found, line = devlog.findings(runs, comparisons, rows), devlog.machine(runs)
    if out is None:
        print_table(found, rows, line)
        return
    make = {".md": markdown, ".html": page}
    text = devlog.as_json(found) if out.suffix == ".json" else make[out.suffix](found, comparisons, rows, line)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {out}: {summary(found)}")


def summary(found: Sequence[Finding]) -> str:
    """ "12 reproduced, 9 better, ..." in the order of devlog.VERDICTS."""
    counts = Counter(f.verdict for f in found)
    return ", ".join(f"{counts[v]} {v}" for v in devlog.VERDICTS if counts[v])


def print_table(found: Sequence[Finding], rows: "pd.DataFrame", line: str) -> None:
    """The log's rows and this machine's, for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    from fp4lab.analysis.table import terminal

    console = terminal()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("row", no_wrap=True)
    table.add_column("the log", ratio=5)
    table.add_column("verdict", no_wrap=True)
    table.add_column("here", ratio=5)
    for f in found:
        style = _COLOURS.get(f.verdict, "dim")
        verdict = f"[{style}]{MARKS[f.verdict]} {f.verdict.removesuffix(' here')}[/]"
        here = ": ".join(t for t in (f.here, f.why) if t)
        table.add_row(f.id, escape(_log_said(rows.loc[f.id])), verdict, escape(here))
    console.print(table)
    console.print(f"\n{line}\n{summary(found)}", markup=False)


def _log_said(row: Any) -> str:
    observed = "" if row["observed"] != row["observed"] else f": {row['observed']}"
    return f"{row['configuration']}{observed} ({row['outcome']})"


def _sections(found: Sequence[Finding], comparisons: Sequence[Comparison]) -> Iterator[tuple[Comparison, list[Finding]]]:
    """Comparisons that have a command first, in the order of the log's rows they answer."""
    order = {f.id: i for i, f in enumerate(found)}
    mine = {c.name: [f for f in found if f.comparison == c.name] for c in comparisons}
    shown = [c for c in comparisons if mine[c.name]]
    for c in sorted(shown, key=lambda c: (not c.command, order[mine[c.name][0].id])):
        yield c, mine[c.name]


def markdown(found: Sequence[Finding], comparisons: Sequence[Comparison], rows: "pd.DataFrame", line: str) -> str:
    """A page for a code host."""
    parts = ["# The log and this machine", "", f"{line}. {summary(found)}.", ""]
    for c, mine in _sections(found, comparisons):
        parts += [f"## {c.question}", ""]
        if c.command:
            parts += [f"    {c.command}", ""]
        parts += [f"- expected: {text}" for text in c.expected]
        parts += [f"- may differ: {text}" for text in c.differs]
        parts += ["", "| row | the log | verdict | here |", "|---|---|---|---|"]
        for f in mine:
            here = ": ".join(t for t in (f.here, f.why) if t)
            parts.append(f"| {f.id} | {_cell(_log_said(rows.loc[f.id]))} | {f.verdict} | {_cell(here)} |")
        parts.append("")
    return "\n".join(parts).rstrip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #59636e; --line: #d5dae0;
  --reproduced: #0a5f8a; --better: #11603a; --worse: #a33b00; --different: #a33b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ec; --paper: #15181c; --faint: #9aa4af; --line: #343a41;
  --reproduced: #7cc4ec; --better: #7fd3a4; --worse: #ff9d63; --different: #ff9d63; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 78rem;
  margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .3rem }
p.machine, details, td.log { color: var(--faint) } code { font-size: .9em }
table { border-collapse: collapse; width: 100%; margin-top: .6rem } td, th { text-align: left; vertical-align: top;
  padding: .35rem .8rem .35rem 0; border-top: 1px solid var(--line) } th { border: 0; color: var(--faint); font-weight: 600 }
td.id { white-space: nowrap; font-weight: 600; width: 3rem } td.log { width: 40% } td.verdict { width: 9rem; font-weight: 600 }
.reproduced { color: var(--reproduced) } .better { color: var(--better) } .worse, .different { color: var(--worse) }
ul.counts { list-style: none; display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; padding: 0; margin: .8rem 0 }
ul.counts b { font-size: 1.5rem; margin-right: .35rem }
@media print { body { max-width: none; margin: 0 } h2, tr { break-inside: avoid } details { display: none } }
"""


def page(found: Sequence[Finding], comparisons: Sequence[Comparison], rows: "pd.DataFrame", line: str) -> str:
    """One HTML file that needs nothing else; light and dark."""
    e, counts = html.escape, Counter(f.verdict for f in found)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>The log and this machine</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>',
        f'<h1>The log and this machine</h1><p class="machine">{e(line)}</p><ul class="counts">',
        *(f'<li class="{_css(v)}"><b>{counts[v]}</b>{e(v)}</li>' for v in devlog.VERDICTS if counts[v]),
        "</ul>",
    ]
    for c, mine in _sections(found, comparisons):
        parts.append(f"<h2>{e(c.question)}</h2>")
        if c.command:
            notes = [f"<li>Expected: {e(t)}</li>" for t in c.expected] + [f"<li>May differ: {e(t)}</li>" for t in c.differs]
            parts.append(f"<details><summary><code>{e(c.command)}</code></summary><ul>{''.join(notes)}</ul></details>")
        parts.append("<table><tr><th>row</th><th>the log</th><th>verdict</th><th>here</th></tr>")
        for f in mine:
            here = "<br>".join(t for t in (e(f.here), f"<em>{e(f.why)}</em>" if f.why else "") if t)
            log, mark = e(_log_said(rows.loc[f.id])), f"{MARKS[f.verdict]} {f.verdict}"
            parts.append(
                f'<tr><td class="id">{e(f.id)}</td><td class="log">{log}</td>'
                f'<td class="verdict {_css(f.verdict)}">{e(mark)}</td><td>{here}</td></tr>'
            )
        parts.append("</table>")
    return "".join([*parts, "</body></html>"])


def _css(verdict: str) -> str:
    return verdict.replace(" ", "-")
