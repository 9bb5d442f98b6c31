"""What the tests of supervision share: toy configurations, records, and whether a process lives."""

import time
from pathlib import Path

import psutil

from fp4lab.config import GuardConfig
from fp4lab.encoding import decode

HERE = str(Path(__file__).parent)
GUARD = {**vars(GuardConfig()), "blind": "warn", "poll_s": 0.02, "sample_s": 60.0}
SUPERVISOR = """
import functools, json, signal, sys
from pathlib import Path
from fp4lab.supervise import client, run
from fp4lab.tracking.jsonl import JsonlTracker

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with it ignored
client.WorkerServer = functools.partial(client.WorkerServer, modules=("toy_worker",))
config, out = json.loads(sys.argv[1]), Path(sys.argv[2])
trackers = [JsonlTracker(out / "events.jsonl")]
run.supervise(config, out, overrides=[], choices={}, trackers=trackers, entry="toy_worker:main")
"""


def settings(toy: str, **guard) -> dict:
    return {"task": {"name": "step"}, "guard": {**GUARD, **guard}, "toy": toy}


def events(folder: Path) -> list[dict]:
    return [decode(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def of(records: list[dict], kind: str) -> list[dict]:
    return [r for r in records if r["kind"] == kind]


def text_of(records: list[dict], topic: str) -> str:
    return next(r["text"] for r in records if r["kind"] == "note" and r["topic"] == topic)


def running(pid: int) -> bool:
    """Alive, not a zombie that nobody has collected."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone_within(seconds: float, *pids: int) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(running, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
