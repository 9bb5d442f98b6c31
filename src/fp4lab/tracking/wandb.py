"""wandb as a view of the records, offline by default, in a thread of its own so that it never slows a run."""

import os
import queue
import threading
from pathlib import Path
from typing import Any, Protocol

from fp4lab.events import STATUSES
from fp4lab.tracking.base import Record
from fp4lab.tracking.wandb_view import View, start

JOIN_S = 10.0


class Sums(Protocol):
    """What a run comes to, from its records."""

    def add(self, record: Record) -> None: ...

    def results(self) -> dict[str, Any]: ...


class WandbTracker:
    """`home` holds the wandb directory; `told` is from `wandb_view.options`, `mode` offline or online.

    The run's id is that of its "start" record, so that a replay is the same run.
    """

    def __init__(self, home: Path, mode: str, told: dict[str, Any], sums: Sums):
        self._records: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._work, args=(home, lowered(mode), told, sums), name="wandb", daemon=True)
        self._thread.start()

    def record(self, record: Record) -> None:
        """Raises what wandb raised, once the thread has met it."""
        self._raise()
        self._records.put(record)

    def close(self, end: Record) -> None:
        self._records.put(None)
        self._thread.join(JOIN_S)
        self._raise()
        if self._thread.is_alive():
            raise TimeoutError(f"wandb did not finish within {JOIN_S:g} s")

    def _raise(self) -> None:
        if self._failed is not None:
            error, self._failed = self._failed, None
            raise error

    def _work(self, home: Path, mode: str, told: dict[str, Any], sums: Sums) -> None:
        try:
            import wandb  # noqa: F401  (takes half a second, and overlaps with the worker's own imports)

            first = self._records.get()
            if first is None:
                return
            with start(home, mode, first.get("run_id") or None, told) as run:
                view, status = View(run), "failed"
                record: Record | None = first
                while record is not None:
                    view.record(record)
                    sums.add(record)
                    status = record["status"] if record["kind"] == "end" else status
                    record = self._records.get()
                view.close(sums.results())
                run.finish(exit_code=STATUSES[status])
        except Exception as e:
            self._failed = e


def lowered(mode: str) -> str:
    """`mode`, unless WANDB_MODE asks for less: it can keep an online run offline, and not send what is to stay here."""
    asked = os.environ.get("WANDB_MODE", "")
    return asked if asked in ("offline", "disabled") else mode
