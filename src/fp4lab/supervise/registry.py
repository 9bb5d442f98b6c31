"""Who is at work on this machine: one small file a run, so that `fp4lab doctor` finds what a dead supervisor left.

The files lie in a folder of the user's own under the system's temporary one and hold pids with start times.
"""

import contextlib
import json
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fp4lab.supervise.tree import Process, session


@dataclass(frozen=True)
class Entry:
    """A run: its supervisor, its fork server, its worker, its folder."""

    supervisor: Process
    server: Process | None
    worker: Process | None
    out_dir: str
    path: Path

    def leave(self) -> None:
        """The run is over."""
        self.path.unlink(missing_ok=True)

    @property
    def abandoned(self) -> bool:
        """Its supervisor is gone."""
        return not self.supervisor.alive

    def survivors(self) -> list[Process]:
        """What is still running of it: server, worker, and the worker's session."""
        found = [p for p in (self.server, self.worker) if p is not None and p.alive]
        if self.worker is not None:
            found += [p for p in session(self.worker) if p not in found]
        return found


def folder() -> Path:
    """The registry's folder, made if it is missing; only its owner can look into it."""
    path = Path(tempfile.gettempdir()) / f"fp4lab-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise PermissionError(f"{path} is not a folder of this user")
    return path


def enter(server: int, worker: int, out_dir: Path) -> Entry | None:
    """Registers a run. None where no file can be written: the run goes on without."""
    supervisor = Process.of(os.getpid())
    with contextlib.suppress(OSError):
        if supervisor is not None:
            path = folder() / f"{worker}.json"
            entry = Entry(supervisor, Process.of(server), Process.of(worker), str(out_dir.resolve()), path)
            path.write_text(json.dumps({k: _plain(v) for k, v in vars(entry).items() if k != "path"}), encoding="utf-8")
            return entry
    return None


def entries() -> list[Entry]:
    """Every registered run. Files that are no entries are left alone."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(folder().glob("*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                data = json.loads(path.read_text(encoding="utf-8"))
                processes = [None if data[k] is None else Process(*data[k]) for k in ("supervisor", "server", "worker")]
                if processes[0] is not None:
                    found.append(Entry(processes[0], processes[1], processes[2], data["out_dir"], path))
    return found


def _plain(value: Process | str | None) -> list[int] | str | None:
    return [value.pid, value.started] if isinstance(value, Process) else value
