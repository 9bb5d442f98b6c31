"""Many runs: nothing leaks, and every way to end leaves its row."""

import os
from collections import Counter

import psutil
from toys import events, settings

from fp4lab.analysis.frames import load_runs
from fp4lab.supervise import client
from fp4lab.supervise.run import supervise
from fp4lab.tracking.jsonl import JsonlTracker


def one(folder, toy: str, **guard) -> dict:
    return supervise(
        settings(toy, **guard),
        folder,
        overrides=[f"toy={toy}"],
        choices={},
        trackers=[JsonlTracker(folder / "events.jsonl")],
        entry="toy_worker:main",
    )


def held() -> tuple[int, set[int], int]:
    """Descriptors of this process; the processes below it; their descriptors."""
    below = psutil.Process().children(recursive=True)
    return psutil.Process().num_fds(), {p.pid for p in below}, sum(p.num_fds() for p in below)


def test_200_runs_back_to_back_leave_nothing(tmp_path):
    one(tmp_path / "first", "good")
    before = held()
    for i in range(200):
        assert one(tmp_path / str(i), "dies_at_once" if i % 4 == 3 else "good")["seconds"] < 10
    assert held() == before  # no descriptor, no process and no zombie more, here or in the server
    assert client.server().pid in before[1]


# the toy, what it is limited to, and how it must end: every status of the process model that a worker can bring about
WAYS = [
    ("bomb", {"limit_gb": 0.1}, "guard_killed"),
    ("fork_tree", {"limit_gb": 0.125}, "guard_killed"),
    ("sleep", {"wall_s": 0.2}, "timeout"),
    ("stubborn", {"wall_s": 0.2, "term_grace_s": 0.2}, "timeout"),
    ("sleep", {"phase_wall_s": 0.2}, "timeout"),
    ("raises", {}, "failed"),
    ("user_error", {}, "failed"),
    ("collapsed", {}, "collapsed"),
    ("diverged", {}, "diverged"),
    ("no_memory", {}, "oom"),
    ("segfault", {}, "killed_by_other"),
    ("kills_itself", {}, "killed_by_other"),
    ("kills_server", {}, "failed"),
]


def test_a_sweep_of_40_whose_third_dies_in_every_way(tmp_path):
    ways = iter(WAYS)
    expected = []
    for i in range(40):
        toy, guard, status = next(ways) if i % 3 == 1 else ("good", {}, "completed")
        expected.append(status)
        assert one(tmp_path / str(i), toy, **guard)["status"] == status, toy
    assert next(ways, None) is None
    runs = load_runs(tmp_path).runs
    assert list(runs["status"]) == expected and Counter(expected)["completed"] == 27
    assert all(reason for reason, status in zip(runs["reason"], expected, strict=True) if status != "completed")
    for i, status in enumerate(expected):
        kinds = [r["kind"] for r in events(tmp_path / str(i))]
        assert kinds[0] == "start" and kinds.count("end") == 1 and kinds[-1] == "end"
        if status == "completed":
            assert kinds.count("loss") == 2
    assert events(tmp_path / "16")[1:-1], "what the worker said before it died is there"
    assert not [p for p in psutil.Process(os.getpid()).children(recursive=True) if p.status() == psutil.STATUS_ZOMBIE]
