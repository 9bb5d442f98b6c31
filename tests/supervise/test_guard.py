"""Watch.verdict: tables of readings."""

import pytest

from fp4lab.events import Memory
from fp4lab.supervise.guard import Limits, Watch, used_mib


def verdicts(limits: Limits, readings: list[tuple[float, float | None]]) -> list[str | None]:
    watch = Watch(limits)
    breaches = [watch.verdict(Memory(proc_rss_mib=mib), seconds) for seconds, mib in readings]
    return [b and b.status for b in breaches]


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
    ],
    ids=[
        "equal",
        "at-once",
        "sustained",
        "reset",
        "unknown-between",
        "unknown-now",
        "unknown",
        "none",
        "wall",
        "blind",
        "both",
    ],
)
def test_verdict(limits, readings, expected):
    assert verdicts(limits, readings) == expected


def test_breach_says_what_it_saw():
    breach = Watch(Limits(100)).verdict(Memory(proc_rss_mib=150.25, source="rss"), 1.0)
    assert breach is not None and breach.reading_mib == 150.25
    assert breach.reason == "150 MiB used (rss), over the limit of 100 MiB"
    watch = Watch(Limits(100, over_s=1))
    watch.verdict(Memory(proc_rss_mib=150), 1.0)
    late = watch.verdict(Memory(proc_rss_mib=150), 2.5)
    assert late is not None and late.reason.endswith("over the limit of 100 MiB for 1.5 s")


@pytest.mark.parametrize(
    ("memory", "used"),
    [
        (Memory(pid_mem_mib=5, proc_rss_mib=3), 5),
        (Memory(pid_mem_mib=2, proc_rss_mib=3), 3),
        (Memory(proc_rss_mib=3), 3),
        (Memory(pid_mem_mib=2), 2),
        (Memory(total_gpu_mem_mib=99, mem_available_mib=99), None),
    ],
)
def test_used(memory, used):
    assert used_mib(memory) == used


def test_limits_of_a_configuration():
    assert Limits.of({"limit_gb": 108, "over_s": 2.0, "wall_s": None}) == Limits(110592, 2.0, None)
    assert Limits.of({"limit_gb": None, "over_s": 0.0, "wall_s": 9.0}) == Limits(None, 0.0, 9.0)
