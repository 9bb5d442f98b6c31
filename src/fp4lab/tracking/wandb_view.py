"""Records as a wandb run: which become curves over which axis, which become tables, which the summary.

The same for a run under way (`wandb.WandbTracker`) and one replayed from its event file (`fp4lab sync`), so that online,
offline and replay give one picture.

    phase/*    over phase/index     memory at the end of each phase, MiB, and its ms
    memory/*   over memory/seconds  memory between phases, MiB
    loss/*     over loss/step
    health/*   over health/step     of packed weights and optimizer state
    turn/*     over turn/n          of a conversation
    first_token, first_token_diff, layer_diff   tables
    result/*   in the summary       what a sweep can optimise: result/loss, result/peak_mib, result/seconds, ...
"""

import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from fp4lab.tracking.base import Record

_AXES = {"phase": "index", "memory": "seconds", "loss": "step", "health": "step", "turn": "n"}
_MEMORY = (
    "torch_allocated_mib",
    "torch_peak_mib",
    "cuda_used_mib",
    "pid_mem_mib",
    "proc_rss_mib",
    "proc_peak_rss_mib",
    "mem_available_mib",
    "cgroup_mib",
)
_TURN = ("n", "first_token_ms", "ms_per_token", "context_tokens", "cache_len", "cache_mib", "nll", "repetition", "path")
_HEALTH = ("code_changed", "update_lost", "update_kept", "max_update_over_lr")
_TABLES = {  # kind of record: columns of its table
    "first_token_diff": (
        *("when", "prompt", "pair", "top1_equal", "overlap_at_10", "rank_correlation", "kl", "expected_kl"),
        *("max_abs_logit", "expected_max_abs_logit", "first_divergent_layer", "fault", "why"),
    ),
    "layer_diff": ("prompt", "pair", "layer", "relative_error", "expected", "cosine", "part"),
}
_TOPS = ("when", "prompt", "path", "rank", "id", "logit", "text")


def options(config: dict[str, Any], choices: dict[str, str], run: str, sweep: str | None) -> dict[str, Any]:
    """What `wandb.init` is told of a run: names, group, tags and configuration. `run` and `sweep` are names of folders."""
    tracker = config["tracker"]
    return {
        "project": tracker["project"],
        "name": f"{sweep}/{run}" if sweep else run,
        "group": tracker.get("group") or sweep,
        "job_type": config["task"]["name"],
        "tags": [t[:64] for t in (*tracker.get("tags", []), *(f"{k}={v}" for k, v in choices.items()))],
        "config": config,
    }


def start(home: Path, mode: str, run_id: str | None, told: dict[str, Any]) -> Any:
    """A wandb run whose files are in `home`/wandb, as a context manager: one left open would take in the next run's data."""
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        x_disable_stats=True,
        x_save_requirements=False,
        disable_git=True,
        save_code=False,
        disable_code=True,
        x_transaction_log_flush_interval=1,
    )
    home.mkdir(parents=True, exist_ok=True)
    shared = wandb.setup().settings  # of the process, read from its environment once
    if shared.sweep_id and run_id:
        shared.run_id = run_id  # in a sweep `init` ignores its own id and takes this one, which would be that of the first run
    return wandb.init(**told, id=run_id, mode=mode, dir=str(home), settings=settings, reinit="create_new")  # type: ignore[arg-type]


class View:
    """Takes the records of a run in order, then `close`."""

    def __init__(self, run: Any):
        self._run = run
        for room, axis in _AXES.items():
            run.define_metric(f"{room}/{axis}", hidden=True)
            run.define_metric(f"{room}/*", step_metric=f"{room}/{axis}")
        self._phases = 0
        self._last: dict[str, float] = {}
        self._rows: dict[str, list[list[Any]]] = {}
        self._lines: dict[str, Callable[[Record], dict[str, Any]]] = {
            "phase": self._phase,
            "sample": lambda r: {"memory/seconds": r.get("t"), **_values("memory", r, _MEMORY)},
            "loss": _loss,
            "turn": lambda r: _values("turn", r, _TURN),
            "state_health": _health,
        }

    def record(self, record: Record) -> None:
        kind, self._last = record["kind"], _when(record)
        if kind in self._lines:
            self._run.log({**self._lines[kind](record), **self._last})
        elif kind == "first_token":
            same = [record[k] for k in ("when", "prompt", "path")]
            self._rows.setdefault(kind, []).extend([*same, rank, *top] for rank, top in enumerate(record["top10"]))
        elif kind in _TABLES:
            self._rows.setdefault(kind, []).append([record[k] for k in _TABLES[kind]])
        elif kind == "guard":
            self._run.summary[f"guard/{record['verdict']}"] = record["reason"]
        elif kind == "end":
            self._run.summary.update({"status": record["status"], "reason": record["reason"]})

    def close(self, results: dict[str, Any]) -> None:
        """Tables, and `results` as result/*; what is unknown or not finite is left out: no sweep can optimise it."""
        import wandb

        for kind, rows in self._rows.items():
            self._run.log({kind: wandb.Table(columns=list(_TABLES.get(kind, _TOPS)), data=rows), **self._last})
        for name, value in results.items():
            known = math.isfinite(value) if isinstance(value, float) else value not in (None, "")
            if known:
                self._run.summary[f"result/{name}"] = value

    def _phase(self, r: Record) -> dict[str, Any]:
        self._phases += 1
        return {"phase/index": self._phases - 1, "phase/name": r["name"], "phase/ms": r["ms"], **_values("phase", r, _MEMORY)}


def _values(room: str, r: Record, names: tuple[str, ...]) -> dict[str, Any]:
    return {f"{room}/{k}": r[k] for k in names if r.get(k) is not None}


def _loss(r: Record) -> dict[str, Any]:
    return {"loss/step": r["step"], f"loss/{r['split']}": r["loss"], **_values("loss", r, ("grad_norm", "lr", "ms"))}


def _health(r: Record) -> dict[str, Any]:
    shares = {f"health/{what}/{k}": v for what in ("zero_scale", "saturated") for k, v in r[what].items()}
    return {"health/step": r["step"], **_values("health", r, _HEALTH), **shares}


def _when(r: Record) -> dict[str, float]:
    """The record's own time, so that a replay tells when it happened."""
    try:
        return {"_timestamp": datetime.fromisoformat(r["wall"]).timestamp()}
    except (KeyError, ValueError, TypeError):
        return {}
