"""The guard over real processes that take memory and time."""

import time

import pytest
from toys import gone_within, of, running, text_of


@pytest.mark.parametrize("toy", ["bomb", "child_bomb", "one_allocation", "leak", "fork_tree", "daemon_bomb"])
def test_guard_ends_a_memory_bomb(go, toy):
    result, records = go(toy, limit_gb=0.125)
    assert result["status"] == "guard_killed"
    guard, *more = of(records, "guard")  # what keeps growing after SIGTERM is killed before the grace time is over
    assert guard["verdict"] == "breach" and guard["limit_mib"] == 128
    assert [g["verdict"] for g in more] in ([], ["killed"])
    assert 128 < guard["reading_mib"] < 900  # six processes on two cores take gigabytes a second
    assert guard["reason"] == result["reason"]
    assert result["seconds"] < 5
    assert result["peaks"]["proc_rss_mib"] >= guard["reading_mib"]


def test_guard_waits_over_s(go):
    result, records = go("bomb", limit_gb=0.1, over_s=0.4)
    assert result["status"] == "guard_killed"
    (guard,) = of(records, "guard")
    assert guard["over_s"] == 0.4
    assert guard["reading_mib"] > 102.4 + 60  # it kept growing meanwhile


class Stalled:
    """A disk that takes 200 ms for every sample."""

    def record(self, record):
        if record["kind"] == "sample":
            time.sleep(0.2)

    def close(self, end): ...


def test_records_that_stall_do_not_stall_the_guard(go):
    result, records = go("leak", poll_s=0.01, limit_gb=0.1, trackers=[Stalled()], sample_s=0.0)
    assert result["status"] == "guard_killed"
    (guard,) = of(records, "guard")
    assert guard["period_s"] < 0.1 and result["guard"]["longest_gap_s"] < 0.15
    assert guard["reading_mib"] < 160  # the leak takes up to 500 MiB/s


def test_what_the_guard_did_is_in_the_result(go):
    report = go("slow")[0]["guard"]
    assert report["looks"] >= 1 and report["term_s"] is report["kill_s"] is None
    assert 0 < report["cost_ms_per_look"] < 20 and "rss" in report["source"]
    report = go("stubborn", wall_s=0.2, term_grace_s=0.3)[0]["guard"]
    assert 0.2 < report["term_s"] < 0.4 and 0.3 < report["kill_s"] - report["term_s"] < 0.5


def test_wall_time(go):
    result, records = go("sleep", wall_s=0.3)
    assert (result["status"], result["signal"]) == ("timeout", None)  # SIGTERM was enough
    assert "guard.wall_s is 0.3" in result["reason"]
    assert [r["verdict"] for r in of(records, "guard")] == ["breach"]
    assert 0.3 < result["seconds"] < 3
    assert not running(int(text_of(records, "pids").split()[0]))


def test_a_worker_deaf_to_sigterm_is_killed(go):
    result, records = go("stubborn", wall_s=0.2, term_grace_s=0.4)
    assert (result["status"], result["signal"]) == ("timeout", "SIGKILL")
    assert 0.6 < result["seconds"] < 3
    assert not running(int(text_of(records, "pids").split()[0]))


def test_the_kill_is_told(go):
    _, records = go("stubborn", wall_s=0.2, term_grace_s=0.2)
    breach, killed = of(records, "guard")
    assert (breach["verdict"], killed["verdict"]) == ("breach", "killed")
    assert "guard.term_grace_s is 0.2" in killed["reason"]


def test_growth_after_sigterm_ends_the_grace(go):
    result, records = go("grows_after_term", limit_gb=0.1, term_grace_s=30)
    assert (result["status"], result["signal"]) == ("guard_killed", "SIGKILL")
    assert result["seconds"] < 5
    assert "still growing" in of(records, "guard")[1]["reason"]


def test_shared_pages_count_once(go):
    result, _ = go("shared", limit_gb=0.2)
    assert result["status"] == "completed"
    assert result["peaks"]["proc_rss_mib"] > 0.2 * 1024  # what adding up resident sets would say


def test_a_phase_that_stalls_is_ended(go):
    result, records = go("chatters", phase_wall_s=0.5)
    assert result["status"] == "timeout" and result["seconds"] > 1.4
    assert "after forward_done" in result["reason"]
    assert len(of(records, "loss")) == 10


def test_the_machine_is_protected(go):
    result, _ = go("sleep", host_available_min_gb=1e5)
    assert result["status"] == "failed" and result["reason"].startswith("not started")
    assert "host_available_min_gb" in result["reason"]


def test_a_daemon_left_behind_is_ended(go):
    result, records = go("daemon")
    assert result["status"] == "completed"
    assert gone_within(1, int(text_of(records, "child")))


def test_a_worker_that_dies_at_once(go):
    result, _ = go("dies_at_once")
    assert (result["status"], result["exit_code"]) == ("completed", 0)
