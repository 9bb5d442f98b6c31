"""Paths side by side: the tables of task=compare runs."""

from pathlib import Path
from typing import Any

from fp4lab.analysis.records import read_events, run_folders
from fp4lab.analysis.table import terminal


def print_paths(folder: Path) -> None:
    """For every run of task=compare: first tokens by prompt and path, then the pairs against what is expected."""
    for run in run_folders(Path(folder)):
        records = read_events(run)
        if any(r["kind"] == "layer_diff" for r in records):
            console = terminal()
            console.print()
            console.print(first_tokens(records, run.name))
            console.print(pairs(records))
            for line in weights(records):
                console.print(line, highlight=False)


def first_tokens(records: list[dict[str, Any]], title: str) -> Any:
    """A row for each prompt and path: its likeliest tokens with their logits."""
    from rich.markup import escape

    table = _table(f"run {title}: first tokens (logit)")
    for name in ("prompt", "path", "not finite", "likeliest"):
        table.add_column(name, overflow="fold")
    for r in (r for r in records if r["kind"] == "first_token"):
        bad = r["hidden_nan"] + r["hidden_inf"] + r["logits_nan"] + r["logits_inf"]
        tops = "  ".join(f"{text!r} {x:.2f}" for _, x, text in r["top10"][:5])
        table.add_row(escape(r["prompt"]), r["path"], f"[red]{bad}[/]" if bad else "", escape(tops))
    return table


def pairs(records: list[dict[str, Any]]) -> Any:
    """A row for each prompt and pair: what was measured, what was expected and why, and where they part."""
    from rich.markup import escape

    table = _table("pairs")
    for name, justify in (
        *(("prompt", "left"), ("pair", "left"), ("top-1", "left"), ("of 10", "right"), ("rank\ncorr.", "right")),
        *(("KL", "right"), ("expected", "right"), ("max |logit|", "right"), ("expected", "right")),
        *(("parts at", "left"), ("verdict", "left")),
    ):
        table.add_column(name, justify=justify)
    parted = {(r["prompt"], r["pair"]): r for r in records if r["kind"] == "layer_diff" and r["part"] is not None}
    for r in (r for r in records if r["kind"] == "first_token_diff"):
        layer, at = r["first_divergent_layer"], parted.get((r["prompt"], r["pair"]))
        where = "" if layer is None else f"layer {layer}" + (f", {at['part']}" if at else "")
        same = r["max_abs_logit"] == 0
        verdict = "[bold red]FAULT[/]" if r["fault"] else "equal" if same else escape(f"as expected: {r['why']}")
        table.add_row(
            escape(r["prompt"]),
            r["pair"],
            "same" if r["top1_equal"] else "[yellow]other[/]",
            f"{10 * r['overlap_at_10']:.0f}",
            f"{r['rank_correlation']:.2f}",
            f"{r['kl']:.1e}",
            f"{r['expected_kl']:.1e}",
            f"{r['max_abs_logit']:.1e}",
            f"{r['expected_max_abs_logit']:.1e}",
            where,
            verdict,
        )
    return table


def weights(records: list[dict[str, Any]]) -> list[str]:
    """B's weights against the stored ones, in a line or two."""
    found = [r for r in records if r["kind"] == "weight_diff"]
    if not found:
        return []
    worst = max(found, key=lambda r: (r["nonfinite"], r["relative_error"]))
    if worst["nonfinite"] == 0 and worst["relative_error"] == 0:
        lines = [f"B multiplies by exactly the stored weights in all {len(found)} linears"]
    else:
        lines = [
            f"B's weights are not the stored ones: worst {worst['name']}, relative error {worst['relative_error']:.3g}, "
            f"max |w| {worst['max_abs_b']:.3g} against {worst['max_abs_stored']:.3g}, {worst['nonfinite']} not finite"
        ]
    codes = [r["codes_equal"] for r in found if r["codes_equal"] is not None]
    masters = [r["master_relative_error"] for r in found if r["master_relative_error"] is not None]
    if codes and masters:
        lines.append(
            f"masters: relative error {min(masters):.3g} to {max(masters):.3g}; quantised again they give back "
            f"{min(codes):.2%} to {max(codes):.2%} of the codes"
        )
    return lines


def print_differences(found: list[tuple[str, str, str, str, str]]) -> None:
    """What a golden comparison found."""
    console = terminal()
    if not found:
        console.print("as the golden run: every first token, layer and pair is within tolerance")
        return
    from rich.markup import escape

    table = _table(f"{len(found)} differences from the golden run")
    for name in ("prompt", "path", "what", "golden", "now"):
        table.add_column(name, overflow="fold")
    for row in found:
        table.add_row(*map(escape, row))
    console.print(table)


def _table(title: str) -> Any:
    from rich.table import Table

    return Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", title_style="bold")
