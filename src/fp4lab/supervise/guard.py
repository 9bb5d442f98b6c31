"""The guard's decisions: readings and limits in, a verdict out. Nothing here reads, waits or kills; `sentinel` does.

Units: MiB of 2**20 bytes, seconds. A limit of N GB is N * 1024 MiB, as in the reference log (section 6.1).
"""

from dataclasses import dataclass, replace

from fp4lab.events import Memory

GB_MIB = 1024  # the reference's GB: 108 -> 110592 MiB
BLIND_S = 15.0  # unobservable for so long: say it (reference 6.1)
FAR_S = 1.0  # the longest sleep, far from every limit
GROWTH, GROWTH_LEAST = 0.05, 64.0  # of the limit, and MiB: more growth after SIGTERM ends the grace time

# The fastest that memory can be taken, MiB/s. Resident pages have to be zeroed, about 8 GiB/s a core at best; device
# memory is only mapped. A guard that sleeps headroom / rate cannot be overtaken.
HOST_RATE = 8 * 1024
DEVICE_RATE = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """None: no such limit. Memory is that of the worker's process tree."""

    memory_mib: float | None = None
    over_s: float = 0.0
    available_min_mib: float | None = None
    wall_s: float | None = None
    phase_wall_s: float | None = None
    poll_s: float = 0.1
    term_grace_s: float = 5.0
    blind: str = "warn"

    @classmethod
    def of(cls, guard: dict) -> "Limits":
        """Limits from the config's `guard` group."""
        gb, host = guard["limit_gb"], guard["host_available_min_gb"]
        return cls(
            memory_mib=None if gb is None else gb * GB_MIB,
            over_s=guard["over_s"],
            available_min_mib=None if host is None else host * GB_MIB,
            wall_s=guard["wall_s"],
            phase_wall_s=guard["phase_wall_s"],
            poll_s=guard["poll_s"],
            term_grace_s=guard["term_grace_s"],
            blind=guard["blind"],
        )


@dataclass(frozen=True)
class Used:
    """Memory that counts against the limit, and the source it was taken from. mib None: unknown."""

    mib: float | None
    source: str
    device: bool = False  # it is device memory, which can grow faster than pages can be zeroed


def used(now: Memory, start: Memory, on_device: bool = False) -> Used:
    """What the worker's tree holds, from the best source that answers.

    `start`: a reading from before the worker began, for sources that only know the whole machine.
    `on_device`: the worker has said that it uses a GPU, so its resident set alone is no answer.
    """
    rss, own = now.proc_rss_mib, now.pid_mem_mib
    if now.unified:  # one memory for both: they add up
        if own is not None and rss is not None and (own > 0 or not on_device):
            return Used(own + rss, "device processes + resident set", True)
        drop = _growth(start.mem_available_mib, now.mem_available_mib)
        if drop is not None and (on_device or rss is None):
            return Used(max(drop, rss or 0.0), "drop of available memory since the start", True)
    elif own is not None and (own > 0 or not on_device):
        return Used(max(own, rss or 0.0), "device processes" if own >= (rss or 0.0) else "resident set", own > 0)
    elif on_device or rss is None:
        grown = _growth(now.cuda_used_mib, start.cuda_used_mib)
        if grown is not None:
            return Used(max(grown, rss or 0.0), "growth of device memory since the start", True)
    if rss is not None and not on_device:
        return Used(rss, "resident set")
    grown = _growth(now.cgroup_mib, start.cgroup_mib)
    if grown is not None and not on_device:
        return Used(grown, "growth of the cgroup since the start")
    return Used(None, "unknown")


def _growth(high: float | None, low: float | None) -> float | None:
    return None if high is None or low is None else max(high - low, 0.0)


@dataclass(frozen=True)
class Look:
    """One look at a run."""

    seconds: float  # since the worker was started
    used: Used
    available_mib: float | None = None
    quiet_s: float = 0.0  # since its last sign of progress
    after: str = "start"  # the phase it reported last


@dataclass(frozen=True)
class State:
    """What the judge remembers from one look to the next."""

    over_since: float | None = None
    blind_since: float | None = None
    warned: bool = False


@dataclass(frozen=True)
class Verdict:
    """`kind` is "warning" (the run goes on) or "breach" (it must end, with `status`)."""

    kind: str
    status: str
    reason: str
    reading_mib: float | None = None
    limit_mib: float | None = None


def judge(limits: Limits, state: State, look: Look) -> tuple[State, Verdict | None]:
    """One look against the limits. A reading equal to a limit is no breach; an unknown one changes no clock of memory."""
    breach = _time(limits, look) or _host(limits, look)
    if breach is not None or limits.memory_mib is None:
        return state, breach
    mib, limit = look.used.mib, limits.memory_mib
    if mib is None:
        return _blind(limits, state, look)
    state = replace(state, blind_since=None, warned=False)
    if mib <= limit:
        return replace(state, over_since=None), None
    since = look.seconds if state.over_since is None else state.over_since
    state = replace(state, over_since=since)
    if look.seconds - since < limits.over_s:
        return state, None
    lasted = f" for {look.seconds - since:.1f} s" if limits.over_s else ""
    reason = f"{mib:.0f} MiB used ({look.used.source}), over the limit of {limit:.0f} MiB{lasted}"
    return state, Verdict("breach", "guard_killed", reason, mib, limit)


def _time(limits: Limits, look: Look) -> Verdict | None:
    if limits.wall_s is not None and look.seconds > limits.wall_s:
        return Verdict("breach", "timeout", f"ran {look.seconds:.1f} s; guard.wall_s is {limits.wall_s:g}")
    if limits.phase_wall_s is not None and look.quiet_s > limits.phase_wall_s:
        text = f"no progress for {look.quiet_s:.1f} s after {look.after}; guard.phase_wall_s is {limits.phase_wall_s:g}"
        return Verdict("breach", "timeout", text)
    return None


def _host(limits: Limits, look: Look) -> Verdict | None:
    least, left = limits.available_min_mib, look.available_mib
    if least is None or left is None or left >= least:
        return None
    text = f"{left:.0f} MiB of the machine's memory available, under guard.host_available_min_gb ({least:.0f} MiB)"
    return Verdict("breach", "guard_killed", text, left, least)


def _blind(limits: Limits, state: State, look: Look) -> tuple[State, Verdict | None]:
    since = look.seconds if state.blind_since is None else state.blind_since
    state = replace(state, blind_since=since)
    if state.warned or look.seconds - since < BLIND_S:
        return state, None
    text = f"the worker's memory could not be read for {look.seconds - since:.0f} s: guard.limit_gb cannot be enforced"
    if limits.blind == "refuse":
        return state, Verdict("breach", "guard_killed", text + " (guard.blind=refuse)", None, limits.memory_mib)
    return replace(state, warned=True), Verdict("warning", "", text, None, limits.memory_mib)


def give_up(limits: Limits, seconds_since_term: float, at_term: Used, now: Look) -> str | None:
    """After SIGTERM: why SIGKILL must follow now, or None. Ends the grace time early if memory still grows."""
    if seconds_since_term > limits.term_grace_s:
        return f"still there {seconds_since_term:.1f} s after SIGTERM; guard.term_grace_s is {limits.term_grace_s:g}"
    mib, before, limit = now.used.mib, at_term.mib, limits.memory_mib
    if (
        mib is not None
        and before is not None
        and limit is not None
        and mib > max(limit, before) + max(GROWTH * limit, GROWTH_LEAST)
    ):
        return f"still growing after SIGTERM: {mib:.0f} MiB used"
    least, left = limits.available_min_mib, now.available_mib
    if least is not None and left is not None and left < least / 2:
        return f"{left:.0f} MiB of the machine's memory available after SIGTERM"
    return None


def pause(limits: Limits, look: Look, cores: int, over: bool = False) -> float:
    """Seconds until the next look: `poll_s` near a limit, longer where none can be reached before, at most FAR_S."""
    if over:
        return limits.poll_s
    waits = [FAR_S]
    rate = DEVICE_RATE if look.used.device else HOST_RATE * cores
    if limits.memory_mib is not None:
        waits.append(0.0 if look.used.mib is None else (limits.memory_mib - look.used.mib) / rate)
    if limits.available_min_mib is not None and look.available_mib is not None:
        waits.append((look.available_mib - limits.available_min_mib) / rate)
    if limits.wall_s is not None:
        waits.append(limits.wall_s - look.seconds)
    if limits.phase_wall_s is not None:
        waits.append(limits.phase_wall_s - look.quiet_s)
    return max(limits.poll_s, min(waits))
