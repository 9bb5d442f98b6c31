"""One run, from configuration to result.json: fork a worker, record its events, guard it, say how it ended."""

import contextlib
import os
import selectors
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fp4lab.events import Memory, Start
from fp4lab.supervise import doctor, registry
from fp4lab.supervise.client import Exit, ServerDied, WorkerServer, server
from fp4lab.supervise.evidence import OomCounts
from fp4lab.supervise.guard import Limits
from fp4lab.supervise.ledger import Ledger
from fp4lab.supervise.manifest import manifest, run_id
from fp4lab.supervise.sentinel import Sentinel
from fp4lab.supervise.summary import peak
from fp4lab.telemetry.reader import MemoryReader
from fp4lab.tracking.base import Tracker

ENTRY = "fp4lab.tasks.worker:main"
LOG = "worker.log"
_PROGRESS = {"start", "phase", "loss", "turn", "progress", "first_token", "file"}

Launch = Callable[[WorkerServer, int], int]  # (server, event pipe) -> pid


class Interrupted(KeyboardInterrupt):
    """SIGTERM or SIGINT to the supervisor."""


def supervise(
    config: dict[str, Any],
    out_dir: Path,
    *,
    overrides: list[str],
    choices: dict[str, str],
    trackers: list[Tracker],
    entry: str = ENTRY,
) -> dict[str, Any]:
    """Runs `config` in a worker of its own and returns the result, which is also in `out_dir/result.json`.

    Whatever happens to the worker becomes a status. Only an interruption of the supervisor itself is raised
    (KeyboardInterrupt), after the worker is gone and the result is written.
    """
    out_dir.mkdir(parents=True, exist_ok=True)

    told = {**config, "overrides": overrides, "out_dir": str(out_dir.resolve())}

    def launch(workers: WorkerServer, events: int) -> int:
        with (out_dir / LOG).open("wb") as log:
            return workers.spawn(entry, told, events, log.fileno())

    return watch(Ledger(config, out_dir, overrides, trackers), server, launch, choices)


def watch(
    ledger: Ledger, servers: Callable[[], WorkerServer], launch: Launch, choices: dict[str, str] | None = None
) -> dict[str, Any]:
    """The life of one process that `launch` starts; see `supervise`. `choices` is None for a command that is not ours."""
    run = _Run(ledger, choices)
    interruption: KeyboardInterrupt | None = None
    try:
        with _interruptible():
            try:
                run.live(servers(), launch)
            except KeyboardInterrupt as e:
                interruption = e
                run.interrupt()
    except KeyboardInterrupt as e:  # once more, while the first was being seen to
        interruption = e
        run.abandon()
    except ServerDied as e:
        run.abandon(str(e))
    result = run.finish()
    if interruption is not None:
        raise interruption
    return result


class _Run:
    """The state of one run in the supervisor."""

    def __init__(self, ledger: Ledger, choices: dict[str, str] | None):
        self.ledger, self.choices, self.ours = ledger, choices or {}, choices is not None
        self.limits = Limits.of(ledger.config["guard"])
        self.oom = OomCounts.now()
        self.ended: tuple[str, str] | None = None  # status and reason, where the supervisor decided
        self.exit: Exit | None = None
        self.pid: int | None = None
        self.sentinel: Sentinel | None = None
        self.entry: registry.Entry | None = None
        self._workers: WorkerServer | None = None
        self._pipe: int | None = None

    def live(self, workers: WorkerServer, launch: Launch) -> None:
        """Starts the process and returns when it has ended."""
        config, ledger = self.ledger.config, self.ledger
        reader = MemoryReader()
        before = reader.read([])
        ledger.emit(
            Start(
                run_id=run_id(),
                task=config["task"]["name"],
                overrides=ledger.overrides,
                choices=self.choices,
                config=config,
                devices=reader.devices(),
                **manifest(),
            )
        )
        findings = [f for f in doctor.quick(config["guard"], ledger.out_dir, reader) if f.level != "ok"]
        for finding in findings:
            ledger.note(finding.topic, finding.text)
        if failing := [f.text for f in findings if f.level == "fail"]:
            self.ended = ("failed", "not started: " + "; ".join(failing))
            return
        self._workers = workers
        workers.wait()  # can take seconds, and may be interrupted
        self._pipe, events = os.pipe()
        os.set_blocking(self._pipe, False)
        with _held_back():
            try:
                self.pid = launch(workers, events)
            finally:
                os.close(events)
            self.entry = registry.enter(workers.pid, self.pid, ledger.out_dir)
            self.sentinel = Sentinel(self.limits, config["guard"]["sample_s"], reader, before, workers.pid, self.pid)
            self.sentinel.start()
        self._listen()

    def _listen(self) -> None:
        """Until the server reports the end."""
        assert self._workers is not None and self._pipe is not None and self.sentinel is not None
        with selectors.DefaultSelector() as selector:
            for source in (self._pipe, self._workers, self.sentinel.heard):
                selector.register(source, selectors.EVENT_READ)
            while self.pid not in self._workers.exits:
                for key, _ in selector.select():
                    if key.fileobj is self._workers:
                        self._workers.listen()
                    elif key.fd == self.sentinel.heard:
                        os.read(self.sentinel.heard, 4096)
                        self._record_guard()
                    elif not self._take():
                        selector.unregister(self._pipe)
        self.exit = self._workers.exits.pop(self.pid)

    def _take(self) -> bool:
        """What the worker said. False if it has closed its end."""
        assert self._pipe is not None
        try:
            data = os.read(self._pipe, 1 << 16)
        except BlockingIOError:
            return True
        for record in self.ledger.take(data):
            if self.sentinel is not None and record["kind"] in _PROGRESS:
                signs = self.sentinel.signs
                signs.progress_s = self.sentinel.seconds()
                if record["kind"] == "phase":
                    signs.after = record["name"]
                    signs.on_device = record.get("torch_reserved_mib") is not None
        return bool(data)

    def _record_guard(self) -> None:
        assert self.sentinel is not None
        shift = self.sentinel.began - self.ledger.began
        for seconds, event in self.sentinel.take():
            self.ledger.emit(event, seconds + shift)

    def interrupt(self) -> None:
        """SIGTERM, the grace time, SIGKILL; returns when the worker is gone."""
        self.ended = ("interrupted", "the supervisor was interrupted")
        if self.sentinel is not None and self._workers is not None and self.exit is None:
            self.sentinel.terminate(*self.ended)
            with contextlib.suppress(ServerDied):
                self._listen()

    def abandon(self, reason: str | None = None) -> None:
        """SIGKILL to all, for a server that died or a user in a hurry."""
        self.ended = ("interrupted", "the supervisor was interrupted") if reason is None else ("failed", reason)
        if self._workers is not None:
            self._workers.close()
        if self.sentinel is not None:
            self.sentinel.kill_remains()

    def verdict(self, last: Memory | None) -> tuple[str, str]:
        """Status and reason."""
        if self.ended is not None:
            return self.ended
        done = self.ours and self.exit is not None and self.exit.code == 0  # a command may say so to a SIGTERM
        if self.sentinel is not None and self.sentinel.ended is not None and not done:
            return self.sentinel.ended
        if self.exit is None:
            return "failed", "the worker did not start"
        tail = last_lines(self.ledger.out_dir / LOG)
        if self.exit.signal is not None:
            words = [f"ended by {self.exit.signal}, which fp4lab did not send", *self.oom.since(last, self.exit.signal)]
            return "killed_by_other", "; ".join([*words, f"worker.log ends: {tail}"] if tail else words)
        failure = self.ledger.summary.failure
        if failure is not None:
            return failure["status"], failure["reason"]
        if self.exit.code:
            return "failed", f"the worker exited with code {self.exit.code}" + (f"; {tail}" if tail else "")
        return "completed", ""

    def finish(self) -> dict[str, Any]:
        last = report = None
        if self.sentinel is not None:
            self.sentinel.stop()
            self._record_guard()
            peak(self.ledger.summary.peaks, self.sentinel.peaks)
            last, report = self.sentinel.last, self.sentinel.report.result()
            self.sentinel.close()
        if self._pipe is not None:  # open until here: an interrupted worker still has its last word
            while self._take_rest():
                pass
            os.close(self._pipe)
        if self.entry is not None:
            self.entry.leave()
        status, reason = self.verdict(last)
        ended = self.exit or Exit(None, None, None)
        peak(self.ledger.summary.peaks, {"proc_peak_rss_mib": ended.max_rss_mib})  # the kernel's account sees what looks miss
        return self.ledger.close(
            status,
            reason,
            exit_code=ended.code,
            signal=ended.signal,
            choices=self.choices,
            max_rss_mib=ended.max_rss_mib,
            guard=report,
            last_reading=None if last is None else vars(last),
        )

    def _take_rest(self) -> bool:
        assert self._pipe is not None
        try:
            data = os.read(self._pipe, 1 << 16)
        except BlockingIOError:  # a process that survived the worker holds it open
            return False
        self.ledger.take(data)
        return bool(data)


def refused(config: dict[str, Any], out_dir: Path, overrides: list[str], choices: dict[str, str], reason: str) -> dict:
    """The result of a run that never started: its configuration asks for something that cannot be."""
    return Ledger(config, out_dir, overrides, []).close("failed", reason, choices=choices)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM raises like Ctrl-C, where this is the main thread; elsewhere signals are the launcher's."""

    def stop(number: int, _: Any) -> None:
        raise Interrupted(signal.Signals(number).name)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the end of this, where this is the main thread.

    So there is no moment in which a worker runs and nobody watches it; nor one in which a lock is taken and never given back,
    as by an exception in `threading`'s own `__enter__`. Blocking them would not do: another thread would take them for us.
    """
    held: list[int] = []
    try:
        before = {n: signal.signal(n, lambda number, _: held.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
        for number in held[:1]:
            signal.raise_signal(number)


def last_lines(path: Path, count: int = 3) -> str:
    """The end of a text file on one line, at most 500 characters; empty if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().split("\n")
    except OSError:
        return ""
    return " | ".join(lines[-count:])[-500:]
