"""One run, from configuration to result.json: fork a worker, record its events, guard it, say how it ended."""

import contextlib
import json
import os
import selectors
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fp4lab.config import fingerprint
from fp4lab.events import End, Guard, Memory, Note, Sample, Start, decode, to_record, utc_now
from fp4lab.supervise.client import Exit, ServerDied, WorkerServer, server
from fp4lab.supervise.guard import Breach, Limits, Watch
from fp4lab.supervise.manifest import manifest
from fp4lab.supervise.resume import RESULT
from fp4lab.supervise.summary import Summary
from fp4lab.telemetry.host import process_memory
from fp4lab.tracking.base import Fanout, Tracker

ENTRY = "fp4lab.tasks.worker:main"
EVENTS, LOG = "events.jsonl", "worker.log"


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
    (out_dir / RESULT).unlink(missing_ok=True)
    run = _Run(config, out_dir, overrides, trackers)
    interruption: KeyboardInterrupt | None = None
    try:
        with _interruptible():
            run.watch(server(), entry)
    except KeyboardInterrupt as e:
        interruption = e
        run.stop_now("interrupted", "the supervisor was interrupted")
    except ServerDied as e:
        run.ended = ("failed", str(e))
        run.kill(signal.SIGKILL)  # the worker died with the server; its children may not have
    result = run.finish(choices)
    if interruption is not None:
        raise interruption
    return result


class _Run:
    """The state of one run in the supervisor."""

    def __init__(self, config: dict[str, Any], out_dir: Path, overrides: list[str], trackers: list[Tracker]):
        self.config, self.out_dir, self.overrides = config, out_dir, overrides
        self.began = time.monotonic()
        self.summary = Summary()
        self.trackers = Fanout(trackers, self.note)
        self.guard = config["guard"]
        self.watcher = Watch(Limits.of(self.guard))
        self.ended: tuple[str, str] | None = None  # status and reason, where the supervisor decided
        self.exit: Exit | None = None
        self.pid: int | None = None
        self.term_at: float | None = None
        self._tail = b""
        self._server: WorkerServer | None = None
        self._polls = self._looks = 0
        self._pipe: int | None = None
        self._over = False
        self._last_sample = 0.0

    # records

    def record(self, record: dict[str, Any]) -> None:
        self.summary.add(record)
        if not self._over:  # nothing follows "end": a note about a tracker is then in the result only
            self.trackers.record(record)

    def emit(self, event: Any) -> None:
        self.record({"t": self.seconds(), "wall": utc_now(), **to_record(event)})

    def note(self, topic: str, text: str) -> None:
        self.emit(Note(topic=topic, text=text))

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def take(self, data: bytes) -> None:
        """Bytes from the worker: whole lines are records, the rest waits."""
        *lines, self._tail = (self._tail + data).split(b"\n")
        for line in lines:
            try:
                record = decode(line.decode())
            except ValueError as e:
                self.note("events", f"an unreadable line from the worker: {e}")
                continue
            record["t"] -= self.began  # one monotonic clock for all processes of a host
            self.record(record)

    # life

    def watch(self, workers: WorkerServer, entry: str) -> None:
        """Starts the worker and returns when it has ended."""
        self._server = workers
        read_fd, write_fd = os.pipe()
        os.set_blocking(read_fd, False)
        self._pipe = read_fd
        with (self.out_dir / LOG).open("wb") as log:
            self.emit(Start(task=self.config["task"]["name"], overrides=self.overrides, **manifest()))
            self.pid = workers.spawn(entry, {**self.config, "overrides": self.overrides}, write_fd, log.fileno())
        os.close(write_fd)
        (self.out_dir / "worker.pid").write_text(f"{self.pid}\n")
        self.watcher = Watch(self.watcher.limits)
        started = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(read_fd, selectors.EVENT_READ)
            selector.register(workers, selectors.EVENT_READ)
            while self.pid not in workers.exits:
                for key, _ in selector.select(self.guard["poll_s"]):
                    if key.fd == read_fd:
                        data = _read(read_fd)
                        self.take(data)
                        if not data:
                            selector.unregister(read_fd)
                    else:
                        workers.listen()
                self._poll(time.monotonic() - started)
        self.exit = workers.exits.pop(self.pid)

    def _poll(self, seconds: float) -> None:
        """One look at the worker, at most every guard.poll_s."""
        assert self.pid is not None
        if seconds < self._polls * self.guard["poll_s"] or self._exited():
            return
        self._polls = int(seconds / self.guard["poll_s"]) + 1
        self._looks += 1
        memory = process_memory(self.pid)
        self.summary.add({"kind": "sample", **vars(memory)})
        if seconds - self._last_sample >= self.guard["sample_s"]:
            self._last_sample = seconds
            self.emit(Sample(**vars(memory)))
        if self.term_at is not None:
            if time.monotonic() - self.term_at > self.guard["term_grace_s"]:
                self.kill(signal.SIGKILL)
            return
        breach = self.watcher.verdict(memory, seconds)
        if breach is not None:
            self._enforce(breach, memory, seconds)

    def _enforce(self, breach: Breach, memory: Memory, seconds: float) -> None:
        self.emit(
            Guard(
                verdict="breach",
                reason=breach.reason,
                reading_mib=breach.reading_mib,
                limit_mib=self.watcher.limits.memory_mib,
                over_s=self.watcher.limits.over_s,
                period_s=seconds / self._looks,
            )
        )
        self.ended = (breach.status, breach.reason)
        self.term_at = time.monotonic()
        self.kill(signal.SIGTERM)

    def stop_now(self, status: str, reason: str) -> None:
        """SIGTERM, the grace time, SIGKILL; returns when the worker is gone."""
        self.ended = (status, reason)
        if self.pid is None or self._server is None:
            return
        self.kill(signal.SIGTERM)
        deadline = time.monotonic() + self.guard["term_grace_s"]
        with contextlib.suppress(ServerDied):
            while not self._exited():
                if time.monotonic() > deadline:
                    self.kill(signal.SIGKILL)
                    deadline = float("inf")
                with selectors.DefaultSelector() as selector:
                    selector.register(self._server, selectors.EVENT_READ)
                    if selector.select(0.05):
                        self._server.listen()
            self.exit = self._server.exits.pop(self.pid, self.exit)

    def _exited(self) -> bool:
        return self.exit is not None or (self._server is not None and self.pid in self._server.exits)

    def kill(self, number: int) -> None:
        """A signal to the worker's session: its process group and nothing else."""
        with contextlib.suppress(ProcessLookupError):
            if self.pid is not None:
                os.killpg(self.pid, number)

    # the end

    def verdict(self) -> tuple[str, str]:
        """Status and reason."""
        if self.ended is not None:
            return self.ended
        if self.exit is None:
            return "failed", "the worker did not start"
        if self.exit.signal is not None:
            tail = _last_lines(self.out_dir / LOG)
            reason = f"ended by {self.exit.signal}, which fp4lab did not send"
            return "killed_by_other", f"{reason}; worker.log ends: {tail}" if tail else reason
        if self.summary.failure is not None:
            return self.summary.failure["status"], self.summary.failure["reason"]
        if self.exit.code:
            return "failed", f"the worker exited with code {self.exit.code}; {_last_lines(self.out_dir / LOG)}"
        return "completed", ""

    def finish(self, choices: dict[str, str]) -> dict[str, Any]:
        if self._pipe is not None:  # open until here: an interrupted worker still has its last word
            while data := _read(self._pipe):
                self.take(data)
            os.close(self._pipe)
        if self._tail:
            self.note("events", f"the worker's last record was cut off ({len(self._tail)} bytes)")
        status, reason = self.verdict()
        code = None if self.exit is None else self.exit.code
        name = None if self.exit is None else self.exit.signal
        end = End(status, reason, code, name, self.seconds(), self.summary.peaks)
        record = {"t": self.seconds(), "wall": utc_now(), **to_record(end)}
        self._over = True
        self.trackers.record(record)
        self.trackers.close(record)
        result = {
            "schema": 1,
            "status": status,
            "reason": reason,
            "exit_code": code,
            "signal": name,
            "seconds": self.seconds(),
            "task": self.config["task"]["name"],
            "overrides": self.overrides,
            "choices": choices,
            "fingerprint": fingerprint(self.config),
            "max_rss_mib": None if self.exit is None else self.exit.max_rss_mib,
            **self.summary.result(),
        }
        write_atomic(self.out_dir / RESULT, json.dumps(_finite(result), indent=1, ensure_ascii=False) + "\n")
        (self.out_dir / "worker.pid").unlink(missing_ok=True)
        return result


def refused(config: dict[str, Any], out_dir: Path, overrides: list[str], choices: dict[str, str], reason: str) -> dict:
    """The result of a run that never started: its configuration asks for something that cannot be."""
    out_dir.mkdir(parents=True, exist_ok=True)
    run = _Run(config, out_dir, overrides, [])
    run.ended = ("failed", reason)
    return run.finish(choices)


def write_atomic(path: Path, text: str) -> None:
    """The file is there whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


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


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return b""


def _last_lines(path: Path, count: int = 3) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().split("\n")
    except OSError:
        return ""
    return " | ".join(lines[-count:])[-500:]


def _finite(value: Any) -> Any:
    from fp4lab.events import encode

    return json.loads(encode(value))
