"""What a run's records amount to: the body of result.json."""

import math
from dataclasses import fields
from typing import Any

from fp4lab.events import Memory

_CAPACITIES = ("cuda_total_mib", "mem_total_mib", "cgroup_max_mib")
_PEAKS = [f.name for f in fields(Memory) if f.name.endswith("_mib") and f.name not in _CAPACITIES]

_OF_A_TURN = ("n", "path", "prompt_tokens", "context_tokens", "cache_len", "first_token_ms", "ms_per_token", "finish")


def peak(peaks: dict[str, float | None], reading: dict[str, Any]) -> None:
    """Takes a reading into `peaks`: the largest of each, of what is available the least."""
    for name in _PEAKS:
        value = reading.get(name)
        if value is None:
            continue
        before = peaks.get(name)
        better = min if name == "mem_available_mib" else max
        peaks[name] = value if before is None else better(before, value)


def _badness(diff: dict[str, Any]) -> tuple[bool, float]:
    """A fault is worse than none, then the larger KL, not-a-number before all."""
    kl = float(diff["kl"])
    return bool(diff.get("fault")), math.inf if math.isnan(kl) else kl


class Summary:
    """`add` every record, then `result`.

    Of a pair of paths the last comparison counts (after the step, where there was one), of several prompts the worst.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, float | None] = {}
        self.turns: list[dict[str, Any]] = []
        self.losses: list[dict[str, Any]] = []
        self.slowest: dict[str, Any] | None = None
        self.phases: list[str] = []
        self.pairs: dict[str, dict[str, Any]] = {}
        self.files: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.health: dict[str, Any] | None = None
        self.failure: dict[str, Any] | None = None
        self.goals: dict[tuple[str, str], dict[str, bool]] = {}  # (when, path): prompt: met
        self.controls: dict[tuple[str, str], dict[str, Any]] = {}

    def add(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind in ("phase", "sample"):
            peak(self.peaks, record)
        if kind == "phase":
            self.phases.append(record["name"])
            if self.slowest is None or (record["ms"] or 0) > self.slowest["ms"]:
                self.slowest = {"name": record["name"], "ms": record["ms"] or 0}
        elif kind == "loss":
            self.losses.append(record)
        elif kind == "turn":
            self.turns.append({k: record[k] for k in _OF_A_TURN})
        elif kind == "first_token_diff":
            known = self.pairs.get(record["pair"])
            if known is None or known["when"] != record["when"] or _badness(record) >= _badness(known):
                self.pairs[record["pair"]] = {k: v for k, v in record.items() if k not in ("t", "wall", "kind", "pair")}
        elif kind == "file":
            if record["role"] == "checkpoint":  # the last that was written or read stands for all
                self.files = [f for f in self.files if f["role"] != "checkpoint"]
            self.files.append({k: record[k] for k in ("role", "path", "format", "bytes", "sha256")})
        elif kind == "note":
            self.notes.append(record["text"])
        elif kind == "state_health":
            self.health = {k: v for k, v in record.items() if k not in ("t", "wall", "kind")}
        elif kind == "goal":
            self.goals.setdefault((record["when"], record["path"]), {})[record["prompt"]] = record["met"]
        elif kind == "controls":
            self.controls[record["when"], record["path"]] = {k: record[k] for k in ("kept", "of", "loss", "loss_before")}
        elif kind == "failure":
            self.failure = record

    @staticmethod
    def _last(asked: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
        """What was found when it was last asked: {"when": ..., path: ...}; empty if it was not asked after the start."""
        when = [w for w, _ in asked if w != "before"]
        return {"when": when[-1], **{path: found for (w, path), found in asked.items() if w == when[-1]}} if when else {}

    def result(self) -> dict[str, Any]:
        """Everything but how the run ended."""
        train = [r for r in self.losses if r["split"] == "train"]
        held = [r for r in self.losses if r["split"] == "eval"]
        return {
            "loss": held[-1]["loss"] if held else train[-1]["loss"] if train else None,
            "first_loss": train[0]["loss"] if train else None,
            "trained": self.losses[-1]["trained"] if self.losses else None,
            "peaks": self.peaks,
            "slowest_phase": self.slowest,
            "last_phase": self.phases[-1] if self.phases else None,
            "first_token": self.pairs,
            "turns": self.turns,
            "state_health": self.health,
            "goals": self._last(self.goals),
            "controls": self._last(self.controls),
            "files": self.files,
            "notes": self.notes,
        }
