"""The guard: a pure decision from readings and limits. The loop around it is `run.supervise`."""

from dataclasses import dataclass

from fp4lab.events import Memory

GB_MIB = 1024  # the reference's GB: 108 -> 110592 MiB


@dataclass(frozen=True)
class Limits:
    """None: no such limit. Memory is that of the worker's process tree."""

    memory_mib: float | None = None
    over_s: float = 0.0
    wall_s: float | None = None

    @classmethod
    def of(cls, guard: dict) -> "Limits":
        gb = guard["limit_gb"]
        return cls(None if gb is None else gb * GB_MIB, guard["over_s"], guard["wall_s"])


@dataclass(frozen=True)
class Breach:
    """Why a run must end."""

    status: str  # guard_killed, timeout
    reason: str
    reading_mib: float | None = None


def used_mib(memory: Memory) -> float | None:
    """What counts against the limit: device memory of the tree or its resident set, the larger. None: nothing known."""
    known = [x for x in (memory.pid_mem_mib, memory.proc_rss_mib) if x is not None]
    return max(known) if known else None


class Watch:
    """Remembers since when memory has been over its limit."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._over_since: float | None = None

    def verdict(self, memory: Memory, seconds: float) -> Breach | None:
        """`seconds` since the run began. A reading equal to the limit is no breach; an unknown one changes nothing."""
        limit = self.limits
        if limit.wall_s is not None and seconds > limit.wall_s:
            return Breach("timeout", f"ran {seconds:.1f} s; guard.wall_s is {limit.wall_s:g}")
        used = used_mib(memory)
        if limit.memory_mib is None or used is None:
            return None
        if used <= limit.memory_mib:
            self._over_since = None
            return None
        if self._over_since is None:
            self._over_since = seconds
        over = seconds - self._over_since
        if limit.over_s == 0 or over >= limit.over_s:
            text = f"{used:.0f} MiB used ({memory.source}), over the limit of {limit.memory_mib:.0f} MiB"
            return Breach("guard_killed", text + (f" for {over:.1f} s" if limit.over_s else ""), used)
        return None
