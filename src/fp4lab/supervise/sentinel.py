"""The guard at work: a thread that looks at a worker's memory and time and ends it when `guard.judge` says so.

A thread of its own because what records a run may block (a full disk, a stalled file system), which is when a guard is
needed most. It reads /proc and NVML, sends signals and puts what it saw into a queue; it writes nothing.
"""

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from fp4lab.events import Event, Guard, Memory, Note, Sample
from fp4lab.supervise.guard import Limits, Look, State, Used, Verdict, give_up, judge, pause, used
from fp4lab.supervise.summary import peak
from fp4lab.supervise.tree import Process, session, signal_below
from fp4lab.telemetry.host import process_tree
from fp4lab.telemetry.reader import MemoryReader

_SWITCH_S = 0.0005  # Python hands the lock over this often: a busy main thread must not hold a look up by 5 ms


@dataclass
class Report:
    """What a sentinel did in a run, for result.json. Times in seconds."""

    looks: int = 0
    longest_gap_s: float = 0.0  # between two looks
    latest_s: float = 0.0  # the most that a look came after it was due
    cost_s: float = 0.0  # time spent looking, in all
    term_s: float | None = None  # when SIGTERM was sent
    kill_s: float | None = None  # when SIGKILL was sent
    source: str = "unknown"

    def result(self) -> dict[str, float | int | str | None]:
        """Rounded to microseconds."""
        values = vars(self) | {"cost_ms_per_look": 1e3 * self.cost_s / self.looks if self.looks else None}
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}


@dataclass
class Signs:
    """What the main thread has heard from the worker."""

    progress_s: float = 0.0  # seconds since the start, of the last record that means progress
    after: str = "start"
    on_device: bool = False


@dataclass
class _Term:
    """SIGTERM was sent."""

    seconds: float
    used: Used
    killed: bool = False


class Sentinel(threading.Thread):
    """Watches everything below the process `server` until `stop`.

    `heard` is a descriptor that becomes readable when `take` has something to give.
    `ended`, the status and reason of the end it brings about, is set before any signal is sent.
    """

    def __init__(self, limits: Limits, sample_s: float, reader: MemoryReader, before: Memory, server: int, worker: int):
        super().__init__(name="fp4lab-guard", daemon=True)
        self.limits, self.sample_s, self.reader, self.server = limits, sample_s, reader, server
        self.worker = Process.of(worker)
        self._events: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
        self._sample: tuple[float, Event] | None = None
        self.heard, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        self.signs, self.report = Signs(), Report()
        self.peaks: dict[str, float | None] = {}
        self.ended: tuple[str, str] | None = None
        self.last = self._before = before  # memory without the worker
        self.began = time.monotonic()
        self._state = State()
        self._term: _Term | None = None
        self._asked: tuple[str, str] | None = None
        reader.on_change = lambda text: self._put(Note(topic="guard", text=text))
        self._wake = threading.Event()
        self._stopping = False
        self._last_look: float | None = None
        self._gap = self._due = self._last_sample = 0.0

    def seconds(self) -> float:
        """Since the worker was started."""
        return time.monotonic() - self.began

    # from the main thread

    def terminate(self, status: str, reason: str) -> None:
        """SIGTERM now, SIGKILL after the grace time."""
        self._asked = (status, reason)
        self._wake.set()

    def take(self) -> Iterator[tuple[float, Event]]:
        """(seconds since the start, event) of what happened since the last call.

        Of the samples only the last: a recorder that is slower than the guard must not fall behind without end.
        """
        while not self._events.empty():
            yield self._events.get()
        sample, self._sample = self._sample, None
        if sample is not None:
            yield sample

    def stop(self) -> None:
        """Ends the thread: the worker is gone. What it has to `take` is still there."""
        self._stopping = True
        self._wake.set()
        if self.is_alive():
            self.join()

    def close(self) -> None:
        """Lets its descriptors go."""
        os.close(self._tell)
        os.close(self.heard)

    def kill_remains(self) -> None:
        """SIGKILL to what is left of the worker's session, for a server that died before it could see to it."""
        if self.worker is not None:
            for process in [self.worker, *session(self.worker)]:
                process.send(signal.SIGKILL)

    # in the thread

    def run(self) -> None:
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_S))
        while not self._stopping:
            self._wake.clear()
            wait = self._step()
            self._due = self.seconds() + wait
            if not self._stopping:
                self._wake.wait(wait)

    def _step(self) -> float:
        """One look, and what follows from it. Returns how long to sleep."""
        look = self._look()
        if self._term is not None:
            self._see_it_gone(look)
        elif self._asked is not None:
            self._end(*self._asked, look)
        else:
            self._state, verdict = judge(self.limits, self._state, look)
            if verdict is not None and verdict.kind == "breach":
                look = self._second_look(look)  # shared pages were counted once a process
                if look.used.mib is None or judge(self.limits, self._state, look)[1] is not None:
                    self._end(verdict.status, verdict.reason, look)
                    self._say(verdict)
            elif verdict is not None:
                self._say(verdict)
        close = self._term is not None or self._state.over_since is not None
        return min(pause(self.limits, look, os.cpu_count() or 1, close), max(self.sample_s, self.limits.poll_s))

    def _look(self, detailed: bool = False) -> Look:
        start = self.seconds()
        report = self.report
        if self._last_look is not None:
            self._gap = start - self._last_look
            report.longest_gap_s = max(report.longest_gap_s, self._gap)
            report.latest_s = max(report.latest_s, start - self._due)
        self._last_look = start
        memory = self.reader.read(self._pids(), detailed)
        self.last = memory
        peak(self.peaks, vars(memory))
        if detailed and memory.proc_pss_mib is not None:
            memory.proc_rss_mib = memory.proc_pss_mib
        now = self.seconds()
        holds = used(memory, self._before, self.signs.on_device)
        report.looks += 1
        report.cost_s += now - start
        report.source = memory.source
        if now - self._last_sample >= self.sample_s and not self._gone(memory):
            self._last_sample = now
            self._put(Sample(**vars(memory)))
        return Look(now, holds, memory.mem_available_mib, now - self.signs.progress_s, self.signs.after)

    def _gone(self, memory: Memory) -> bool:
        """Nobody lives here any more: `memory` is of zombies, or of nobody, and no sample of the run."""
        return memory.proc_rss_mib == 0 or (memory.proc_rss_mib is None and not self._pids())

    def _pids(self) -> list[int]:
        """The worker's tree, and what of it was left to the server when its own parent ended."""
        return [pid for pid in process_tree(self.server) if pid != self.server]

    def _second_look(self, look: Look) -> Look:
        if look.used.source != "resident set" or len(self._pids()) < 2:
            return look
        return self._look(detailed=True)

    def _end(self, status: str, reason: str, look: Look) -> None:
        self.ended = (status, reason)
        self._term = _Term(self.seconds(), look.used)
        self.report.term_s = self._term.seconds
        signal_below(self.server, signal.SIGTERM, passes=1)

    def _see_it_gone(self, look: Look) -> None:
        term = self._term
        assert term is not None
        reason = give_up(self.limits, look.seconds - term.seconds, term.used, look)
        if reason is None:
            return
        signal_below(self.server, signal.SIGKILL)
        if not term.killed:
            term.killed = True
            self.report.kill_s = self.seconds()
            self._say(Verdict("killed", "", reason, look.used.mib, self.limits.memory_mib))

    def _say(self, verdict: Verdict) -> None:
        self._put(
            Guard(
                verdict=verdict.kind,
                reason=verdict.reason,
                reading_mib=verdict.reading_mib,
                limit_mib=verdict.limit_mib,
                over_s=self.limits.over_s,
                period_s=self._gap,
            )
        )

    def _put(self, event: Event) -> None:
        if isinstance(event, Sample):
            self._sample = (self.seconds(), event)
        else:
            self._events.put((self.seconds(), event))
        with contextlib.suppress(BlockingIOError):  # full: it is readable already
            os.write(self._tell, b"x")
