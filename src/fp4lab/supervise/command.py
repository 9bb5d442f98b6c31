"""`fp4lab guard -- COMMAND`: the same engine around any command, which keeps its standard input, output and error."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from fp4lab.encoding import EVENTS
from fp4lab.errors import UserError
from fp4lab.events import STATUSES, Guard
from fp4lab.supervise.client import WorkerServer
from fp4lab.supervise.ledger import Ledger
from fp4lab.supervise.run import watch
from fp4lab.tracking.base import Tracker
from fp4lab.tracking.jsonl import JsonlTracker

_SIGNALLED = 128  # a shell's exit code for a signal is 128 + its number


def guard_command(argv: list[str], limits: dict[str, Any], out_dir: Path, quiet: bool = False) -> int:
    """Runs `argv` under `limits` (the config's `guard` group) and returns the exit code to leave with.

    That is the command's own, 128 + N if signal N ended it, 124 if the guard did (memory) and 125 for a time limit.
    Raises UserError if there is no such command. events.jsonl and result.json are left in `out_dir`.
    """
    if not argv:
        raise UserError("guard: no command given; write it after --, e.g. fp4lab guard --limit-gb 8 -- python train.py")
    if shutil.which(argv[0]) is None:
        raise UserError(f"guard: {argv[0]}: no such command (neither a file that can be executed nor in PATH)")
    config = {"task": {"name": "command"}, "guard": limits, "argv": argv}
    out_dir.mkdir(parents=True, exist_ok=True)
    trackers: list[Tracker] = [JsonlTracker(out_dir / EVENTS), *([] if quiet else [_Terminal(limits, argv)])]
    ledger = Ledger(config, out_dir, argv, trackers)
    workers = WorkerServer(modules=())

    def launch(server: WorkerServer, _: int) -> int:
        pid = server.spawn_command(argv)
        if not quiet:
            _say(f"guard_pid={os.getpid()} child_pid={pid}")
        return pid

    try:
        result = watch(ledger, lambda: workers, launch)
    except KeyboardInterrupt:
        return STATUSES["interrupted"]
    finally:
        workers.close()
    if not quiet:
        _say(f"{result['status']} after {result['seconds']:.1f} s{_because(result)}; records in {out_dir}")
    return exit_code(result)


def exit_code(result: dict[str, Any]) -> int:
    """What `fp4lab guard` leaves with."""
    if result["status"] in ("guard_killed", "timeout", "interrupted"):
        return STATUSES[result["status"]]
    if result["signal"] is not None:
        import signal

        return _SIGNALLED + signal.Signals[result["signal"]]
    return 1 if result["exit_code"] is None else result["exit_code"]


class _Terminal:
    """The guard's own lines, on standard error: the command has standard output for itself."""

    def __init__(self, limits: dict[str, Any], argv: list[str]):
        shown = ("limit_gb", "over_s", "poll_s", "host_available_min_gb", "wall_s")
        _say("  ".join(f"{k}={limits[k]:g}" for k in shown if limits[k] is not None) + "  command: " + " ".join(argv))

    def record(self, record: dict[str, Any]) -> None:
        if record["kind"] == Guard.kind:
            _say(f"{record['verdict']}: {record['reason']}")
        elif record["kind"] == "note":
            _say(record["text"])

    def close(self, end: dict[str, Any]) -> None: ...


def _because(result: dict[str, Any]) -> str:
    peak = result["peaks"].get("proc_rss_mib")
    text = f" ({result['reason']})" if result["reason"] and result["status"] != "completed" else ""
    return text + ("" if peak is None else f", peak {peak:.0f} MiB resident")


def _say(text: str) -> None:
    print(f"[fp4lab guard] {text}", file=sys.stderr, flush=True)
