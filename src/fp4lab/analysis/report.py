"""`fp4lab report`: a sweep as one HTML file that needs nothing else, and its figures as PNG."""

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4lab.analysis import html
from fp4lab.analysis.frames import Frames, load_runs
from fp4lab.analysis.plots import FIGURES
from fp4lab.analysis.plots.style import WELL, label
from fp4lab.analysis.plots.tokens import cell_text, top_tokens
from fp4lab.analysis.select import missing
from fp4lab.analysis.table import html_rows, options, reasons

if TYPE_CHECKING:
    import pandas as pd

REPORT, PICTURES = "report.html", "plots"
_OPEN = 12  # of so many runs the details of first tokens are shown at once
_TITLES = {  # figure: title of its section, what it shows in a sentence for those who cannot see it
    "memory_heatmap": ("Peak memory", "Heatmap of peak memory over the swept options; the runs' table has the numbers"),
    "memory_over_time": ("Memory over time", "Memory of each run over time, by phase, with the guard's limit"),
    "loss_curves": ("Loss", "Loss of each run; the runs' table has the numbers"),
    "layer_divergence": ("Where paths part", "Relative error of hidden states of two paths, by layer"),
    "state_health": ("State health", "What the steps did to packed weights and optimizer state"),
    "turn_latencies": ("Latency of turns", "Time to the first token and of each token after it, by turn"),
}


def write_report(folder: str | Path, png: bool = False) -> Path:
    """Writes `folder`/report.html and returns its path; with `png` the figures too, into `folder`/plots/.

    Raises UserError if there are no runs.
    """
    folder = Path(folder)
    frames = load_runs(folder)
    if png:
        save_pictures(frames, folder / PICTURES)
    path = folder / REPORT
    path.write_text(report(frames, folder.resolve().name), encoding="utf-8")
    return path


def save_pictures(frames: Frames, folder: Path) -> list[Path]:
    """Every figure that the runs have something for, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        figure = draw(frames)
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=130)
    return paths


def report(frames: Frames, title: str) -> str:
    """The document as text. Of the same records it is the same text."""
    sections = [("Runs", _runs(frames.runs))]
    for name, draw in FIGURES.items():
        if name == "first_tokens":
            if not frames.first_tokens.empty:
                sections.append(("First tokens", _first_tokens(frames)))
        elif (figure := draw(frames)) is not None:
            heading, alternative = _TITLES[name]
            sections.append((heading, html.picture(figure, name, alternative)))
    sections.append(("What was run", _commands(frames)))
    sections.append(("What it was made of", _sources(frames)))
    return html.page(title, sections, _head(frames))


def _head(frames: Frames) -> str:
    counts = Counter(frames.runs["status"])
    count = len(frames.runs)
    text = f"{count} run{'s' if count > 1 else ''}: " + ", ".join(f"{n} {status}" for status, n in counts.most_common())
    _, shared = options(frames.runs)
    said = html.paragraph(text)
    if len(frames.starts):
        said += html.paragraph(
            f"{frames.starts['wall'].min()} to {frames.starts['wall'].max()} (first and last start)", "muted"
        )
    if shared:
        said += html.paragraph("All runs: " + " ".join(f"{k}={v}" for k, v in shared.items()), "muted")
    return said


def _runs(runs: "pd.DataFrame") -> str:
    header, rows, numbers = html_rows(runs)
    said = html.table(header, rows, numbers, "tight")
    lines = "".join(html.paragraph(line, "muted") for line in reasons(runs))
    return said + (html.folded("why runs ended", lines) if len(runs) > _OPEN and lines else lines)


def _first_tokens(frames: Frames) -> str:
    """The likeliest token by run and path; below, for each run, all ten of each path and the pairs."""
    tops = top_tokens(frames)
    paths = list(dict.fromkeys(path for row in tops for path in row["paths"]))
    labels = {r["run"]: label(r, frames.runs) for r in frames.runs.to_dict("records")}
    rows = []
    for row in tops:
        cells: list[Any] = [labels[row["run"]], repr(row["prompt"]), row["when"]]
        for path in paths:
            cell = row["paths"].get(path)
            cells.append("" if cell is None else (cell_text(cell), "bad" if cell["differs"] or cell["bad"] else "good"))
        rows.append(cells)
    said = html.paragraph(
        f"The likeliest token and its logit. ≠: another token than that of {paths[0]}; every such cell is coloured.", "muted"
    )
    said += html.table(["run", "prompt", "when", *paths], rows)
    few = len(labels) <= _OPEN
    for run, mine in frames.first_tokens.groupby("run", sort=False):
        body = _ranks(mine) + _pairs(frames.diffs[frames.diffs["run"] == run])
        faulty = bool(frames.diffs.loc[frames.diffs["run"] == run, "fault"].any())
        text = f"{labels[run]}: ten likeliest tokens and pairs{'  FAULT' if faulty else ''}"
        said += html.folded(text, body, "ended" if faulty else "", printed=faulty, shown=few and faulty)
    return said


def _ranks(tokens: "pd.DataFrame") -> str:
    """Rank by path, for each prompt and moment; a cell is coloured if its token is not the first path's at that rank."""
    said = ""
    for key, mine in tokens.groupby(["prompt", "when"], sort=False):
        prompt, when = key
        paths = list(dict.fromkeys(mine["path"]))
        known = {(r["path"], r["rank"]): r for r in mine.to_dict("records")}
        rows = []
        for rank in range(int(mine["rank"].max()) + 1):
            first, cells = known.get((paths[0], rank)), []
            for path in paths:
                r = known.get((path, rank))
                differs = r is not None and first is not None and r["id"] != first["id"]
                text = "" if r is None else f"{'≠ ' if differs else ''}{r['text']!r} {r['logit']:.3f} ({r['id']})"
                cells.append((text, "bad" if differs else ""))
            rows.append([rank + 1, *cells])
        said += html.paragraph(f"{prompt!r}, {when}: token, logit (id)", "muted")
        said += html.table(["rank", *paths], rows, frozenset({0}))
    return said


def _pairs(diffs: "pd.DataFrame") -> str:
    rows = []
    for d in diffs.to_dict("records"):
        layer = d["first_divergent_layer"]
        verdict = ("FAULT", "bad") if d["fault"] else ("equal" if d["max_abs_logit"] == 0 else "as expected", "")
        expected = "" if missing(d["expected_kl"]) else f"{d['expected_kl']:.1e}"
        rows.append(
            [
                *(repr(d["prompt"]), d["when"], d["pair"], "same" if d["top1_equal"] else ("≠ other", "bad")),
                *(f"{10 * d['overlap_at_10']:.0f}", f"{d['rank_correlation']:.2f}", f"{d['kl']:.2e}", expected),
                *(f"{d['max_abs_logit']:.2e}", "" if missing(layer) else f"{layer:.0f}", verdict, d["why"]),
            ]
        )
    header = [
        "prompt",
        "when",
        "pair",
        "top-1",
        "of 10",
        "rank corr.",
        "KL (nats)",
        "expected at most",
        "max |logit difference|",
    ]
    return html.table([*header, "parts at layer", "verdict", "why"], rows, frozenset({4, 5, 6, 7, 8, 9})) if rows else ""


def command(start: dict[str, Any]) -> str:
    """What to type in the repository's top folder to do the run again."""
    if start["task"] == "command":
        return "fp4lab guard ... -- " + shlex.join(start["overrides"])
    return shlex.join(["python", "run.py", *start["overrides"]])


def _commands(frames: Frames) -> str:
    starts = {r["run"]: r for r in frames.starts.to_dict("records")}
    said = ""
    for row in frames.runs.to_dict("records"):
        start = starts.get(row["run"])
        well = row["status"] in WELL
        title = f"{label(row, frames.runs)}: {row['status']}"
        body = (
            ""
            if not row["reason"]
            else html.paragraph(row["reason"] + (f" (last phase: {row['last_phase']})" if row["last_phase"] else ""))
        )
        if start is None:
            said += html.folded(title, body + html.paragraph("no records: it was refused before it began"), "ended")
            continue
        body += html.code(command(start))
        config = start["config"] or {}
        body += html.paragraph(
            f"seed {config.get('seed', 'unknown')}, run id {start['run_id'] or 'unknown'}, started {start['wall']}", "muted"
        )
        files = frames.files[frames.files["run"] == row["run"]]
        listed = [[f["role"], f["path"], f["format"], f"{f['bytes']:,}", f["sha256"]] for f in files.to_dict("records")]
        if listed:
            body += html.table(["file", "path", "format", "bytes", "SHA-256"], listed, frozenset({3}))
        if config:
            body += html.folded("whole configuration", html.code(json.dumps(config, indent=1, ensure_ascii=False)))
        said += html.folded(title, body, "" if well else "ended", printed=True, shown=len(frames.runs) == 1)
    return said


def _sources(frames: Frames) -> str:
    """Versions, machine, devices and source: once for all runs that share them."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for start in frames.starts.to_dict("records"):
        made = {k: start[k] for k in ("versions", "host", "devices", "git_commit", "git_dirty", "git_diff")}
        groups.setdefault(json.dumps(made, sort_keys=True, default=str), (made, []))[1].append(start["run"])
    said = "" if groups else html.paragraph("not recorded")
    for made, runs in groups.values():
        said += f"<h3>{'All runs' if len(groups) == 1 else html.escape('Runs ' + ', '.join(runs))}</h3>\n"
        devices = made["devices"]
        rows = [
            ["versions", ", ".join(f"{k} {v}" for k, v in (made["versions"] or {}).items()) or "unknown"],
            ["machine", ", ".join(f"{k} {v}" for k, v in (made["host"] or {}).items()) or "unknown"],
            ["GPUs", ", ".join(devices) if devices else "unknown: no NVML" if devices is None else "none"],
            ["commit", made["git_commit"] or "unknown: not in a git repository"],
            ["changes", {True: "uncommitted changes, below", False: "none"}.get(made["git_dirty"], "unknown")],
        ]
        said += html.table(["", ""], rows)
        if made["git_diff"]:
            said += html.folded("uncommitted changes", html.code(made["git_diff"]))
    return said
