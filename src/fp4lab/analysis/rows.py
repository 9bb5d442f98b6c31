"""What one run comes to, as a row: from its records, killed and unfinished runs included."""

import math
from typing import Any

from fp4lab.supervise.guard import GB_MIB
from fp4lab.supervise.summary import Summary

# Columns of a row that are results; the others are the options a run was given.
RESULTS = (
    "run",
    "task",
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
    "goals_met",
    "goals",
    "controls_kept",
    "controls_loss_rise",
    "turns",
    "context_tokens",
    "first_token_ms",
    "ms_per_token",
    "peak_mib",
    "peak_of",
    "limit_mib",
    "slowest_phase",
    "slowest_ms",
    "last_phase",
    "seconds",
)
_PATHS = "ABCR"  # the order of first-token paths in text


class RunRow:
    """`add` every record in order, then `row`."""

    def __init__(self) -> None:
        self.summary = Summary()
        self.start: dict[str, Any] = {}
        self.end: dict[str, Any] = {}
        self._seconds: float | None = None

    def add(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "start":
            self.start = record
        elif kind == "end":
            self.end = record
        self._seconds = record.get("t")
        self.summary.add(record)

    def results(self) -> dict[str, Any]:
        """The row without what the run was given, its status and its reason: what can be measured of it."""
        found = self.row()
        return {k: found[k] for k in RESULTS[1:] if k not in ("task", "status", "reason")}

    def row(self) -> dict[str, Any]:
        """The options given (text), then RESULTS without "run". Without an end the status is "unfinished"."""
        result = self.summary.result()
        if self.end:
            ending = {k: self.end[k] for k in ("status", "reason", "seconds")}
            result["peaks"] = {**result["peaks"], **self.end["peaks"]}
        else:
            after = f" after {result['last_phase']}" if result["last_phase"] else ""
            reason = f"its records have no end: still running, or its supervisor was killed{after}"
            ending = {"status": "unfinished", "reason": reason, "seconds": self._seconds}
        limit = (self.start.get("config") or {}).get("guard", {}).get("limit_gb")
        if limit is None:  # records of an older version have no configuration, but what was asked for
            limit = _float(_options(self.start.get("overrides") or []).get("guard.limit_gb"))
        return row(
            {
                **result,
                **ending,
                "task": self.start.get("task"),
                "overrides": self.start.get("overrides"),
                "limit_mib": None if limit is None else limit * GB_MIB,
            }
        )


def row(result: dict[str, Any]) -> dict[str, Any]:
    """A row of what result.json holds."""
    slowest, health, pairs = (
        result.get("slowest_phase") or {},
        result.get("state_health") or {},
        result.get("first_token") or {},
    )
    kl, pair = _worst(pairs)
    turn = (result.get("turns") or [{}])[-1]
    memory, source = _peak(result.get("peaks") or {})
    return {
        **_options(result.get("overrides") or []),
        "task": result.get("task") or "",
        "status": result["status"],
        "reason": result.get("reason") or "",
        "first_loss": _number(result.get("first_loss")),
        "loss": _number(result.get("loss")),
        "trained": result.get("trained"),
        "first_token": agreement(pairs),
        "worst_kl": kl,
        "worst_pair": pair,
        "faults": sum(bool(d.get("fault")) for d in pairs.values()) if pairs else None,
        "codes_changed": health.get("code_changed"),
        "updates_lost": health.get("update_lost"),
        **_goals(result.get("goals") or {}),
        **_controls(result.get("controls") or {}),
        "turns": len(result.get("turns") or []) or None,
        **{k: _number(turn.get(k)) for k in ("context_tokens", "first_token_ms", "ms_per_token")},
        "peak_mib": memory,
        "peak_of": source,
        "limit_mib": result.get("limit_mib"),
        "slowest_phase": slowest.get("name"),
        "slowest_ms": slowest.get("ms"),
        "last_phase": result.get("last_phase"),
        "seconds": result.get("seconds"),
    }


def _goals(asked: dict[str, Any]) -> dict[str, int | None]:
    """Of the worst path."""
    paths = [found for name, found in asked.items() if name != "when"]
    return {
        "goals_met": min((sum(found.values()) for found in paths), default=None),
        "goals": max((len(found) for found in paths), default=None),
    }


def _controls(asked: dict[str, Any]) -> dict[str, float | None]:
    """Of the worst path: the share of answers kept, and how much their loss rose, nats a token."""
    paths = [found for name, found in asked.items() if name != "when"]
    return {
        "controls_kept": min((found["kept"] / found["of"] for found in paths), default=None),
        "controls_loss_rise": max((float(found["loss"]) - float(found["loss_before"]) for found in paths), default=None),
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


def _peak(peaks: dict[str, Any]) -> tuple[float | None, str | None]:
    """The peak that matters: what torch allocated on a device, the device's own count, or the resident set."""
    for name, source in (("torch_peak_mib", "allocated"), ("pid_mem_mib", "device")):
        if peaks.get(name) is not None:
            return peaks[name], source
    # Phases and the supervisor's looks each see what the others miss.
    known = [x for x in (peaks.get("proc_peak_rss_mib"), peaks.get("proc_rss_mib")) if x is not None]
    return (max(known), "resident") if known else (None, None)


def _float(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:  # guard.limit_gb=null
        return None


def _number(x: Any) -> float | None:
    return None if x is None else float(x)  # "nan" and "inf" too
