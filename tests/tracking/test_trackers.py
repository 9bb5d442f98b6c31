"""Trackers: the file, the terminal, wandb offline, and the bundle that none of them can break."""

import io
import json
import math
import time
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from fp4lab.analysis.rows import RunRow
from fp4lab.encoding import decode
from fp4lab.events import (
    End,
    File,
    FirstToken,
    FirstTokenDiff,
    Guard,
    Loss,
    Note,
    Phase,
    Progress,
    Sample,
    Start,
    Turn,
    to_record,
)
from fp4lab.tracking.base import Fanout
from fp4lab.tracking.console import ConsoleTracker, memory_text
from fp4lab.tracking.jsonl import JsonlTracker
from fp4lab.tracking.wandb import WandbTracker, lowered
from fp4lab.tracking.wandb_file import read_records
from fp4lab.tracking.wandb_view import options

WALL = "2026-01-01T00:00:00.000+00:00"


def record(event, t: float = 0.0) -> dict:
    return {"t": t, "wall": WALL, **to_record(event)}


# the file


def test_a_line_can_be_read_while_the_file_is_open(tmp_path):
    path = tmp_path / "deep" / "events.jsonl"
    tracker = JsonlTracker(path)
    tracker.record(record(Note(text="first")))
    assert path.read_text().endswith("\n") and decode(path.read_text())["text"] == "first"
    tracker.record(record(Note(text="x" * 100_000)))
    assert [len(decode(line)["text"]) for line in path.read_text().splitlines()] == [5, 100_000]
    tracker.close({})


def test_non_finite_numbers_come_back(tmp_path):
    tracker = JsonlTracker(tmp_path / "e.jsonl")
    tracker.record(record(Loss(loss=math.nan, grad_norm=math.inf)))
    tracker.close({})
    text = (tmp_path / "e.jsonl").read_text()
    json.loads(text, parse_constant=pytest.fail)
    back = decode(text)
    assert math.isnan(back["loss"]) and back["grad_norm"] == math.inf


def test_text_is_utf8_and_one_line(tmp_path):
    tracker = JsonlTracker(tmp_path / "e.jsonl")
    tracker.record(record(Note(text="你是誰\nline two\u2028three")))
    tracker.close({})
    data = (tmp_path / "e.jsonl").read_bytes()
    assert data.count(b"\n") == 1 and "你是誰".encode() in data
    assert decode(data.decode())["text"] == "你是誰\nline two\u2028three"


def test_progress_is_not_recorded(tmp_path):
    tracker = JsonlTracker(tmp_path / "e.jsonl")
    tracker.record(record(Progress("w", 1, 2)))
    tracker.close({})
    assert (tmp_path / "e.jsonl").read_text() == ""


# the bundle


class Spy:
    def __init__(self, fail_at: str | None = None):
        self.seen: list[str] = []
        self.fail_at = fail_at

    def record(self, r):
        self.seen.append(r["kind"])
        if r["kind"] == self.fail_at:
            raise RuntimeError("no")

    def close(self, end):
        self.record({"kind": "close"})


def test_fanout_hands_everything_to_all():
    spies, notes = [Spy(), Spy()], []
    fanout = Fanout(spies, lambda *n: notes.append(n))
    fanout.record({"kind": "a"})
    fanout.close({})
    assert [s.seen for s in spies] == [["a", "close"]] * 2 and notes == []


@pytest.mark.parametrize("at", [0, 1, 2])
def test_fanout_drops_the_one_that_fails_and_says_so_once(at):
    spies = [Spy("b" if i == at else None) for i in range(3)]
    notes: list[tuple[str, str]] = []
    fanout = Fanout(spies, lambda *n: notes.append(n))
    for kind in "abc":
        fanout.record({"kind": kind})
    fanout.close({})
    assert [s.seen for s in spies] == [["a", "b"] if i == at else ["a", "b", "c", "close"] for i in range(3)]
    assert notes == [("tracker", "Spy failed and is left out: RuntimeError: no")]


def test_fanout_does_not_swallow_an_interruption():
    class Interrupted:
        def record(self, r):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Fanout([Interrupted()], lambda *n: None).record({"kind": "a"})


# the terminal

SHOWN = [
    Start(task="step"),
    File(role="weights", path="a[/b].dat", format="dat", bytes=3, sha256="ab" * 32),
    Note(topic="t", text="choose [red] or [/x]"),
    Phase(name="start", ms=None, proc_rss_mib=10.0, proc_peak_rss_mib=12.0),
    Phase(name="model_loaded", ms=3.0, torch_allocated_mib=7.0, torch_peak_mib=8.0, proc_rss_mib=10.0),
    Phase(name="batch_ready", ms=1.0),
    Sample(proc_rss_mib=1.0),
    Loss(step=1, loss=math.nan, grad_norm=math.inf, tokens=5),
    Loss(step=2, loss=2.5),
    FirstToken(path="A.infer", top10=[(1, 2.0, "[bold]"), (2, 1.0, "\n")]),
    FirstTokenDiff(pair="A-C", top1_equal=True, max_abs_logit=0.0, kl=0.0),
    FirstTokenDiff(pair="A-R", top1_equal=False, max_abs_logit=0.5, kl=0.25),
    Turn(path="A.infer", prompt="[hi]", text="[/there]"),
    Progress("w", 1, 2),
    Guard(reason="too [much]"),
    End(status="failed", reason="KeyError: [/x]", seconds=1.25),
]


def shown(**options) -> str:
    out = io.StringIO()
    tracker = ConsoleTracker("run [1/2]", Console(file=out, highlight=False, soft_wrap=True, **options))
    for event in SHOWN:
        tracker.record(record(event))
    tracker.close({})
    return out.getvalue()


def test_a_file_gets_no_colour_codes():
    text = shown()
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "run [1/2]"
    assert "choose [red] or [/x]" in text and "too [much]" in text and "a[/b].dat" in text and "[hi] -> [/there]" in text
    assert lines[-1] == "  failed: KeyError: [/x] (1.25 s)"
    assert "10.0 MiB resident, peak     12.0 MiB" in text and "7.0 MiB allocated, peak      8.0 MiB" in text
    assert "memory unknown" in text and "loss nan" in text and "loss 2.500000" in text
    assert "A-R (before): other top-1, KL 2.50e-01" in text and "A-C" not in text  # equal pairs are silent
    assert len(lines) == 1 + len(SHOWN) - 4  # start, sample, the equal pair and progress say nothing


def test_a_terminal_gets_them():
    assert "\x1b[" in shown(force_terminal=True, color_system="standard")


def test_a_bar_appears_on_a_terminal_only_after_a_while():
    def bar(seconds: float, **options) -> str:
        out = io.StringIO()
        tracker = ConsoleTracker("t", Console(file=out, **options))
        tracker.record(record(Progress("packing", 1, 9), t=0.0))
        tracker.record(record(Progress("packing", 2, 9), t=seconds))
        tracker.close({})
        return out.getvalue()

    assert "packing" in bar(3.0, force_terminal=True)
    assert "packing" not in bar(1.0, force_terminal=True)
    assert "packing" not in bar(3.0)


def test_memory_text_prefers_the_device():
    assert memory_text({"torch_allocated_mib": 1.0, "torch_peak_mib": 2.0, "proc_rss_mib": 9.0}).endswith("peak      2.0 MiB")
    assert memory_text({"proc_rss_mib": 9.0}) == "     9.0 MiB resident"


# wandb


def when_written(path: Path, seconds: float = 10.0) -> list:
    """The records, once the last is there: wandb's own process writes on for a moment after finish()."""
    deadline = time.monotonic() + seconds
    while True:
        records = list(read_records(path))
        if any(r.WhichOneof("record_type") == "exit" for r in records):
            return records
        assert time.monotonic() < deadline, f"{path} was not finished: {len(records)} records"
        time.sleep(0.05)


def history(records: list) -> list[dict]:
    rows = []
    for r in records:
        if r.WhichOneof("record_type") == "history":
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item})
    return rows


CONFIG = {"tracker": {"project": "fp4lab-test", "name": "offline", "group": "group"}, "task": {"name": "step"}, "seed": 7}


@pytest.fixture(scope="module")
def wandb_runs(tmp_path_factory):
    """Two jobs of one process, the first failed; run name -> the records of its file, and the folders."""
    home = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CACHE", "CONFIG", "DATA"):
            patch.setenv(f"WANDB_{name}_DIR", str(home / name.lower()))
        for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_NAME", "WANDB_SILENT"):
            patch.delenv(name, raising=False)
        for name, status, losses in (("job0", "failed", [5.0, 4.0]), ("job1", "completed", [1.0])):
            told = options({**CONFIG, "lr": len(losses)}, {"tag": "x"}, name, None)
            tracker = WandbTracker(home / "runs", "offline", told, RunRow())
            tracker.record(record(Start(task="step", run_id=f"id-of-{name}")))
            tracker.record(record(Phase(name="start", ms=2.0, proc_rss_mib=11.0)))
            for step, loss in enumerate(losses):
                tracker.record(record(Loss(step=step, loss=loss)))
            tracker.record(record(FirstTokenDiff(pair="A-C", kl=0.5, top1_equal=True)))
            end = record(End(status=status, reason=f"because of {name}"))
            tracker.record(end)
            tracker.close(end)
    folders = sorted((home / "runs").glob("wandb/offline-run-*"))
    found = {}
    for folder in folders:
        (file,) = folder.glob("*.wandb")
        records = when_written(file)
        (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        found[run.display_name] = (run, records)
    return folders, found


def test_every_job_is_an_offline_run_of_its_own(wandb_runs):
    folders, found = wandb_runs
    assert len(folders) == 2 and sorted(found) == ["job0", "job1"]
    runs = [run for run, _ in found.values()]
    assert {r.run_id for r in runs} == {"id-of-job0", "id-of-job1"}, "the ids of their records"
    for run in runs:
        assert (run.project, run.run_group, run.job_type, list(run.tags)) == ("fp4lab-test", "group", "step", ["tag=x"])


@pytest.mark.parametrize(
    ("name", "losses", "code", "status"), [("job0", [5.0, 4.0], 1, "failed"), ("job1", [1.0], 0, "completed")]
)
def test_a_job_has_its_own_data_and_exit_code(wandb_runs, name, losses, code, status):
    run, records = wandb_runs[1][name]
    config = {u.key: json.loads(u.value_json) for u in run.config.update}
    assert config["seed"] == 7 and config["lr"] == len(losses)
    rows = history(records)
    assert [r["loss/train"] for r in rows if "loss/train" in r] == losses
    assert [r["phase/proc_rss_mib"] for r in rows if "phase/name" in r] == [11.0]
    exits = [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]
    assert exits == [code]
    updates = [u for r in records if r.WhichOneof("record_type") == "summary" for u in r.summary.update]
    summary = {u.key or "/".join(u.nested_key): json.loads(u.value_json) for u in updates}
    assert summary["status"] == status and summary["reason"] == f"because of {name}"
    assert (summary["result/loss"], summary["result/peak_mib"], summary["result/worst_kl"]) == (losses[-1], 11.0, 0.5)
    assert "result/ms_per_token" not in summary, "what is unknown cannot be optimised"
    assert rows[0]["_timestamp"] == datetime.fromisoformat(WALL).timestamp()
    metrics = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    axes = {m.glob_name: m.step_metric for m in metrics if m.glob_name}
    assert axes["loss/*"] == "loss/step" and axes["phase/*"] == "phase/index" and axes["memory/*"] == "memory/seconds"


def test_a_wandb_that_cannot_start_raises_at_the_next_call(tmp_path):
    tracker = WandbTracker(tmp_path, "no such mode", options(CONFIG, {}, "x", None), RunRow())
    tracker.record(record(Start()))
    with pytest.raises(Exception, match="no such mode"):
        tracker.close(record(End(status="completed")))


@pytest.mark.parametrize(
    ("asked", "mode", "used"),
    [
        ("", "online", "online"),
        ("offline", "online", "offline"),
        ("disabled", "online", "disabled"),
        ("online", "offline", "offline"),
        ("disabled", "offline", "disabled"),
    ],
)
def test_wandb_mode_can_only_ask_for_less(monkeypatch, asked, mode, used):
    monkeypatch.setenv("WANDB_MODE", asked)
    assert lowered(mode) == used


def test_a_fault_is_said_with_what_was_expected_and_where(tmp_path):
    out = io.StringIO()
    tracker = ConsoleTracker("t", Console(file=out, width=200, force_terminal=False))
    diff = FirstTokenDiff(pair="A-B", kl=7.5, max_abs_logit=3.0, expected_kl=1e-6, why="same codes", fault=True)
    diff.first_divergent_layer = 2
    tracker.record(record(diff))
    tracker.record(record(FirstTokenDiff(pair="A-C", top1_equal=True, max_abs_logit=0.0)))
    tracker.close(record(End(status="completed")))
    text = out.getvalue()
    assert "FAULT A-B: expected KL <= 1.0e-06 (same codes), apart from layer 2 on" in text
    assert "A-C" not in text
