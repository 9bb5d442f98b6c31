"""The fork server: a process that has imported torch and the tasks, and forks one worker a run.

`python -m fp4lab.supervise.server FD MODULE...` is started by `client.WorkerServer` and is no command for people. It
stays single-threaded, starts no CUDA context and runs no parallel torch operation, so that forking it is safe.

A request is its length (4 bytes, little-endian, with the file descriptors) and then JSON: {"entry", "config"} with the
event pipe and the log file, or {"argv"} with standard input, output and error, for a command of any kind. Answers are
JSON lines: {"ready": pid}, {"forked": pid}, {"exited": pid, "status": waitstatus,
"max_rss_mib": ...}.

Nothing outlives a run: the server is the subreaper of all it started, so what a worker leaves behind, daemons included,
becomes the server's child and is killed when the worker ends or the supervisor is gone.
"""

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from fp4lab import events
from fp4lab.encoding import encode
from fp4lab.errors import Collapsed, Diverged, GoalsMissed, PlannedStop, UserError

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SWEEP_S = 5.0
_OOM_SCORE = 500  # the kernel's OOM killer should take a worker before a supervisor or a desktop
_STATUS_OF = {
    PlannedStop: "stopped",
    UserError: "failed",
    Collapsed: "collapsed",
    Diverged: "diverged",
    GoalsMissed: "goals_missed",
}


class Terminated(Exception):
    """SIGTERM arrived; the worker leaves through its exception handlers."""


def main() -> None:
    fd, modules = int(sys.argv[1]), sys.argv[2:]
    supervisor = int(os.environ.pop("FP4LAB_SUPERVISOR"))
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != supervisor:
        return
    for module in modules:
        importlib.import_module(module)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the supervisor decides
    _Server(socket.socket(fileno=fd), supervisor).serve()


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


class _Server:
    def __init__(self, sock: socket.socket, supervisor: int):
        self.sock, self.supervisor = sock, supervisor
        self.workers: set[int] = set()
        self.wake, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # also sent when the thread that started us ends, so it is a reason to look and no more
        signal.signal(signal.SIGTERM, lambda *_: None)

    def serve(self) -> None:
        """Until the supervisor is gone."""
        self.say({"ready": os.getpid()})
        while True:
            watched: list[Any] = [self.sock, self.wake]
            ready = select.select(watched, [], [])[0]
            if self.wake in ready:
                os.read(self.wake, 4096)
                self.reap()
            if os.getppid() != self.supervisor or (self.sock in ready and not self.take()):
                self.workers.clear()
                self.sweep()
                return

    def take(self) -> bool:
        """One request. False at the end of the socket."""
        head, fds, _, _ = socket.recv_fds(self.sock, 4, 3)
        if not head:
            return False
        for fd in fds:
            os.set_inheritable(fd, False)
        request = json.loads(_receive(self.sock, int.from_bytes(head, "little")))
        before = signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGTERM}
        )  # our handler, which the child has at first, drops it
        pid = os.fork()
        if pid == 0:
            _child(request, fds, self.sock)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for fd in fds:
            os.close(fd)
        self.workers.add(pid)
        self.say({"forked": pid})
        return True

    def reap(self) -> None:
        """Collects the dead and reports workers, each after what it left behind is gone."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid in self.workers:
                self.workers.discard(pid)
                self.sweep()
                self.say({"exited": pid, "status": status, "max_rss_mib": usage.ru_maxrss / 1024})

    def sweep(self) -> None:
        """Kills every child that is no running worker, and with it, child by child, everything below.

        Gives up after _SWEEP_S: a process in the middle of a driver call cannot be killed before it returns.
        """
        deadline = time.monotonic() + _SWEEP_S
        while (strays := [pid for pid in _children() if pid not in self.workers]) and time.monotonic() < deadline:
            for pid in strays:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)  # ours until we wait for it: the pid cannot be another's
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.001)

    def say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(json.dumps(message).encode() + b"\n")


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as f:
            return [int(pid) for pid in f.read().split()]
    except OSError:
        return []


def _receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            os._exit(1)
        data += piece
    return data


def _child(request: dict[str, Any], fds: list[int], sock: socket.socket) -> None:
    """The forked process. Never returns."""
    code = 1
    try:
        server = os.getppid()
        sock.close()
        signal.set_wakeup_fd(-1)
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
            f.write(str(_OOM_SCORE))
        for number in (signal.SIGINT, signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        if "argv" in request:
            _command(request["argv"], *fds)
        else:
            code = _worker(request, *fds)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _hear_sigterm() -> None:
    """From here on, also one that was sent since the fork."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _command(argv: list[str], *stdio: int) -> None:
    for target, fd in enumerate(stdio):
        os.dup2(fd, target)
    _hear_sigterm()
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(2, f"fp4lab guard: {argv[0]}: {error.strerror}\n".encode())
        os._exit(126)


def _worker(request: dict[str, Any], event_fd: int, log_fd: int) -> int:
    signal.signal(signal.SIGTERM, _on_term)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, fd in enumerate((null, log_fd, log_fd)):
        os.dup2(fd, target)
    code = _run(request, event_fd)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # everything is done and told
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _on_term(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; SIGKILL follows if this takes too long
    raise Terminated("SIGTERM")


def _run(request: dict[str, Any], event_fd: int) -> int:
    def emit(event: events.Event) -> None:
        record = {"t": time.monotonic(), "wall": events.utc_now(), **events.to_record(event)}
        data = encode(record).encode() + b"\n"
        while data:
            data = data[os.write(event_fd, data) :]

    module, name = request["entry"].split(":")
    try:
        _hear_sigterm()
        entry: Callable[[dict, events.Emit], None] = getattr(importlib.import_module(module), name)
        entry(request["config"], emit)
        return 0
    except BaseException as error:
        status, reason, trace = diagnose(error)
        emit(events.Failure(status=status, reason=reason, traceback=trace))
        return events.STATUSES[status]


def diagnose(error: BaseException) -> tuple[str, str, str]:
    """(status, reason, traceback) of what ended a worker. The user's own mistakes have no traceback."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, SystemExit):
        return ("failed", f"the task called sys.exit({error.code!r})", trace)
    if isinstance(error, Terminated):
        return "interrupted", "terminated by SIGTERM", trace
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "interrupted", ""
    for kind, status in _STATUS_OF.items():
        if isinstance(error, kind):
            return status, str(error), ""
    text = f"{type(error).__name__}: {error}".split("\n")[0]
    # by name: this file must not need torch
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return "oom", text, trace
    return "failed", text, trace


if __name__ == "__main__":
    main()
