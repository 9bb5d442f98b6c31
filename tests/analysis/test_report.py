"""The report: one file that needs nothing else, of one run, of many, and of runs that were all killed."""

import math
import re
from html.parser import HTMLParser

import pytest
from sweeps import PAIRS, write_run

from fp4lab.analysis.frames import load_runs
from fp4lab.analysis.report import command, report, write_report
from fp4lab.errors import UserError
from fp4lab.events import File, FirstToken, Guard, LayerDiff, Loss, Phase, Sample, StateHealth, Turn

MADE_OF = {
    "config": {"seed": 41, "guard": {"limit_gb": 0.25}, "loss": "ce"},
    "versions": {"torch": "2.13.0"},
    "host": {"cpu": "an <abacus>"},
    "devices": ["NVIDIA H200 (0)"],
    "git_commit": "c0ffee",
    "git_dirty": True,
    "git_diff": "--- a/x\n+if a < b && c:\n",
    "run_id": "abcd1234",
}


def tops(first: str) -> list:
    return [(len(first) + i, 9.0 - i, f"{first}{i}") for i in range(10)]


def make(folder, count: int, killed: bool = False) -> None:
    for n in range(count):
        t = [
            Phase(name="model_loaded", ms=10.0, proc_rss_mib=100.0 + n, proc_peak_rss_mib=120.0, source="rss"),
            FirstToken(path="A.infer", prompt="hi <b>", top10=tops("Hello")),
            FirstToken(path="B.fp2_ste", prompt="hi <b>", top10=tops("Hi" if n % 2 else "Hello"), hidden_nan=n % 3),
            *PAIRS,
            File(role="weights", path="m.dat", format="dat", bytes=12345, sha256="ab" * 32),
            Sample(proc_rss_mib=200.0 + n),
        ]
        if killed:
            t.append(Guard(verdict="breach", reason="too much", reading_mib=300.0, limit_mib=256.0))
        else:
            t += [Loss(step=i, loss=3.0 - i) for i in range(3)] + [Loss(step=3, loss=math.nan)]
            t += [StateHealth(step=i, code_changed=0.1, zero_scale={"w": 0.0}) for i in range(1, 3)]
            t += [LayerDiff(pair="A-B", layer=i, relative_error=0.1 * i, expected=0.05) for i in range(3)]
            t += [Turn(n=0, first_token_ms=5.0, ms_per_token=1.0)]
        options = [f"step.chunk_rows={16 * (1 + n % 3)}", f"seq_len={8 * (1 + n // 3)}", "prompt=a b"]
        status, reason = ("guard_killed", "300 MiB used (resident set)") if killed else ("completed", "")
        write_run(folder / str(n), options, t, status, reason, task="step", **MADE_OF)


class Checker(HTMLParser):
    """Tags that are opened are closed, ids are unique and what is referred to exists."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.used: set[str] = set()

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            self.ids += [value] if name == "id" else []
            self.used |= set(re.findall(r"url\(#([^)]+)\)", value or ""))
            if name in ("src", "href", "xlink:href") and not value.startswith("data:"):
                assert value.startswith("#"), (tag, name, value)
                self.used.add(value[1:])
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(text: str) -> str:
    checker = Checker()
    checker.feed(text)
    assert checker.open == [] and len(checker.ids) == len(set(checker.ids)) and checker.used <= set(checker.ids)
    style = text[text.index("<style>") : text.index("</style>")]
    assert (
        "prefers-color-scheme: dark" in style and "@media print" in style and "@import" not in text and "url(http" not in text
    )
    assert set(re.findall(r"var\((--\w+)\)", text)) <= set(re.findall(r"(--\w+):", style)), "a variable that is not set"
    return text


@pytest.mark.parametrize(("count", "killed"), [(1, False), (6, False), (16, False), (1, True), (6, True)])
def test_one_file_that_needs_nothing_else(tmp_path, count, killed):
    make(tmp_path, count, killed)
    path = write_report(tmp_path)
    text = checked(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "report.html" and text.count('aria-label="Memory of each run') == 1
    assert ("Peak memory</h2>" in text) == (count > 1), "a heatmap needs something swept"
    assert ("Loss</h2>" in text) == (not killed) and ("State health</h2>" in text) == (not killed)
    assert text.count("guard limit 256 MiB: the line") == (count > 1)
    assert text.count("&#x27;prompt=a b&#x27;") == count and "seed 41" in text and "ab" * 32 in text
    assert text.count("if a &lt; b &amp;&amp; c:") == 1, "what all runs share is there once"
    assert "an &lt;abacus&gt;" in text and "NVIDIA H200 (0)" in text and "hi &lt;b&gt;" in text
    assert ("≠ &#x27;Hi0&#x27;" in text) == (count > 1), "only odd runs have another token on path B"
    if killed:
        assert text.count("300 MiB used (resident set)") >= count and ("✕ guard<" in text) == (count > 1)


def test_the_same_records_give_the_same_text(tmp_path):
    make(tmp_path, 3)
    assert report(load_runs(tmp_path), "x") == report(load_runs(tmp_path), "x")


def test_figures_as_png(tmp_path):
    make(tmp_path, 4)
    write_report(tmp_path, png=True)
    names = {p.stem for p in (tmp_path / "plots").iterdir()}
    expected = {"memory_heatmap", "memory_over_time", "loss_curves", "first_tokens", "layer_divergence", "state_health"}
    assert names == {*expected, "turn_latencies"}
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in (tmp_path / "plots").iterdir())
    assert len(load_runs(tmp_path).runs) == 4, "the pictures' folder is taken for no run"


def test_runs_that_know_nothing(tmp_path):
    write_run(tmp_path / "0", ["lr=1"], [], None)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "result.json").write_text('{"status": "failed", "reason": "lr=-1: too low", "overrides": ["lr=-1"]}')
    text = checked(write_report(tmp_path).read_text())
    assert "it was refused before it began" in text and "unknown: not in a git repository" in text and "lr=-1: too low" in text
    with pytest.raises(UserError):
        write_report(tmp_path / "nowhere")


def test_the_command_can_be_typed():
    start = {"task": "step", "overrides": ["prompt=who are you", "task.prompts=[a,b]", "+experiment=x"]}
    assert command(start) == "python run.py 'prompt=who are you' 'task.prompts=[a,b]' +experiment=x"
