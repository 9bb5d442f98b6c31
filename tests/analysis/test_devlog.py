"""Verdicts on the reference log's rows, from records; and the report in its four forms."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from fp4lab.analysis import devlog, devlog_report
from fp4lab.analysis.devlog import Comparison, Finding, judge
from fp4lab.analysis.measures import MEASURES, Run
from fp4lab.encoding import encode
from fp4lab.errors import UserError
from fp4lab.events import End, FirstToken, Guard, Loss, Phase, Start, StateHealth, Turn, to_record

ROOT = Path(__file__).parents[2]
C = Comparison("x", "?", {})
LOG = pd.Series({"peak_mib": 111457.0, "step_ms": 86000.0})


def run(*events, status="completed", **options) -> Run:
    records = [to_record(e) for e in (Start(overrides=[]), *events, End(status=status))]
    return Run("folder", "devlog_x", {"model": "qwen3_4b", **options}, records)


def peak(mib: float) -> Phase:
    return Phase(name="optimizer_step_done", torch_allocated_mib=mib, torch_peak_mib=mib)


@pytest.mark.parametrize(
    ("status", "verdict"), [("guard_killed", "reproduced"), ("oom", "reproduced"), ("completed", "better"), ("failed", None)]
)
def test_a_death_that_does_not_happen_is_better(status, verdict):
    row = {"run": {}, "saw": {"died": True}, "right": {"died": False}}
    found = judge("S38", row, [run(status=status)], LOG, C)
    assert found.verdict == (verdict or "not reproducible here")
    assert verdict is not None or "ended before (failed)" in found.why


def test_what_is_neither_as_there_nor_right_differs_or_cannot_be_had():
    row = {"run": {}, "saw": {"died": False}}
    killed = [run(status="guard_killed")]
    assert judge("S41", row, killed, LOG, C).verdict == "different"
    found = judge("S41", {**row, "else": "one memory"}, killed, LOG, C)
    assert (found.verdict, found.why) == ("not reproducible here", "one memory")


@pytest.mark.parametrize(
    ("mib", "verdict", "words"),
    [(35322.6, "better", "3.2 times less"), (108000.0, "reproduced", "as there"), (222914.0, "worse", "2.0 times more")],
)
def test_figures_are_held_against_the_logs(mib, verdict, words):
    found = judge("S38", {"run": {}, "less": {"peak_mib": None}}, [run(peak(mib))], LOG, C)
    assert found.verdict == verdict and words in found.here and "log: peak 111,457 MiB" in found.here


def test_the_worst_of_several_findings_counts():
    row = {"run": {}, "saw": {"died": True}, "right": {"died": False}, "less": {"peak_mib": None, "step_ms": None}}
    found = judge("L3b", row, [run(peak(35000.0), Loss(loss=1.0, ms=290_000.0))], LOG, C)
    assert found.verdict == "worse" and "3.2 times less" in found.here and "3.4 times more" in found.here


def test_figures_of_another_model_are_shown_and_not_judged():
    small = [run(peak(291.0), model="tiny")]
    assert judge("S38", {"run": {}, "less": {"peak_mib": None}}, small, LOG, C).verdict == "not reproducible here"
    found = judge("S38", {"run": {}, "saw": {"died": False}, "less": {"peak_mib": None}}, small, LOG, C)
    assert found.verdict == "reproduced" and "peak 291 MiB on the tiny model" in found.here
    found = judge("S38", {"run": {}, "saw": {"died": False}, "only": "why"}, small, LOG, C)
    assert found.verdict == "not reproducible here" and found.why == "judged on Qwen3-4B alone: why"


def test_no_run_is_said():
    found = judge("S38", {"run": {"seq_len": 32}, "saw": {"died": True}}, [], LOG, C)
    assert (found.verdict, found.why) == ("not run", "no run of devlog_x with seq_len=32")


def test_runs_are_matched_by_their_options_scaled_where_the_model_is_small():
    row = {"run": {"step.chunk_rows": 16, "flag": "true", "lr": 8e-5}}
    given = {"flag": "True".lower(), "lr": "8e-05"}
    scale = {"step.chunk_rows": 128}
    assert devlog.answers(run(**given, **{"step.chunk_rows": "16"}), row, scale)
    assert not devlog.answers(run(**given, **{"step.chunk_rows": "2048"}), row, scale)
    assert devlog.answers(run(model="tiny", **given, **{"step.chunk_rows": "2048"}), row, scale)
    assert not devlog.answers(run(model="tiny", **{"step.chunk_rows": "2048"}), row, scale)


def turns(*seconds: float, cached: int = 5):
    return [Turn(n=n, seconds=s, cache_len=cached, context_tokens=5) for n, s in enumerate(seconds)]


@pytest.mark.parametrize(
    ("name", "events", "expected"),
    [
        ("stalled", turns(5, 5, 40, 5), True),
        ("stalled", turns(5, 5, 6, 5), False),
        ("stalled", turns(5), None),
        ("later_turns_slower", turns(4.1, 0.54, 0.55), False),
        ("slowest_turn_s", turns(4.1, 0.54, 0.55), 4.1),
        ("cache_is_context", turns(1, 2), True),
        ("cache_is_context", turns(1, 2, cached=4), False),
        ("b_finite", [FirstToken(path="B.fp2_ste", logits_nan=3)], False),
        ("b_finite", [FirstToken(path="A.infer", logits_nan=3)], None),
        ("codes_moved", [StateHealth(code_changed=0.0)], False),
        ("codes_moved", [StateHealth(code_changed=None)], None),
        ("diverged", [Loss(loss=math.nan)], True),
        ("diverged", [Loss(loss=2.0)], False),
        ("guard_blind", [Phase(name="start", proc_rss_mib=100.0)], False),
        ("guard_blind", [Phase(name="start", torch_allocated_mib=1.0, proc_rss_mib=100.0, pid_mem_mib=None)], True),
        ("peak_mib", [Phase(name="a", proc_peak_rss_mib=7.0), Phase(name="b", proc_peak_rss_mib=5.0)], 7.0),
        ("peak_mib", [Guard(verdict="warning")], None),
    ],
)
def test_measures(name, events, expected):
    assert MEASURES[name](run(*events)) == expected


def test_the_peak_of_a_killed_run_is_the_supervisors():
    records = [to_record(Phase(name="a", proc_peak_rss_mib=7.0)), to_record(End(status="oom", peaks={"proc_rss_mib": 9.0}))]
    assert MEASURES["peak_mib"](Run("", "", {}, records)) == 9.0


@pytest.fixture
def results(tmp_path):
    """Two runs of one sweep, as the driver leaves them; one is cut off by a kill of its supervisor."""
    for n, bad in enumerate(("True", "False")):
        folder = tmp_path / f"first_token/{n}"
        folder.mkdir(parents=True)
        overrides = ["+experiment=devlog_first_token", f"quirk.scale_bytes_undecoded={bad}"]
        start = {**to_record(Start(overrides=overrides, versions={"torch": "2.13.0"}, host={"cores": 2})), "t": 0}
        token = {**to_record(FirstToken(path="B.fp2_ste", logits_nan=4096 if bad == "True" else 0)), "t": 1}
        lines = [encode({"wall": "2026-11-23T10:00:00.000+00:00", **r}) for r in (start, token)]
        (folder / "events.jsonl").write_text("\n".join(lines) + ('\n{"kind": "ph' if n else "\n"), encoding="utf-8")
    return tmp_path


def test_a_folder_of_sweeps_and_a_sweep_are_the_same(results):
    assert len(devlog.load([results])) == len(devlog.load([results / "first_token"])) == 2
    assert len(devlog.load([results, results / "first_token"])) == 2


@pytest.mark.parametrize("suffix", [".md", ".html", ".json", None])
def test_report(results, suffix, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    out = None if suffix is None else tmp_path / f"made/report{suffix}"
    devlog_report.report([results], out)
    text = capsys.readouterr().out if out is None else out.read_text(encoding="utf-8")
    if suffix == ".json":
        found = {f["id"]: Finding(**f) for f in json.loads(text)}
        assert len(found) == 75 and found["S3"].verdict == found["S8"].verdict == "reproduced"
        return
    assert "reproduced" in text and "not run" in text and "111141 MiB" in text
    assert "tiny on 2 CPU cores, torch 2.13.0, 2 runs, 2026-11-23" in text
    if suffix == ".html":
        assert "http" not in text.split("</head>")[1], "it needs nothing from elsewhere"
        depth = Balanced()
        depth.feed(text)
        assert depth.open == []


class Balanced(HTMLParser):
    """Tags that were opened and not closed."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("question: a\nrows: {S1: {saww: {}}}", r"bad.yaml: S1: key saww: expected one of .*saw"),
        ("question: a\nrows: {S1: {saw: {dead: true}}}", r"bad.yaml: S1: measure dead: expected one of .*died"),
        ("question: a\nrows: {}\nwhy: b", r"bad.yaml: key why: expected one of .*question"),
    ],
)
def test_a_bad_comparison_is_refused(tmp_path, text, words):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        devlog.catalogue(tmp_path)


def test_folders_without_such_runs_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="no such folder"):
        devlog.load([tmp_path / "absent"])
    with pytest.raises(UserError, match=r"no runs of \+experiment=devlog_\*; make some with python experiments/run_devlog.py"):
        devlog.load([tmp_path])
    with pytest.raises(UserError, match=r"report.txt: expected a name that ends with .md, .html, .json"):
        devlog_report.report([tmp_path], tmp_path / "report.txt")
    with pytest.raises(UserError, match="repository's folder"):
        devlog.log_rows(tmp_path / "devlog.csv")
