"""Runs on disk, as the supervisor leaves them."""

from pathlib import Path

from fp4lab.encoding import encode
from fp4lab.events import End, FirstTokenDiff, Start, to_record
from fp4lab.supervise.summary import Summary

PAIRS = [
    FirstTokenDiff(pair="A-B", top1_equal=True, kl=0.001),
    FirstTokenDiff(pair="A-C", top1_equal=True, kl=0.0),
    FirstTokenDiff(pair="A-R", top1_equal=False, kl=0.25),
]


def write_run(folder: Path, overrides: list[str], events: list, status: str | None = "completed", reason: str = "", **start):
    """Records one second apart; no end with status None. `start` are further fields of the Start event."""
    folder.mkdir(parents=True)
    events = [Start(overrides=overrides, **start), *events]
    summary = Summary()
    for event in events:
        summary.add(to_record(event))
    if status:
        events.append(End(status=status, reason=reason, seconds=1.5, peaks=summary.peaks))
    lines = [encode({"t": float(i), "wall": "w", **to_record(e)}) + "\n" for i, e in enumerate(events)]
    (folder / "events.jsonl").write_text("".join(lines), encoding="utf-8")
