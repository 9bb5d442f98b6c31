"""The terminal: a line a phase with the memory that matters, losses, notes, and how the run ended."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fp4lab.tracking.base import Record

PATIENCE_S = 2.0  # a bar appears where something takes longer
_STYLES = {"completed": "green", "stopped": "green", "interrupted": "yellow"}


class ConsoleTracker:
    """Writes to `console`; the progress bar exists on terminals only."""

    def __init__(self, title: str, console: Console | None = None):
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._bar_task: Any = None
        self._bar_since: tuple[str, float] | None = None
        self._console.print(f"[bold]{escape(title)}[/]")

    def record(self, record: Record) -> None:
        if record["kind"] == "progress":
            self._progress(record)
            return
        line = _LINES.get(record["kind"], lambda _: None)(record)
        if line is not None:
            self._console.print(line)

    def close(self, end: Record) -> None:
        self._end_bar()

    def _progress(self, record: Record) -> None:
        if not self._console.is_terminal:
            return
        if self._bar_since is None or self._bar_since[0] != record["what"]:
            self._end_bar()
            self._bar_since = (record["what"], record["t"])
        if self._bar is None and record["t"] - self._bar_since[1] > PATIENCE_S and record["done"] < record["total"]:
            self._bar = Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._bar_task = self._bar.add_task(record["what"], total=record["total"])
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=record["done"])
            if record["done"] >= record["total"]:
                self._end_bar()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._bar_since = None


def memory_text(r: Record) -> str:
    """The memory that matters on this machine: the device's where it is known, else the resident set; peak in brackets."""
    if r.get("torch_allocated_mib") is not None:
        return f"{_mib(r['torch_allocated_mib'])} allocated, peak {_mib(r['torch_peak_mib'])}"
    if r.get("proc_rss_mib") is None:
        return "memory unknown"
    peak = r.get("proc_peak_rss_mib")
    return f"{_mib(r['proc_rss_mib'])} resident" + (f", peak {_mib(peak)}" if peak is not None else "")


def _mib(x: float) -> str:
    return f"{x:8.1f} MiB"


def _phase(r: Record) -> str:
    return f"  {r['name']:<20} {r['ms'] or 0:9.1f} ms  {memory_text(r)}"


def _loss(r: Record) -> str:
    parts = [f"  step {r['step']:<5} {r['split']:<5} loss {r['loss']:.6f}"]
    if r["grad_norm"] is not None:
        parts.append(f"grad norm {r['grad_norm']:.3f}")
    if r["tokens"] is not None:
        parts.append(f"{r['tokens']} tokens")
    return ", ".join(parts)


def _pair(r: Record) -> str | None:
    if r["top1_equal"] and r["max_abs_logit"] == 0:
        return None  # equal to the last bit: nothing to say
    word = "same" if r["top1_equal"] else "[yellow]other[/]"
    text = f"  first token {r['pair']} ({r['when']}): {word} top-1, KL {r['kl']:.2e}, max |logit| {r['max_abs_logit']:.2e}"
    if not r["fault"]:
        return text
    layer = r["first_divergent_layer"]
    where = "" if layer is None else f", apart from layer {layer} on"
    return f"{text}\n  [bold red]FAULT[/] {r['pair']}: expected KL <= {r['expected_kl']:.1e} ({escape(r['why'])}){where}"


def _layer(r: Record) -> str | None:
    if r["part"] is None:
        return None
    bad = r["nonfinite_a"] + r["nonfinite_b"]
    said = f", {bad} values not finite" if bad else ""
    return f"  layer {r['layer']} {r['pair']}: {r['part']} parted first, relative error {r['relative_error']:.2e}{said}"


def _tokens(r: Record) -> str:
    tops = " ".join(repr(text) for _, _, text in r["top10"][:3])
    return f"  first token {r['path']:<14} ({r['when']}): {escape(tops)}"


def _turn(r: Record) -> str:
    return f"  {r['path']:<14} {escape(r['prompt'])!s} -> {escape(r['text'])}"


def _goal(r: Record) -> str:
    verdict = "" if r["when"] == "before" else "[green]met[/] " if r["met"] else "[red]missed[/] "
    return f"  goal {r['path']:<14} ({r['when']}): {verdict}{escape(r['prompt'])} -> {escape(r['text'])}"


def _controls(r: Record) -> str:
    text = f"  controls {r['path']:<14} ({r['when']}): {r['kept']} of {r['of']} answers kept, their loss {r['loss']:.4f}"
    return text + ("" if r["when"] == "before" else f", before {r['loss_before']:.4f}")


def _end(r: Record) -> str:
    style = _STYLES.get(r["status"], "red")
    reason = f": {escape(r['reason'])}" if r["reason"] else ""
    return f"  [{style}]{r['status']}[/]{reason} ({r['seconds']:.2f} s)"


_LINES = {
    "phase": _phase,
    "loss": _loss,
    "first_token": _tokens,
    "first_token_diff": _pair,
    "layer_diff": _layer,
    "turn": _turn,
    "goal": _goal,
    "controls": _controls,
    "note": lambda r: f"  [yellow]note[/] {escape(r['text'])}",
    "guard": lambda r: f"  [red]guard[/] {escape(r['reason'])}",
    "file": lambda r: f"  {r['role']:<10} {escape(r['path'])} ({r['format']}, {r['bytes']} bytes, {r['sha256'][:12]})",
    "end": _end,
}
