"""events.jsonl: one record a line, flushed at once, so that a kill costs nothing that was reported."""

from pathlib import Path

from fp4lab.encoding import encode
from fp4lab.tracking.base import Record


class JsonlTracker:
    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def record(self, record: Record) -> None:
        if record["kind"] != "progress":
            self._file.write(encode(record) + "\n")

    def close(self, end: Record) -> None:
        self._file.close()
