"""Run folders to frames and tables, killed runs included."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from fp4lab.analysis.frames import agreement, load_events, load_runs, read_events, read_result, run_folders
from fp4lab.analysis.table import print_runs, reasons, sweep_table, write_summary
from fp4lab.errors import UserError
from fp4lab.events import End, FirstTokenDiff, Loss, Note, Phase, Start, encode, to_record
from fp4lab.supervise.summary import Summary


def write_run(folder: Path, overrides: list[str], events: list, status: str | None = "completed", **more) -> None:
    """A run as the supervisor leaves it; no result.json with status None."""
    folder.mkdir(parents=True)
    summary = Summary()
    records = [
        {"t": float(i), "wall": "w", **to_record(e)}
        for i, e in enumerate([Start(overrides=overrides), *events, *([End(status=status)] if status else [])])
    ]
    for record in records:
        summary.add(record)
    (folder / "events.jsonl").write_text("".join(encode(r) + "\n" for r in records))
    if status:
        result = {"status": status, "reason": "", "overrides": overrides, "seconds": 1.5, **summary.result(), **more}
        (folder / "result.json").write_text(encode(result))


PAIRS = [
    FirstTokenDiff(pair="A-B", top1_equal=True, kl=0.001),
    FirstTokenDiff(pair="A-C", top1_equal=True, kl=0.0),
    FirstTokenDiff(pair="A-R", top1_equal=False, kl=0.25),
]


@pytest.fixture
def sweep(tmp_path):
    phases = [Phase(name="start", ms=1.0, proc_rss_mib=100.0), Phase(name="forward_done", ms=40.0, proc_peak_rss_mib=300.0)]
    write_run(tmp_path / "0", ["lr=0.1", "step=dense"], [*phases, *PAIRS, Loss(loss=3.0), Loss(step=1, loss=2.5)])
    write_run(tmp_path / "2", ["lr=0.2", "step=chunked"], [*phases, Loss(loss=4.0)], None)
    with (tmp_path / "2" / "events.jsonl").open("a") as f:
        f.write('{"t": 9.0, "kind": "lo')
    write_run(tmp_path / "10", ["lr=0.3", "+new.key=[1,2]"], [Loss(loss=math.nan)], "failed", reason="bad [/x] in [data]")
    (tmp_path / "plots").mkdir()
    (tmp_path / "multirun.yaml").write_text("")
    return tmp_path


def rendered(table, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def test_rows_in_the_order_of_their_numbers(sweep):
    runs = load_runs(sweep)
    assert list(runs["run"]) == ["0", "2", "10"]
    assert list(runs["status"]) == ["completed", "unfinished", "failed"]
    assert list(runs["lr"]) == ["0.1", "0.2", "0.3"]
    assert list(runs["step"])[:2] == ["dense", "chunked"] and runs["new.key"][2] == "[1,2]"


def test_a_completed_run(sweep):
    row = load_runs(sweep).iloc[0]
    assert (row["loss"], row["first_loss"], row["seconds"]) == (2.5, 3.0, 1.5)
    assert (row["peak_mib"], row["peak_of"]) == (300.0, "resident")
    assert (row["slowest_phase"], row["slowest_ms"], row["last_phase"]) == ("forward_done", 40.0, "forward_done")
    assert row["first_token"] == "A=B=C≠R" and (row["worst_kl"], row["worst_pair"]) == (0.25, "A-R")
    assert row["trained"]


def test_a_run_without_result_is_told_from_its_events(sweep):
    result = read_result(sweep / "2")
    assert result["status"] == "unfinished" and "no result.json" in result["reason"]
    assert result["overrides"] == ["lr=0.2", "step=chunked"]
    assert (result["loss"], result["seconds"]) == (4.0, 3.0)
    assert result["peaks"]["proc_rss_mib"] == 100.0


def test_half_a_result_is_no_result(sweep):
    path = sweep / "0" / "result.json"
    path.write_text(path.read_text()[:40])
    assert read_result(sweep / "0")["status"] == "unfinished"


def test_a_cut_last_line_is_left_out(sweep):
    assert [r["kind"] for r in read_events(sweep / "2")] == ["start", "phase", "phase", "loss"]
    assert read_events(sweep / "plots") == []


def test_nan_loss_is_a_float(sweep):
    assert math.isnan(load_runs(sweep)["loss"][2]) and load_runs(sweep)["loss"].dtype == float


def test_one_run_is_a_sweep_of_one(sweep):
    assert run_folders(sweep / "10") == [sweep / "10"]
    assert len(load_runs(sweep / "10")) == 1


@pytest.mark.parametrize("name", ["plots", "missing", "multirun.yaml"])
def test_no_runs_is_the_users_error(sweep, name):
    with pytest.raises(UserError, match=name):
        load_runs(sweep / name)


def test_events_of_all_runs(sweep):
    losses = load_events(sweep, "loss")
    assert list(losses["run"]) == ["0", "0", "2", "10"] and list(losses["loss"])[:3] == [3.0, 2.5, 4.0]
    assert set(load_events(sweep)["kind"]) == {"start", "phase", "first_token_diff", "loss", "end"}


@pytest.mark.parametrize(
    ("equal", "different", "text"),
    [
        ([], [], ""),
        (["A-B", "A-C", "A-R", "B-C", "B-R", "C-R"], [], "A=B=C=R"),
        (["A-B", "A-C", "B-C"], ["A-R", "B-R", "C-R"], "A=B=C≠R"),
        (["A-C"], ["A-B", "B-C"], "A=C≠B"),
        (["A-R", "B-C"], ["A-B", "A-C", "B-R", "C-R"], "A=R≠B=C"),
        ([], ["A-B", "A-C", "B-C"], "A≠B≠C"),
        ([], ["A-R"], "A≠R"),
    ],
)
def test_agreement(equal, different, text):
    assert agreement({**{p: {"top1_equal": True} for p in equal}, **{p: {"top1_equal": False} for p in different}}) == text


def test_table_has_the_swept_columns_and_every_run(sweep):
    runs = load_runs(sweep)
    table = sweep_table(runs, 120)
    headers = [c.header for c in table.columns]
    assert headers[:5] == ["run", "lr", "step", "new.key", "status"]
    assert table.row_count == 3
    text = rendered(table)
    assert all(len(line) <= 120 for line in text.splitlines())
    for word in ("completed", "unfinished", "failed", "0.1", "0.2", "0.3", "2.5000", "300"):
        assert word in text


def test_table_shows_text_in_brackets(sweep):
    assert "[1,2]" in rendered(sweep_table(load_runs(sweep), 200), 200)


def test_brackets_that_look_like_markup_break_nothing(tmp_path):
    write_run(tmp_path / "0", ["prompt=[/x]", "task.prompts=[hi]"], [])
    write_run(tmp_path / "1", ["prompt=x", "task.prompts=[hi]"], [])  # prompts: the same in all, so in the caption
    text = rendered(sweep_table(load_runs(tmp_path), 200), 200)
    assert "[/x]" in text and "[hi]" in text


def test_a_sweep_over_the_kind_of_loss_keeps_its_column(tmp_path):
    write_run(tmp_path / "0", ["loss=ce"], [Loss(loss=3.0)])
    write_run(tmp_path / "1", ["loss=scalar"], [Loss(loss=9.0)])
    runs = load_runs(tmp_path)
    assert list(runs["loss"]) == [3.0, 9.0]
    text = rendered(sweep_table(runs))
    assert "ce" in text.split() and "scalar" in text.split()


def test_table_of_runs_that_know_nothing(tmp_path):
    write_run(tmp_path / "0", [], [], None)
    assert "unfinished" in rendered(sweep_table(load_runs(tmp_path)))
    write_run(tmp_path / "1", [], [Loss(loss=1.0, split="eval", trained=False)])
    last = rendered(sweep_table(load_runs(tmp_path))).splitlines()[-1].split()
    assert last[:4] == ["1", "completed", "1.0000", "no"]


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_narrow_table_does_without_columns_but_never_without_the_loss(sweep, width):
    table = sweep_table(load_runs(sweep), width)
    headers = [c.header for c in table.columns]
    assert {"run", "lr", "status", "loss"} <= set(headers)
    assert ("slowest phase" in headers) == (width >= 120)
    rendered(table, width)


def test_printed_runs_name_their_reasons(sweep):
    out = io.StringIO()
    print_runs(load_runs(sweep), Console(file=out, width=120))
    assert "run 10: failed: bad [/x] in [data]\n" in out.getvalue() and "\x1b" not in out.getvalue()


def test_reasons_and_summary_file(sweep):
    runs = load_runs(sweep)
    assert [line.split(":")[0] for line in reasons(runs)] == ["run 2", "run 10"]
    lines = write_summary(runs, sweep).read_text().splitlines()
    assert len(lines) == 4 and "lr" in lines[0].split(",")
    assert load_runs(sweep).equals(runs)  # the file is taken for no run


def test_notes_are_in_the_result(tmp_path):
    write_run(tmp_path / "0", [], [Note(text="slow path")], None)
    assert json.loads(json.dumps(read_result(tmp_path / "0")))["notes"] == ["slow path"]
