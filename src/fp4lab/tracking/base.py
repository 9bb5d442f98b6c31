"""What a tracker is, and a bundle of them that no failing one can break."""

from collections.abc import Callable
from typing import Any, Protocol

Record = dict[str, Any]


class Tracker(Protocol):
    """Takes every record of a run in order; the last one is of kind "end"."""

    def record(self, record: Record) -> None: ...

    def close(self, end: Record) -> None: ...


class Fanout:
    """Hands records to all trackers. One that fails is dropped after saying so once, through `note(topic, text)`."""

    def __init__(self, trackers: list[Tracker], note: Callable[[str, str], None]):
        self._trackers, self._note = list(trackers), note

    def record(self, record: Record) -> None:
        self._each(lambda t: t.record(record))

    def close(self, end: Record) -> None:
        self._each(lambda t: t.close(end))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as e:
                self._trackers.remove(tracker)
                self._note("tracker", f"{type(tracker).__name__} failed and is left out: {type(e).__name__}: {e}")
