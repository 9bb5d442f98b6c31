"""Run folders and the records in them, whatever state a kill or another version has left them in."""

import json
from pathlib import Path
from typing import Any

from fp4lab.config import BEFORE
from fp4lab.encoding import EVENTS, decode, defaults, revive
from fp4lab.errors import UserError
from fp4lab.supervise.resume import RESULT

_NAMED_FLOATS = (b'"nan"', b'"inf"', b'"-inf"')


def run_folders(folder: Path) -> list[Path]:
    """The runs directly below `folder`, or `folder` itself, by job number; no attempts of a run that were set aside in it.

    Raises UserError if there are none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a sweep's folder or a run's, e.g. one below outputs/")
    candidates = [folder, *(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(BEFORE))]
    found = [p for p in candidates if (p / EVENTS).is_file() or (p / RESULT).is_file()]
    if not found:
        raise UserError(f"{folder}: no runs in it; expected {EVENTS} or {RESULT} there or in its direct subfolders")
    return sorted(found, key=lambda p: (not p.name.isdigit(), int(p.name) if p.name.isdigit() else 0, p.name))


def read_events(run: Path) -> list[dict[str, Any]]:
    """The records of one run, in order.

    A line that is no record (the last one, cut off by a kill) is left out. Kinds and fields that this version does not know
    stay as they are; a field that an older version did not write has its default of events.py.
    """
    try:
        data = (run / EVENTS).read_bytes()
    except FileNotFoundError:
        return []
    lines = [line for line in data.split(b"\n") if line.startswith(b"{")]
    try:
        records = json.loads(b"[" + b",".join(lines) + b"]")  # twice as fast as line by line
        if any(word in data for word in _NAMED_FLOATS):
            pairs = zip(records, lines, strict=True)
            records = [revive(r) if any(word in line for word in _NAMED_FLOATS) else r for r, line in pairs]
        return [{**defaults(r["kind"]), **r} for r in records]
    except (ValueError, LookupError, TypeError):  # not all of them are records
        found = (_record(line) for line in lines)
        return [{**defaults(r["kind"]), **r} for r in found if r is not None]


def read_result(run: Path) -> dict[str, Any]:
    """result.json of a run that was refused before it had records; empty if there is none (whole)."""
    try:
        result = json.loads((run / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) and "status" in result else {}


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        return decode(line.decode("utf-8", errors="replace"))
    except ValueError:
        return None
