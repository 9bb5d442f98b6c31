"""Run folders as data frames, killed and unfinished runs included. Reads result.json and events.jsonl, nothing else."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4lab.errors import UserError
from fp4lab.events import decode
from fp4lab.supervise.resume import RESULT
from fp4lab.supervise.run import EVENTS
from fp4lab.supervise.summary import Summary

if TYPE_CHECKING:
    import pandas as pd

# Columns of load_runs that are results; the others are the options a run was given.
RESULTS = (
    "run",
    "status",
    "reason",
    "first_loss",
    "loss",
    "trained",
    "first_token",
    "worst_kl",
    "worst_pair",
    "faults",
    "codes_changed",
    "updates_lost",
    "turns",
    "context_tokens",
    "first_token_ms",
    "ms_per_token",
    "peak_mib",
    "peak_of",
    "slowest_phase",
    "slowest_ms",
    "last_phase",
    "seconds",
)
_PATHS = "ABCR"  # the order of first-token paths in text


def run_folders(folder: Path) -> list[Path]:
    """The runs directly below `folder`, or `folder` itself, by job number. Raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a sweep's folder or a run's, e.g. one below outputs/")
    candidates = [folder, *(p for p in folder.iterdir() if p.is_dir())]
    found = [p for p in candidates if (p / EVENTS).is_file() or (p / RESULT).is_file()]
    if not found:
        raise UserError(f"{folder}: no runs in it; expected {EVENTS} or {RESULT} there or in its direct subfolders")
    return sorted(found, key=lambda p: (not p.name.isdigit(), int(p.name) if p.name.isdigit() else 0, p.name))


def read_events(run: Path) -> list[dict[str, Any]]:
    """The records of one run, in order; a last line cut off by a kill is left out."""
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
    """result.json, or where there is none (whole) as much of it as the events tell, with status "unfinished"."""
    try:
        result = json.loads((run / RESULT).read_text(encoding="utf-8"))
        if isinstance(result, dict) and "status" in result:
            return result
    except (OSError, ValueError):
        pass
    summary, records = Summary(), read_events(run)
    for record in records:
        summary.add(record)
    start = next((r for r in records if r["kind"] == "start"), {})
    after = f" after {summary.phases[-1]}" if summary.phases else ""
    return {
        "status": "unfinished",
        "reason": f"no {RESULT}: still running, or its supervisor was killed{after}",
        "overrides": start.get("overrides", []),
        "seconds": records[-1]["t"] if records else None,
        **summary.result(),
    }


def load_runs(folder: str | Path) -> "pd.DataFrame":
    """One row a run: its options as given (text), then RESULTS.

    `loss` is the held-out loss where there was one, else the last training loss; `peak_mib` (2**20 bytes) the device's peak
    where known, else the resident set's (`peak_of` says which); `worst_kl` is in nats, `faults` counts
    pairs that are further apart than expected. An option that shares its name with a
    result is called "option NAME". Latencies and `context_tokens` are those of the last turn of a conversation.
    Raises UserError if there are no runs.
    """
    import pandas as pd

    rows = [_row(run) for run in run_folders(Path(folder))]
    options = dict.fromkeys(name for row in rows for name in row if name not in RESULTS)
    return pd.DataFrame(rows, columns=["run", *options, *RESULTS[1:]])


def load_events(folder: str | Path, kind: str | None = None) -> "pd.DataFrame":
    """All records of all runs (of one kind), one a row, with a `run` column. Raises UserError if there are no runs."""
    import pandas as pd

    rows = [
        {"run": run.name, **record}
        for run in run_folders(Path(folder))
        for record in read_events(run)
        if kind is None or record["kind"] == kind
    ]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["run", "kind"])


def _row(run: Path) -> dict[str, Any]:
    r = read_result(run)
    slowest, health, pairs = r.get("slowest_phase") or {}, r.get("state_health") or {}, r.get("first_token") or {}
    kl, pair = _worst(pairs)
    turn = (r.get("turns") or [{}])[-1]
    memory, source = _peak(r)
    return {
        **_options(r.get("overrides") or []),
        "run": run.name,
        "status": r["status"],
        "reason": r.get("reason") or "",
        "first_loss": _number(r.get("first_loss")),
        "loss": _number(r.get("loss")),
        "trained": r.get("trained"),
        "first_token": agreement(pairs),
        "worst_kl": kl,
        "worst_pair": pair,
        "faults": sum(bool(d.get("fault")) for d in pairs.values()) if pairs else None,
        "codes_changed": health.get("code_changed"),
        "updates_lost": health.get("update_lost"),
        "turns": len(r.get("turns") or []) or None,
        **{k: _number(turn.get(k)) for k in ("context_tokens", "first_token_ms", "ms_per_token")},
        "peak_mib": memory,
        "peak_of": source,
        "slowest_phase": slowest.get("name"),
        "slowest_ms": slowest.get("ms"),
        "last_phase": r.get("last_phase"),
        "seconds": r.get("seconds"),
    }


def _options(overrides: list[str]) -> dict[str, str]:
    options = dict(o.lstrip("+").split("=", 1) for o in overrides if "=" in o and not o.startswith("~"))
    return {f"option {k}" if k in RESULTS else k: v for k, v in options.items()}


def agreement(pairs: dict[str, dict[str, Any]]) -> str:
    """Paths with the same first token joined by "=", groups that differ by "≠": "A=B=C", "A=C≠B"; "" without pairs."""
    names = sorted({n for pair in pairs for n in pair.split("-")}, key=lambda n: (_PATHS + n).index(n))
    same = {frozenset(pair.split("-")) for pair, d in pairs.items() if d.get("top1_equal")}
    groups: list[list[str]] = []
    for name in names:
        group = next((g for g in groups if frozenset((g[0], name)) in same), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return "≠".join("=".join(g) for g in groups)


def _worst(pairs: dict[str, dict[str, Any]]) -> tuple[float | None, str | None]:
    """The largest KL and its pair; not-a-number is worse than any number."""
    kls = [(kl, pair) for pair, d in pairs.items() if (kl := _number(d.get("kl"))) is not None]
    return max(kls, key=lambda x: math.inf if math.isnan(x[0]) else x[0], default=(None, None))


def _peak(result: dict[str, Any]) -> tuple[float | None, str | None]:
    """The peak that matters: what torch allocated on a device, the device's own count, or the resident set."""
    peaks = result.get("peaks") or {}
    for name, source in (("torch_peak_mib", "allocated"), ("pid_mem_mib", "device")):
        if peaks.get(name) is not None:
            return peaks[name], source
    # Phases, the supervisor's looks and the kernel's account at exit each see what the others miss.
    resident = [peaks.get("proc_peak_rss_mib"), peaks.get("proc_rss_mib"), result.get("max_rss_mib")]
    known = [x for x in resident if x is not None]
    return (max(known), "resident") if known else (None, None)


def _number(x: Any) -> float | None:
    return None if x is None else float(x)  # "nan" and "inf" too
