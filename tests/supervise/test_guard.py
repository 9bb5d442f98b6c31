"""The guard's decisions: tables of readings in, verdicts out."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4lab.config import GuardConfig
from fp4lab.events import Memory
from fp4lab.supervise.guard import (
    BLIND_S,
    FAR_S,
    HOST_RATE,
    Limits,
    Look,
    State,
    Used,
    give_up,
    judge,
    pause,
    used,
)


def look(seconds: float, mib: float | None, **more) -> Look:
    return Look(seconds, Used(mib, "resident set"), **more)


def verdicts(limits: Limits, looks: list[Look]) -> list[str | None]:
    state, out = State(), []
    for each in looks:
        state, verdict = judge(limits, state, each)
        out.append(verdict and (verdict.status or verdict.kind))
    return out


@pytest.mark.parametrize(
    ("limits", "readings", "expected"),
    [
        (Limits(100), [(0, 99), (1, 100), (2, 100.5)], [None, None, "guard_killed"]),
        (Limits(100), [(0, 101)], ["guard_killed"]),
        (Limits(100, over_s=2), [(0, 101), (1.9, 101), (2, 101)], [None, None, "guard_killed"]),
        (Limits(100, over_s=2), [(0, 101), (1, 100), (2, 101), (3.9, 101), (4, 101)], [None] * 4 + ["guard_killed"]),
        (Limits(100, over_s=2), [(0, 101), (1, None), (2, 101)], [None, None, "guard_killed"]),
        (Limits(100, over_s=2), [(0, 101), (3, None)], [None, None]),
        (Limits(100), [(0, None), (1, None)], [None, None]),
        (Limits(None), [(0, 1e9)], [None]),
        (Limits(wall_s=5), [(4.9, 1), (5, 1), (5.01, 1)], [None, None, "timeout"]),
        (Limits(wall_s=5), [(6, None)], ["timeout"]),
        (Limits(100, wall_s=5), [(6, 101)], ["timeout"]),
        (Limits(100, blind="refuse"), [(1, None), (15.9, None), (16, None)], [None, None, "guard_killed"]),
        (Limits(100), [(1, None), (16, None), (40, None)], [None, "warning", None]),
        (Limits(100), [(0, None), (15, None), (16, 1), (17, None), (31, None), (32, None)],
         [None, "warning", None, None, None, "warning"]),
        (Limits(None, blind="refuse"), [(0, None), (99, None)], [None, None]),
    ],
    ids=[
        "equal", "at-once", "sustained", "reset", "unknown-between", "unknown-now", "unknown", "none", "wall", "blind-wall",
        "both", "blind-refuse", "blind-warns-once", "blind-armed-again", "blind-without-a-limit",
    ],
)  # fmt: skip
def test_verdict_on_memory_and_time(limits, readings, expected):
    assert verdicts(limits, [look(*r) for r in readings]) == expected


def test_a_phase_that_stalls():
    limits = Limits(phase_wall_s=40)
    state, verdict = judge(limits, State(), look(100, 1, quiet_s=40, after="first_token_done"))
    assert verdict is None
    _, verdict = judge(limits, state, look(101, 1, quiet_s=40.5, after="first_token_done"))
    assert verdict is not None and verdict.status == "timeout"
    assert verdict.reason == "no progress for 40.5 s after first_token_done; guard.phase_wall_s is 40"


@pytest.mark.parametrize(("left", "status"), [(None, None), (1024, None), (1023.9, "guard_killed")])
def test_the_machine_keeps_its_memory(left, status):
    assert verdicts(Limits(available_min_mib=1024), [look(0, 1, available_mib=left)]) == [status]


def test_breach_says_what_it_saw():
    _, breach = judge(Limits(100), State(), Look(1.0, Used(150.25, "resident set")))
    assert breach is not None and (breach.reading_mib, breach.limit_mib) == (150.25, 100)
    assert breach.reason == "150 MiB used (resident set), over the limit of 100 MiB"
    limits = Limits(100, over_s=1)
    state, _ = judge(limits, State(), look(1.0, 150))
    _, late = judge(limits, state, look(2.5, 150))
    assert late is not None and late.reason.endswith("over the limit of 100 MiB for 1.5 s")


START = Memory(mem_available_mib=1000, cuda_used_mib=50, cgroup_mib=10)


@pytest.mark.parametrize(
    ("memory", "on_device", "mib", "source"),
    [
        (Memory(pid_mem_mib=5, proc_rss_mib=3), True, 5, "device processes"),
        (Memory(pid_mem_mib=2, proc_rss_mib=3), True, 3, "resident set"),
        (Memory(pid_mem_mib=0, proc_rss_mib=3), False, 3, "resident set"),
        (Memory(proc_rss_mib=3), False, 3, "resident set"),
        (Memory(pid_mem_mib=2), True, 2, "device processes"),
        # the log's "0 MiB": a worker that says it uses the device cannot hold nothing there
        (Memory(pid_mem_mib=0, proc_rss_mib=3, cuda_used_mib=90), True, 40, "growth of device memory since the start"),
        (Memory(pid_mem_mib=0, proc_rss_mib=3), True, None, "unknown"),
        (Memory(proc_rss_mib=3, cuda_used_mib=90), True, 40, "growth of device memory since the start"),
        (Memory(proc_rss_mib=3, cuda_used_mib=40), True, 3, "growth of device memory since the start"),
        (Memory(cgroup_mib=30), False, 20, "growth of the cgroup since the start"),
        (Memory(total_gpu_mem_mib=99, mem_available_mib=99), False, None, "unknown"),
        # one memory for both
        (Memory(pid_mem_mib=7, proc_rss_mib=3, unified=True), True, 10, "device processes + resident set"),
        (Memory(proc_rss_mib=3, mem_available_mib=900, unified=True), True, 100, "drop of available memory since the start"),
        (Memory(pid_mem_mib=0, proc_rss_mib=3, mem_available_mib=900, unified=True), True, 100,
         "drop of available memory since the start"),
        (Memory(proc_rss_mib=300, mem_available_mib=900, unified=True), True, 300, "drop of available memory since the start"),
        (Memory(proc_rss_mib=3, mem_available_mib=900, unified=True), False, 3, "resident set"),
        (Memory(proc_rss_mib=3, cuda_used_mib=90, unified=True), True, None, "unknown"),
    ],
)  # fmt: skip
def test_used(memory, on_device, mib, source):
    found = used(memory, START, on_device)
    assert (found.mib, found.source) == (mib, source)


def test_give_up():
    limits = Limits(1000, available_min_mib=100, term_grace_s=5)
    at_term = Used(1100, "resident set")
    assert give_up(limits, 5.0, at_term, look(9, 1100, available_mib=100)) is None
    assert give_up(limits, 5.1, at_term, look(9, 1)) == "still there 5.1 s after SIGTERM; guard.term_grace_s is 5"
    assert give_up(limits, 0.1, at_term, look(9, 1164)) is None
    assert give_up(limits, 0.1, at_term, look(9, 1165)) == "still growing after SIGTERM: 1165 MiB used"
    assert give_up(limits, 0.1, Used(10, "x"), look(9, 1040)) is None  # a time limit: growth under the limit is its own affair
    assert give_up(limits, 0.1, at_term, look(9, None, available_mib=49)) is not None
    assert give_up(Limits(), 0.1, Used(None, ""), look(9, None)) is None


@pytest.mark.parametrize(
    ("limits", "seen", "expected"),
    [
        (Limits(), look(0, 5), FAR_S),
        (Limits(poll_s=3), look(0, 5), 3),
        (Limits(HOST_RATE), look(0, 0), 0.5),
        (Limits(HOST_RATE), look(0, HOST_RATE - 1), 0.1),
        (Limits(HOST_RATE, poll_s=0.005), look(0, HOST_RATE), 0.005),
        (Limits(HOST_RATE), look(0, None), 0.1),
        (Limits(HOST_RATE), Look(0, Used(0, "device processes", True)), 0.1),
        (Limits(wall_s=10), look(9.7, 1), pytest.approx(0.3)),
        (Limits(phase_wall_s=10), look(50, 1, quiet_s=9.6), pytest.approx(0.4)),
        (Limits(available_min_mib=0), look(0, 1, available_mib=0.6 * HOST_RATE), pytest.approx(0.3)),
    ],
)
def test_pause(limits, seen, expected):
    assert pause(limits, seen, cores=2) == expected
    assert pause(limits, seen, cores=2, over=True) == limits.poll_s


@given(
    limit=st.floats(1, 1e6), holds=st.floats(0, 1e6), cores=st.integers(1, 256), poll=st.floats(0.005, 1), device=st.booleans()
)
def test_nothing_overtakes_a_sleeping_guard(limit, holds, cores, poll, device):
    """After the pause at the fastest growth, memory is over its limit for no longer than `poll_s`."""
    limits = Limits(limit, poll_s=poll)
    seconds = pause(limits, Look(0, Used(holds, "", device)), cores)
    assert poll <= seconds <= max(poll, FAR_S)
    rate = 1024 * 1024 if device else HOST_RATE * cores
    crossed_after = max(limit - holds, 0) / rate
    assert seconds - crossed_after <= poll + 1e-9


@given(st.lists(st.tuples(st.floats(0.001, 1), st.none() | st.floats(0, 200)), max_size=40), st.floats(0, 3))
def test_no_verdict_on_memory_before_over_s(steps, over_s):
    """A breach means: over the limit at every known reading for at least `over_s`."""
    limits, state, now, history = Limits(100, over_s=over_s), State(), 0.0, []
    for wait, mib in steps:
        now += wait
        history.append((now, mib))
        state, verdict = judge(limits, state, look(now, mib))
        if verdict is not None and verdict.kind == "breach":
            known = [(t, m) for t, m in history if m is not None]
            within = [t for t, m in known if m <= 100]
            since = next(t for t, m in known if m > 100 and (not within or t > within[-1]))
            assert now - since >= over_s
            return
        assert not (over_s == 0 and mib is not None and mib > 100)


def test_limits_of_a_configuration():
    guard = replace(GuardConfig(), limit_gb=108, over_s=2.0, host_available_min_gb=0.5, phase_wall_s=40.0)
    limits = Limits.of(vars(guard) | {"blind": "refuse"})
    assert limits == Limits(110592, 2.0, 512, None, 40.0, 0.1, 5.0, "refuse")
    assert BLIND_S == 15
