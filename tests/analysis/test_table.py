"""Frames to tables: on the terminal and as a file."""

import io
import math

import pytest
from rich.console import Console
from sweeps import PAIRS, write_run

from fp4lab.analysis.frames import load_runs
from fp4lab.analysis.table import print_runs, reasons, sweep_table, write_summary
from fp4lab.events import Loss, Phase


@pytest.fixture
def sweep(tmp_path):
    phases = [Phase(name="start", ms=1.0, proc_rss_mib=100.0), Phase(name="forward_done", ms=40.0, proc_peak_rss_mib=300.0)]
    write_run(tmp_path / "0", ["lr=0.1", "step=dense"], [*phases, *PAIRS, Loss(loss=3.0), Loss(step=1, loss=2.5)])
    write_run(tmp_path / "2", ["lr=0.2", "step=chunked"], [*phases, Loss(loss=4.0)], None)
    with (tmp_path / "2" / "events.jsonl").open("a") as f:
        f.write('{"t": 9.0, "kind": "lo')
    write_run(tmp_path / "10", ["lr=0.3", "+new.key=[1,2]"], [Loss(loss=math.nan)], "failed", "bad [/x] in [data]")
    (tmp_path / "plots").mkdir()
    (tmp_path / "multirun.yaml").write_text("")
    return tmp_path


def rendered(table, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def test_table_has_the_swept_columns_and_every_run(sweep):
    runs = load_runs(sweep).runs
    table = sweep_table(runs, 120)
    headers = [c.header for c in table.columns]
    assert headers[:5] == ["run", "lr", "step", "new.key", "status"]
    assert table.row_count == 3
    text = rendered(table)
    assert all(len(line) <= 120 for line in text.splitlines())
    for word in ("completed", "unfinished", "failed", "0.1", "0.2", "0.3", "2.5000", "300"):
        assert word in text


def test_table_shows_text_in_brackets(sweep):
    assert "[1,2]" in rendered(sweep_table(load_runs(sweep).runs, 200), 200)


def test_brackets_that_look_like_markup_break_nothing(tmp_path):
    write_run(tmp_path / "0", ["prompt=[/x]", "task.prompts=[hi]"], [])
    write_run(tmp_path / "1", ["prompt=x", "task.prompts=[hi]"], [])  # prompts: the same in all, so in the caption
    text = rendered(sweep_table(load_runs(tmp_path).runs, 200), 200)
    assert "[/x]" in text and "[hi]" in text


def test_a_sweep_over_the_kind_of_loss_keeps_its_column(tmp_path):
    write_run(tmp_path / "0", ["loss=ce"], [Loss(loss=3.0)])
    write_run(tmp_path / "1", ["loss=scalar"], [Loss(loss=9.0)])
    runs = load_runs(tmp_path).runs
    assert list(runs["loss"]) == [3.0, 9.0]
    text = rendered(sweep_table(runs))
    assert "ce" in text.split() and "scalar" in text.split()


def test_table_of_runs_that_know_nothing(tmp_path):
    write_run(tmp_path / "0", [], [], None)
    assert "unfinished" in rendered(sweep_table(load_runs(tmp_path).runs))
    write_run(tmp_path / "1", [], [Loss(loss=1.0, split="eval", trained=False)])
    last = rendered(sweep_table(load_runs(tmp_path).runs)).splitlines()[-1].split()
    assert last[:4] == ["1", "completed", "1.0000", "no"]


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_narrow_table_does_without_columns_but_never_without_the_loss(sweep, width):
    table = sweep_table(load_runs(sweep).runs, width)
    headers = [c.header for c in table.columns]
    assert {"run", "lr", "status", "loss"} <= set(headers)
    assert ("slowest phase" in headers) == (width >= 120)
    rendered(table, width)


def test_printed_runs_name_their_reasons(sweep):
    out = io.StringIO()
    print_runs(load_runs(sweep).runs, Console(file=out, width=120))
    assert "run 10: failed: bad [/x] in [data]\n" in out.getvalue() and "\x1b" not in out.getvalue()


def test_reasons_and_summary_file(sweep):
    runs = load_runs(sweep).runs
    assert [line.split(":")[0] for line in reasons(runs)] == ["run 2", "run 10"]
    lines = write_summary(runs, sweep).read_text().splitlines()
    assert len(lines) == 4 and "lr" in lines[0].split(",")
    assert load_runs(sweep).runs.equals(runs)  # the file is taken for no run


def test_best_and_worst_of_what_ended_well(tmp_path):
    for at, (loss, mib) in enumerate([(2.0, 300.0), (1.0, 200.0), (3.0, 200.4)]):
        write_run(tmp_path / str(at), [f"seed={at}"], [Phase(name="start", proc_rss_mib=mib), Loss(loss=loss)])
    write_run(tmp_path / "3", ["seed=3"], [Phase(name="start", proc_rss_mib=9.0), Loss(loss=0.1)], "oom", "no more")
    text = rendered(sweep_table(load_runs(tmp_path).runs))
    assert [word for word in text.split() if word[-1] in "*!" and word[:-1]] == ["300!", "1.0000*", "200*", "3.0000!", "200*"]
    assert "0.1000 " in text and "* best, ! worst" in text
    assert reasons(load_runs(tmp_path).runs) == ["run 3: oom after start: no more"]
