"""What a run's records say about a claim or a figure of the reference log: `MEASURES[name](run)`.

A measure is True, False or a number; None where the records do not tell (the run ended before, or has no such record).
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

DEATHS = ("guard_killed", "oom", "killed_by_other")
ENDED_WELL = ("completed", "stopped")
STALL, SLOWER = 3.0, 1.5  # times the median turn; times the first turn


@dataclass(frozen=True)
class Run:
    """`folder` names it; `options` as given, text in lower case; `records` in order."""

    folder: str
    experiment: str
    options: dict[str, str]
    records: list[dict[str, Any]]

    def of(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        return [r for r in self.records if r["kind"] == kind and all(r.get(k) == v for k, v in fields.items())]

    @property
    def end(self) -> dict[str, Any]:
        return next(iter(self.of("end")), {})

    @property
    def status(self) -> str:
        return self.end.get("status", "unfinished")

    @property
    def model(self) -> str:
        return self.options.get("model", "tiny")

    @property
    def on_device(self) -> bool:
        return any(r.get("torch_allocated_mib") is not None for r in self.of("phase"))


Value = bool | float | None


def memory_mib(record: dict[str, Any], peak: bool = False) -> float | None:
    """Of a device what torch has given out, else the resident set. MiB."""
    torch, rss = ("torch_peak_mib", "proc_peak_rss_mib") if peak else ("torch_allocated_mib", "proc_rss_mib")
    return record.get(torch) if record.get("torch_allocated_mib") is not None else record.get(rss)


def _phase(name: str) -> Callable[[Run], Value]:
    def value(run: Run) -> Value:
        found = run.of("phase", name=name)
        return memory_mib(found[-1]) if found else None

    return value


def peak_mib(run: Run) -> float | None:
    """What the phases report, and the supervisor's account at the end, which a killed run has too."""
    known = [memory_mib(r, peak=True) for r in run.of("phase")]
    peaks = run.end.get("peaks") or {}
    known += [peaks.get(n) for n in (("torch_peak_mib",) if run.on_device else ("proc_peak_rss_mib", "proc_rss_mib"))]
    return max((m for m in known if m is not None), default=None)


def died(run: Run) -> Value:
    if run.status in DEATHS:
        return True
    return False if run.status in ENDED_WELL else None


def _finite(path: str) -> Callable[[Run], Value]:
    def value(run: Run) -> Value:
        found = [r for r in run.of("first_token", when="before") if r["path"].startswith(path)]
        return None if not found else not any(r["logits_nan"] or r["logits_inf"] for r in found)

    return value


def _equal(pair: str) -> Callable[[Run], Value]:
    def value(run: Run) -> Value:
        found = run.of("first_token_diff", pair=pair, when="before")
        return None if not found else all(bool(r["top1_equal"]) and not r["fault"] for r in found)

    return value


def b_parts_at_layer(run: Run) -> Value:
    found = run.of("first_token_diff", pair="B-C", when="before")
    return found[0]["first_divergent_layer"] if found else None


def cache_is_context(run: Run) -> Value:
    turns = run.of("turn")
    return all(t["cache_len"] == t["context_tokens"] for t in turns) if turns else None


def _turn_seconds(run: Run) -> list[float]:
    return [t["seconds"] for t in run.of("turn") if t["seconds"] is not None]


def stalled(run: Run) -> Value:
    seconds = _turn_seconds(run)
    return max(seconds) > STALL * statistics.median(seconds) if len(seconds) > 1 else None


def later_turns_slower(run: Run) -> Value:
    seconds = _turn_seconds(run)
    return statistics.median(seconds[1:]) > SLOWER * seconds[0] if len(seconds) > 1 else None


def compaction_returns(run: Run) -> Value:
    before, after = _phase("model_loaded")(run), _phase("post_load_compacted")(run)
    return None if before is None or after is None else after <= before


def packed_state_mib(run: Run) -> Value:
    found = [r["mib"] for r in run.of("tensor_bytes") if r["tensor_kind"].startswith(("state_w", "state_m", "state_v"))]
    return sum(found) if found else None


def step_ms(run: Run) -> Value:
    found = [r["ms"] for r in run.of("loss", split="train") if r.get("ms") is not None]
    return statistics.median(found) if found else None


def diverged(run: Run) -> Value:
    losses = [r["loss"] for r in run.of("loss")]
    if run.status == "diverged" or any(not math.isfinite(x) for x in losses):
        return True
    return False if losses and run.status in ENDED_WELL else None


def codes_moved(run: Run) -> Value:
    found = [r["code_changed"] for r in run.of("state_health") if r["code_changed"] is not None]
    return any(found) if found else None


def guard_blind(run: Run) -> Value:
    """No reading of the run's memory was above 0."""
    looks = [*run.of("sample"), *run.of("phase")]
    name = "pid_mem_mib" if run.on_device else "proc_rss_mib"
    return not any(r.get(name) for r in looks) if looks else None


def passed_limit(run: Run) -> Value:
    """Some reading of the run's memory was above guard.limit_gb."""
    try:
        limit = float(run.options["guard.limit_gb"]) * 1024
    except (KeyError, ValueError):
        return None
    name = "pid_mem_mib" if run.on_device else "proc_rss_mib"
    looks = [r[name] for r in (*run.of("sample"), *run.of("phase")) if r.get(name) is not None]
    return max(looks) > limit if looks else None


MEASURES: dict[str, Callable[[Run], Value]] = {
    "died": died,
    "stopped": lambda run: run.status == "stopped",
    "diverged": diverged,
    "a_finite": _finite("A"),
    "b_finite": _finite("B"),
    "c_finite": _finite("C"),
    "a_equals_b": _equal("A-B"),
    "a_equals_c": _equal("A-C"),
    "b_parts_at_layer": b_parts_at_layer,
    "cache_is_context": cache_is_context,
    "later_turns_slower": later_turns_slower,
    "stalled": stalled,
    "compaction_returns": compaction_returns,
    "codes_moved": codes_moved,
    "guard_blind": guard_blind,
    "passed_limit": passed_limit,
    "peak_mib": peak_mib,
    "model_loaded_mib": _phase("model_loaded"),
    "compacted_mib": _phase("post_load_compacted"),
    "backward_mib": _phase("backward_done"),
    "step_mib": _phase("optimizer_step_done"),
    "packed_state_mib": packed_state_mib,
    "step_ms": step_ms,
    "slowest_turn_s": lambda run: max(_turn_seconds(run), default=None),
}
