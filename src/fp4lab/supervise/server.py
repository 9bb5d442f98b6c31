"""The fork server: a process that has imported torch and the tasks, and forks one worker a run.

`python -m fp4lab.supervise.server FD MODULE...` is started by `client.WorkerServer` and is no command for people. It
stays single-threaded, starts no CUDA context and runs no parallel torch operation, so that forking it is safe.

Requests come over an AF_UNIX socket as one JSON line with two file descriptors (the event pipe, the log file); answers
go back as JSON lines: {"ready": pid}, {"forked": pid}, {"exited": pid, "status": waitstatus, "max_rss_mib": ...}.
The server dies with its supervisor, and every worker with the server.
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
from fp4lab.errors import Collapsed, Diverged, PlannedStop, UserError

_PR_SET_PDEATHSIG = 1
_STATUS_OF = {PlannedStop: "stopped", UserError: "failed", Collapsed: "collapsed", Diverged: "diverged"}


def die_with(parent: int) -> None:
    """SIGKILL for this process when its parent dies (Linux). Ends at once if the parent is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


class Terminated(Exception):
    """SIGTERM arrived; the worker leaves through its exception handlers."""


def main() -> None:
    fd, modules = int(sys.argv[1]), sys.argv[2:]
    die_with(int(os.environ.pop("FP4LAB_SUPERVISOR")))
    for module in modules:
        importlib.import_module(module)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the supervisor decides
    _serve(socket.socket(fileno=fd))


def _serve(sock: socket.socket) -> None:
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_w, False)
    signal.set_wakeup_fd(wake_w)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _say(sock, {"ready": os.getpid()})
    alive: set[int] = set()
    inputs: list[Any] = [sock, wake_r]
    while True:
        ready, _, _ = select.select(inputs, [], [])
        if wake_r in ready:
            os.read(wake_r, 4096)
            while alive:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if not pid:
                    break
                alive.discard(pid)
                _kill_group(pid)  # children that the worker left behind
                _say(sock, {"exited": pid, "status": status, "max_rss_mib": usage.ru_maxrss / 1024})
        if sock in ready:
            data, fds, _, _ = socket.recv_fds(sock, 4, 2)
            if not data:  # the supervisor is gone
                for pid in alive:
                    _kill_group(pid)
                return
            size = int.from_bytes(data, "little")
            request = json.loads(_receive(sock, size))
            pid = os.fork()
            if pid == 0:
                sock.close()
                signal.set_wakeup_fd(-1)
                _worker(request, *fds)
            for f in fds:
                os.close(f)
            alive.add(pid)
            _say(sock, {"forked": pid})


def _receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            os._exit(1)
        data += piece
    return data


def _say(sock: socket.socket, message: dict[str, Any]) -> None:
    sock.sendall(json.dumps(message).encode() + b"\n")


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _worker(request: dict[str, Any], event_fd: int, log_fd: int) -> None:
    """The forked child. Never returns."""
    code = 1
    try:
        parent = os.getppid()
        os.setsid()
        die_with(parent)
        for number in (signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, _on_term)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        code = _run(request, event_fd)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _on_term(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; SIGKILL follows if this takes too long
    raise Terminated("SIGTERM")


def _run(request: dict[str, Any], event_fd: int) -> int:
    def emit(event: events.Event) -> None:
        record = {"t": time.monotonic(), "wall": events.utc_now(), **events.to_record(event)}
        data = events.encode(record).encode() + b"\n"
        while data:
            data = data[os.write(event_fd, data) :]

    module, name = request["entry"].split(":")
    try:
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
