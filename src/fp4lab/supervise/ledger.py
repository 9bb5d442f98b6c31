"""A run's records: from the worker's pipe and the supervisor to the trackers, and at the end to result.json."""

import json
import os
import time
from pathlib import Path
from typing import Any

from fp4lab.config import fingerprint
from fp4lab.encoding import decode, encode
from fp4lab.events import End, Event, Note, to_record, utc_now
from fp4lab.supervise.resume import RESULT
from fp4lab.supervise.summary import Summary
from fp4lab.tracking.base import Fanout, Tracker


class Ledger:
    """Takes records until `close`, which writes the end and the result. Seconds count from its making."""

    def __init__(self, config: dict[str, Any], out_dir: Path, overrides: list[str], trackers: list[Tracker]):
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / RESULT).unlink(missing_ok=True)
        self.config, self.out_dir, self.overrides = config, out_dir, overrides
        self.began = time.monotonic()
        self.summary = Summary()
        self._trackers = Fanout(trackers, self.note)
        self._tail = b""
        self._over = False

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def record(self, record: dict[str, Any]) -> None:
        self.summary.add(record)
        if not self._over:  # nothing follows "end": a note about a tracker is then in the result only
            self._trackers.record(record)

    def emit(self, event: Event, seconds: float | None = None) -> None:
        """An event of the supervisor's own; `seconds` where it happened earlier than now."""
        self.record({"t": self.seconds() if seconds is None else seconds, "wall": utc_now(), **to_record(event)})

    def note(self, topic: str, text: str) -> None:
        self.emit(Note(topic=topic, text=text))

    def take(self, data: bytes) -> list[dict[str, Any]]:
        """Bytes from the worker: whole lines are records, which are recorded and returned; the rest waits."""
        *lines, self._tail = (self._tail + data).split(b"\n")
        records = []
        for line in lines:
            try:
                record = decode(line.decode())
            except ValueError as e:
                self.note("events", f"an unreadable line from the worker: {e}")
                continue
            record["t"] -= self.began  # one monotonic clock for all processes of a host
            self.record(record)
            records.append(record)
        return records

    def close(
        self,
        status: str,
        reason: str,
        *,
        exit_code: int | None = None,
        signal: str | None = None,
        choices: dict[str, str] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """The end: its record, the trackers closed, result.json written whole. `more` are further fields of the result."""
        if self._tail:
            self.note("events", f"the worker's last record was cut off ({len(self._tail)} bytes)")
        end = End(status, reason, exit_code, signal, self.seconds(), self.summary.peaks)
        record = {"t": self.seconds(), "wall": utc_now(), **to_record(end)}
        self._over = True
        self._trackers.record(record)
        self._trackers.close(record)
        result = {
            "schema": 1,
            "status": status,
            "reason": reason,
            "exit_code": exit_code,
            "signal": signal,
            "seconds": self.seconds(),
            "task": self.config["task"]["name"],
            "overrides": self.overrides,
            "choices": choices or {},
            "fingerprint": fingerprint(self.config),
            **more,
            **self.summary.result(),
        }
        finite = json.loads(encode(result))
        write_atomic(self.out_dir / RESULT, json.dumps(finite, indent=1, ensure_ascii=False) + "\n")
        return result


def write_atomic(path: Path, text: str) -> None:
    """The file is there whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
