"""Processes by identity: a pid alone may be somebody else's by the time a signal arrives."""

import os
import signal
from dataclasses import dataclass

from fp4lab.telemetry.host import process_tree


@dataclass(frozen=True)
class Process:
    """A process and when it was started (clock ticks since boot), which together name it for good."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """None if there is no such process, or only its zombie."""
        started = start_time(pid)
        return None if started is None else cls(pid, started)

    @property
    def alive(self) -> bool:
        return start_time(self.pid) == self.started

    def send(self, number: int) -> bool:
        """Signals it, and never a successor of its pid. False if it is gone."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        except (AttributeError, OSError):  # no pidfd on this system
            return self.alive and _kill(self.pid, number)
        try:
            if not self.alive:  # asked after the descriptor is bound to whoever has the pid now
                return False
            signal.pidfd_send_signal(fd, number)
            return True
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)


def _kill(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
        return True
    except (ProcessLookupError, PermissionError):
        return False


def start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None for no process or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            fields = f.read().rpartition(b")")[2].split()  # the name before it may hold anything
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def descendants(root: int) -> list[Process]:
    """Every process below `root`, without it."""
    found = (Process.of(pid) for pid in process_tree(root) if pid != root)
    return [p for p in found if p is not None]


def signal_below(root: int, number: int, passes: int = 20) -> set[Process]:
    """Signals everything below `root`, again until a pass finds nobody new: processes may fork meanwhile."""
    done: set[Process] = set()
    for _ in range(passes):
        new = [p for p in descendants(root) if p not in done]
        if not new:
            break
        for process in new:
            process.send(number)
        done.update(new)
    return done


def session(leader: Process) -> list[Process]:
    """Members of the session that `leader` began, when the tree above them is gone. A session keeps its leader's pid
    from being given again, so members without a living other leader are its own.
    """
    heir = start_time(leader.pid)
    if heir not in (None, leader.started):
        return []
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and _session_id(int(name)) == leader.pid:
            member = Process.of(int(name))
            if member is not None and member.started >= leader.started:
                found.append(member)
    return found


def _session_id(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None
