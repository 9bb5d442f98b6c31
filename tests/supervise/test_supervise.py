"""supervise(): every way a worker can end, with real processes."""

import json
import os
import signal
import threading

import pytest
from toys import events, gone_within, of, settings, text_of

from fp4lab.config import fingerprint
from fp4lab.supervise import client, registry
from fp4lab.supervise.ledger import write_atomic
from fp4lab.supervise.resume import finished
from fp4lab.supervise.run import refused, supervise
from fp4lab.tracking.jsonl import JsonlTracker


def test_a_run_completes(go, tmp_path):
    result, records = go("good")
    assert [r["kind"] for r in records] == ["start", "phase", "loss", "loss", "first_token_diff", "phase", "end"]
    assert records[0]["overrides"] == ["seq_len=8"] and records[0]["task"] == "step"
    assert all(0 <= r["t"] <= result["seconds"] for r in records)
    end = records[-1]
    assert (end["status"], end["exit_code"], end["signal"]) == ("completed", 0, None)
    assert (result["status"], result["reason"], result["exit_code"]) == ("completed", "", 0)
    assert (result["loss"], result["first_loss"], result["last_phase"]) == (2.25, 2.5, "cleanup_done")
    assert result["slowest_phase"] == {"name": "cleanup_done", "ms": 3.0}
    assert result["max_rss_mib"] > 1
    assert result["fingerprint"] == fingerprint(settings("good"))
    assert (tmp_path / "worker.log").read_text() == "hello from the worker\n"


def test_result_file_is_the_result(go, tmp_path):
    (tmp_path / "result.json").write_text('{"status": "stale"}')
    result, _ = go("good")
    saved = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert saved["first_token"]["A-C"].pop("rank_correlation") == "nan"  # JSON has no NaN
    assert saved["first_token"]["A-C"].pop("max_abs_logit") == "nan"
    for name in ("rank_correlation", "max_abs_logit"):
        result["first_token"]["A-C"].pop(name)
    assert saved == result
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.jsonl", "result.json", "worker.log"]


def test_an_older_result_is_gone_while_the_run_lives(go, tmp_path):
    (tmp_path / "result.json").write_text('{"status": "completed"}')
    seen = []

    class Look:
        def record(self, record):
            seen.append((tmp_path / "result.json").exists())

        def close(self, end): ...

    go("good", [Look()])
    assert seen and not any(seen)


def test_thousands_of_records_arrive_in_order(go):
    _, records = go("many")
    assert [int(r["text"]) for r in of(records, "note")] == list(range(4000))


def test_samples_are_recorded(go):
    result, records = go("slow", sample_s=0.1)
    samples = of(records, "sample")
    assert 2 <= len(samples) <= result["seconds"] / 0.1 + 1
    assert all(s["proc_rss_mib"] > 1 for s in samples)
    assert records[-1]["peaks"]["proc_rss_mib"] >= max(s["proc_rss_mib"] for s in samples)


@pytest.mark.parametrize(
    ("toy", "status", "reason", "code"),
    [
        ("raises", "failed", "ValueError: first line", 1),
        ("sys_exit", "failed", "the task called sys.exit(3)", 1),
        ("no_memory", "oom", "MemoryError", 5),
    ],
)
def test_exceptions_bring_a_traceback(go, toy, status, reason, code):
    result, records = go(toy)
    assert (result["status"], result["exit_code"], result["signal"]) == (status, code, None)
    assert result["reason"].startswith(reason) and "\n" not in result["reason"]
    (failure,) = of(records, "failure")
    assert "toy_worker.py" in failure["traceback"]
    assert records[-1]["kind"] == "end" and records[-1]["reason"] == result["reason"]


@pytest.mark.parametrize(
    ("toy", "status", "reason", "code"),
    [
        ("user_error", "failed", "data.path=nowhere: no such file", 1),
        ("planned", "stopped", "stop_after=start", 0),
        ("collapsed", "collapsed", "non-finite logits", 3),
        ("diverged", "diverged", "loss is nan", 4),
    ],
)
def test_known_endings_have_no_traceback(go, toy, status, reason, code):
    result, records = go(toy)
    assert (result["status"], result["reason"], result["exit_code"]) == (status, reason, code)
    assert [f["traceback"] for f in of(records, "failure")] == [""]


@pytest.mark.parametrize(("toy", "name"), [("abort", "SIGABRT"), ("segfault", "SIGSEGV"), ("kills_itself", "SIGKILL")])
def test_a_signal_nobody_here_sent(go, toy, name):
    result, records = go(toy)
    assert (result["status"], result["signal"], result["exit_code"]) == ("killed_by_other", name, None)
    assert name in result["reason"]
    assert records[-1]["signal"] == name
    if toy == "kills_itself":
        assert text_of(records, "toy") == "last words"


def test_an_exit_code_without_a_word(go):
    result, _ = go("hard_exit")
    assert (result["status"], result["exit_code"]) == ("failed", 7)
    assert "code 7" in result["reason"] and "about to leave" in result["reason"]


def test_a_child_left_behind_is_ended(go):
    result, records = go("leaves_child")
    assert result["status"] == "completed"
    assert gone_within(1, int(text_of(records, "child")))


def test_a_record_cut_off(go):
    result, records = go("half_line")
    assert result["status"] == "killed_by_other"
    assert text_of(records, "toy") == "whole"
    assert "cut off (22 bytes)" in text_of(records, "events")
    assert [r["kind"] for r in records] == ["start", "note", "note", "end"]


def test_lines_that_are_no_records_become_notes(go):
    result, records = go("garbage")
    assert result["status"] == "completed"
    notes = of(records, "note")
    assert [n["topic"] for n in notes] == ["events", "events", "events", "toy"]


def test_server_death_is_a_failed_run_and_the_next_one_works(go):
    first = client.server()
    result, records = go("child_then_kills_server")
    assert (result["status"], result["exit_code"], result["signal"]) == ("failed", None, None)
    assert "the worker server ended with code -9" in result["reason"]
    assert records[-1]["status"] == "failed"
    assert not first.alive
    result, records = go("good")
    assert result["status"] == "completed"
    assert client.server() is not first


def test_server_death_leaves_nothing_running(go, tmp_path):
    class Keep:
        def __init__(self):
            self.pids = []

        def record(self, record):
            if record["kind"] == "note" and record["topic"] in ("pids", "child"):
                self.pids.append(int(record["text"].split()[0]))

        def close(self, end): ...

    keep = Keep()
    go("child_then_kills_server", [keep])
    assert keep.pids and gone_within(3, *keep.pids)


def test_a_server_that_cannot_import_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("fp4lab.supervise.run.server", lambda: broken)
    broken = client.WorkerServer.func(modules=("no_such_module_here",))
    try:
        result = supervise(settings("good"), tmp_path, overrides=[], choices={}, trackers=[], entry="toy_worker:main")
    finally:
        broken.close()
    assert result["status"] == "failed"
    assert "No module named 'no_such_module_here'" in result["reason"]


def test_a_tracker_that_fails_is_left_out(go):
    class Bad:
        calls = 0

        def record(self, record):
            self.calls += 1
            if record["kind"] == "loss":
                raise OSError("disk full")

        def close(self, end):
            self.calls += 100

    bad = Bad()
    result, records = go("good", [bad])
    assert result["status"] == "completed" and result["loss"] == 2.25
    assert text_of(records, "tracker") == "Bad failed and is left out: OSError: disk full"
    assert len(of(records, "note")) == 1 and len(of(records, "loss")) == 2
    assert bad.calls == 3  # start, phase, the loss it failed at, nothing more


@pytest.mark.parametrize("when", ["record", "close"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_tracker_that_fails_at_the_end(tmp_path, when, first):
    class Bad:
        def record(self, record):
            if when == "record" and record["kind"] == "end":
                raise OSError("disk full")

        def close(self, end):
            raise OSError("disk full")

    trackers = [Bad(), JsonlTracker(tmp_path / "events.jsonl")]
    trackers = trackers if first else trackers[::-1]
    result = supervise(settings("good"), tmp_path, overrides=[], choices={}, trackers=trackers, entry="toy_worker:main")
    assert result["status"] == "completed"
    assert result["notes"] == ["Bad failed and is left out: OSError: disk full"]
    assert events(tmp_path)[-1]["kind"] == "end"


def test_a_killed_supervisor_takes_worker_and_server_along(supervisor, tmp_path):
    process, worker, server = supervisor("stubborn")
    process.kill()
    process.wait()
    assert gone_within(3, worker, server)
    assert not (tmp_path / "result.json").exists()
    assert events(tmp_path)[-1]["kind"] == "note"  # what was reported is on disk


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_an_interrupted_supervisor_ends_its_worker(supervisor, tmp_path, number):
    process, worker, server = supervisor("sleep")
    process.send_signal(number)
    assert process.wait(timeout=5) != 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("interrupted", 130)
    assert events(tmp_path)[-1]["status"] == "interrupted"
    assert gone_within(3, worker, server)


def test_an_interrupted_supervisor_does_not_wait_for_ever(supervisor, tmp_path):
    process, worker, server = supervisor("stubborn", term_grace_s=0.3)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=5)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["signal"]) == ("interrupted", "SIGKILL")
    assert gone_within(3, worker, server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_while_the_worker_is_being_started_waits(go, tmp_path, monkeypatch, request, number):
    """There is a worker, and nobody watches it yet: the interruption must reach it all the same."""
    enter, seen = registry.enter, []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupted(server: int, worker: int, out_dir):
        seen.append(worker)
        os.kill(os.getpid(), number)
        return enter(server, worker, out_dir)

    monkeypatch.setattr(registry, "enter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go("sleep")
    assert gone_within(1, *seen) and client.server().alive
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "interrupted" and (result["exit_code"] == 130 or result["signal"] == "SIGTERM")


def test_a_worker_hears_a_signal_from_its_first_moment_on(go, monkeypatch):
    """It inherits the server's handler, which drops SIGTERM: until it has its own, the signal waits."""
    spawn = client.WorkerServer.func.spawn  # the fixture's partial

    def at_once(self, *args):
        pid = spawn(self, *args)
        os.kill(pid, signal.SIGTERM)
        return pid

    monkeypatch.setattr(client.WorkerServer.func, "spawn", at_once)
    for _ in range(5):
        result, _ = go("slow")
        assert result["status"] == "interrupted", "the signal was dropped"


def test_a_worker_that_is_done_completed_whatever_the_guard_wanted(go, monkeypatch):
    result, _ = go("done_when_asked", wall_s=0.2)
    assert (result["status"], result["exit_code"]) == ("completed", 0)


def test_refused(tmp_path):
    result = refused(settings("good"), tmp_path / "new", ["lr=-1"], {}, "lr=-1: expected more")
    saved = json.loads((tmp_path / "new" / "result.json").read_text())
    assert saved == result
    assert (saved["status"], saved["reason"], saved["overrides"]) == ("failed", "lr=-1: expected more", ["lr=-1"])


def test_write_atomic_is_never_seen_half_written(tmp_path):
    path, stop, lengths = tmp_path / "x.json", threading.Event(), set()
    write_atomic(path, "0" * 300_000)

    def watch():
        while not stop.is_set():
            lengths.add(len(path.read_text()))

    reader = threading.Thread(target=watch)
    reader.start()
    for i in range(1, 15):
        write_atomic(path, str(i % 10) * 300_000)
    stop.set()
    reader.join()
    assert lengths == {300_000}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"status": "completed", "fingerprint": "f", "loss": 1.5}', True),
        ('{"status": "stopped", "fingerprint": "f"}', True),
        ('{"status": "goals_missed", "fingerprint": "f"}', True),
        ('{"status": "failed", "fingerprint": "f"}', False),
        ('{"status": "completed", "fingerprint": "other"}', False),
        ('{"status": "completed", "finger', False),
        ("[]", False),
        (None, False),
    ],
)
def test_finished(tmp_path, text, found):
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    assert finished(tmp_path, "f") == (json.loads(text) if found else None)
