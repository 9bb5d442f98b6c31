"""The supervisor's end of the fork server: start it once, ask it for workers, hear of their end."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

# OpenMP threads that wait by spinning make a step ten times slower where anything else uses a core.
_PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
PRELOAD = ("fp4lab.tasks.worker",)


class ServerDied(Exception):
    """The fork server ended; the message holds its last words."""


@dataclass
class Exit:
    """How a worker ended."""

    code: int | None  # exit code, None if a signal ended it
    signal: str | None
    max_rss_mib: float | None


class WorkerServer:
    """One server process. `fileno` is readable when it has something to say."""

    def __init__(self, modules: tuple[str, ...] = PRELOAD):
        ours, theirs = socket.socketpair()
        self._sock, self._buffer = ours, b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the server lives)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fp4lab.supervise.server", str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=self._stderr,
                env={**_PATIENT, **os.environ, "FP4LAB_SUPERVISOR": str(os.getpid())},
                start_new_session=True,
            )
        self.exits: dict[int, Exit] = {}
        self.ready = False
        self._forked: list[int] = []

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> None:
        """Returns when the server has its imports. Raises ServerDied."""
        while not self.ready:
            self.listen()

    def spawn(self, entry: str, config: dict[str, Any], event_fd: int, log_fd: int) -> int:
        """Forks a worker and returns its pid. Waits for the imports if they are not done. Raises ServerDied."""
        return self._fork({"entry": entry, "config": config}, [event_fd, log_fd])

    def spawn_command(self, argv: list[str], stdio: tuple[int, int, int] = (0, 1, 2)) -> int:
        """Starts any command with these three descriptors, in the server's folder and environment; returns its pid."""
        return self._fork({"argv": argv}, list(stdio))

    def _fork(self, request: dict[str, Any], fds: list[int]) -> int:
        data = json.dumps(request).encode()
        try:
            socket.send_fds(self._sock, [len(data).to_bytes(4, "little")], fds)
            self._sock.sendall(data)
            while not self._forked:
                self.listen()
        except OSError as e:
            raise self._died() from e
        except KeyboardInterrupt:  # a worker may exist whose pid we shall never hear: it goes with its server
            self.close()
            raise
        return self._forked.pop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def listen(self) -> None:
        """Takes in what the server said; blocks if it said nothing. Raises ServerDied."""
        try:
            data = self._sock.recv(65536)
        except OSError as e:
            raise self._died() from e
        if not data:
            raise self._died()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "ready" in message:
                self.ready = True
            elif "forked" in message:
                self._forked.append(message["forked"])
            elif "exited" in message:
                self.exits[message["exited"]] = _exit(message)

    def close(self) -> None:
        """Ends the server and with it every worker."""
        self._sock.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def _died(self) -> ServerDied:
        code = self._process.wait()
        self._stderr.seek(0)
        words = self._stderr.read().decode(errors="replace").strip().split("\n")
        return ServerDied(f"the worker server ended with code {code}: {' | '.join(words[-3:])}")


def _exit(message: dict[str, Any]) -> Exit:
    status = message["status"]
    if os.WIFSIGNALED(status):
        return Exit(None, signal.Signals(os.WTERMSIG(status)).name, message["max_rss_mib"])
    return Exit(os.WEXITSTATUS(status), None, message["max_rss_mib"])


_server: WorkerServer | None = None
_owner: int | None = None


def server() -> WorkerServer:
    """The server of this process, started when first asked for and again if it died."""
    global _server, _owner
    if _server is None or _owner != os.getpid() or not _server.alive:
        _server, _owner = WorkerServer(), os.getpid()
        atexit.register(_server.close)
    return _server
