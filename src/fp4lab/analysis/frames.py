"""Run folders as data frames, killed runs included."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4lab.errors import UserError
from fp4lab.events import decode
from fp4lab.supervise.resume import RESULT
from fp4lab.supervise.run import EVENTS
from fp4lab.supervise.summary import Summary

if TYPE_CHECKING:
    import pandas as pd

_PATHS = ("A", "B", "C", "R")


def run_folders(folder: Path) -> list[Path]:
    """The runs below `folder` (or `folder` itself), in the order of their numbers. Raises UserError if there are none."""
    candidates = [folder, *(p for p in folder.glob("*") if p.is_dir())] if folder.is_dir() else []
    found = [p for p in candidates if (p / EVENTS).is_file() or (p / RESULT).is_file()]
    if not found:
        raise UserError(f"{folder}: no runs in it; expected a folder with {EVENTS}, or a sweep's folder of such folders")
    return sorted(found, key=lambda p: (not p.name.isdigit(), int(p.name) if p.name.isdigit() else 0, p.name))


def read_events(run: Path) -> list[dict[str, Any]]:
    """The records of one run; a last line cut off by a kill is left out."""
    path = run / EVENTS
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if line.strip():
            try:
                records.append(decode(line))
            except ValueError:
                continue
    return records


def read_result(run: Path) -> dict[str, Any]:
    """result.json, or as much of it as the events tell where the supervisor died before writing it."""
    try:
        return json.loads((run / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary, records = Summary(), read_events(run)
        for record in records:
            summary.add(record)
        start = next((r for r in records if r["kind"] == "start"), {})
        return {
            "status": "unfinished",
            "reason": "no result.json: the supervisor ended before the run did",
            "overrides": start.get("overrides", []),
            "seconds": records[-1]["t"] if records else None,
            **summary.result(),
        }


def load_runs(folder: str | Path) -> "pd.DataFrame":
    """One row a run: the swept options, then status, loss, agreement, memory, time."""
    import pandas as pd

    return pd.DataFrame([_row(run) for run in run_folders(Path(folder))])


def load_events(folder: str | Path, kind: str | None = None) -> "pd.DataFrame":
    """All records of all runs (of one kind), with a `run` column."""
    import pandas as pd

    rows = [
        {"run": run.name, **record}
        for run in run_folders(Path(folder))
        for record in read_events(run)
        if kind is None or record["kind"] == kind
    ]
    return pd.DataFrame(rows)


def _row(run: Path) -> dict[str, Any]:
    r = read_result(run)
    overrides = dict(o.lstrip("+~").split("=", 1) for o in r.get("overrides", []) if "=" in o)
    slowest, health, pairs = r.get("slowest_phase") or {}, r.get("state_health") or {}, r.get("first_token") or {}
    memory, source = _peak(r.get("peaks") or {})
    return {
        "run": run.name,
        **overrides,
        "status": r["status"],
        "reason": r.get("reason", ""),
        "loss": _number(r.get("loss")),
        "first_loss": _number(r.get("first_loss")),
        "trained": r.get("trained"),
        "first_token": agreement(pairs),
        "worst_kl": max((_number(p["kl"]) or 0.0 for p in pairs.values()), default=None),
        "codes_changed": health.get("code_changed"),
        "updates_lost": health.get("update_lost"),
        "peak_mib": memory,
        "peak_of": source,
        "slowest_phase": slowest.get("name"),
        "slowest_ms": slowest.get("ms"),
        "last_phase": r.get("last_phase"),
        "seconds": r.get("seconds"),
    }


def agreement(pairs: dict[str, dict[str, Any]]) -> str:
    """Paths that would say the same first token, joined by "="; groups that differ, by "≠". E.g. "A=B=C≠R"."""
    names = sorted({n for pair in pairs for n in pair.split("-")}, key=_PATHS.index)
    groups: list[list[str]] = []
    for name in names:
        for group in groups:
            if pairs.get(f"{group[0]}-{name}", {}).get("top1_equal"):
                group.append(name)
                break
        else:
            groups.append([name])
    return " ≠ ".join("=".join(g) for g in groups)


def _peak(peaks: dict[str, Any]) -> tuple[float | None, str | None]:
    """The peak that matters: what torch allocated on a device, the device's own count, or the resident set."""
    for name, source in (
        ("torch_peak_mib", "allocated"),
        ("pid_mem_mib", "device"),
        ("proc_peak_rss_mib", "resident"),
        ("proc_rss_mib", "resident"),
    ):
        if peaks.get(name) is not None:
            return peaks[name], source
    return None, None


def _number(x: Any) -> float | None:
    return None if x is None else float(x)  # "nan" and "inf" too
