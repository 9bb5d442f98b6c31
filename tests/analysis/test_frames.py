"""Event files to tidy frames."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import PAIRS, write_run

from fp4lab.analysis.frames import Frames, load_events, load_runs
from fp4lab.analysis.records import read_events, run_folders
from fp4lab.errors import UserError
from fp4lab.events import FirstToken, Guard, LayerDiff, Loss, Note, Phase, Sample, StateHealth, Turn


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


def test_rows_in_the_order_of_their_numbers(sweep):
    runs = load_runs(sweep).runs
    assert list(runs["run"]) == ["0", "2", "10"]
    assert list(runs["status"]) == ["completed", "unfinished", "failed"]
    assert list(runs["lr"]) == ["0.1", "0.2", "0.3"]
    assert list(runs["step"])[:2] == ["dense", "chunked"] and runs["new.key"][2] == "[1,2]"


def test_a_completed_run(sweep):
    row = load_runs(sweep).runs.iloc[0]
    assert (row["loss"], row["first_loss"], row["seconds"]) == (2.5, 3.0, 1.5)
    assert (row["peak_mib"], row["peak_of"]) == (300.0, "resident")
    assert (row["slowest_phase"], row["slowest_ms"], row["last_phase"]) == ("forward_done", 40.0, "forward_done")
    assert row["first_token"] == "A=B=C≠R" and (row["worst_kl"], row["worst_pair"]) == (0.25, "A-R")
    assert row["trained"]


def test_a_run_without_an_end_is_told_from_its_other_records(sweep):
    row = load_runs(sweep).runs.iloc[1]
    assert row["status"] == "unfinished" and row["reason"].endswith("after forward_done")
    assert (row["loss"], row["seconds"], row["peak_mib"], row["step"]) == (4.0, 3.0, 300.0, "chunked")


def test_nan_loss_is_a_float(sweep):
    assert math.isnan(load_runs(sweep).runs["loss"][2]) and load_runs(sweep).runs["loss"].dtype == float


def test_one_run_is_a_sweep_of_one(sweep):
    assert run_folders(sweep / "10") == [sweep / "10"]
    assert len(load_runs(sweep / "10").runs) == 1


@pytest.mark.parametrize("name", ["plots", "missing", "multirun.yaml"])
def test_no_runs_is_the_users_error(sweep, name):
    with pytest.raises(UserError, match=name):
        load_runs(sweep / name)


def test_a_refused_run_is_a_row_made_of_its_result(sweep):
    (sweep / "3").mkdir()
    (sweep / "3" / "result.json").write_text(json.dumps({"status": "failed", "reason": "lr=-1", "overrides": ["lr=-1"]}))
    runs = load_runs(sweep).runs
    assert list(runs["run"]) == ["0", "2", "3", "10"] and list(runs["lr"])[2] == "-1" and runs["reason"][2] == "lr=-1"
    assert list(load_runs(sweep).losses["run"]) == ["0", "0", "2", "10"]


def test_event_files_alone_make_the_frames(sweep):
    """result.json is not looked at where there are records, so a copy of the event files is enough."""
    (sweep / "0" / "result.json").write_text('{"status": "oom", "loss": 99}')
    row = load_runs(sweep).runs.iloc[0]
    assert (row["status"], row["loss"]) == ("completed", 2.5)


def test_every_kind_has_its_frame(tmp_path):
    tops = [(7, 2.5, "a"), (9, math.inf, "b")]
    write_run(
        tmp_path / "0",
        ["lr=1"],
        [
            Phase(name="start", ms=None, proc_rss_mib=10.0, source="rss"),
            Sample(proc_rss_mib=12.0),
            Loss(step=3, loss=math.nan, grad_norm=math.inf),
            FirstToken(path="A.infer", prompt="hi", top10=tops),
            FirstToken(path="B.fp2_ste", prompt="hi", hidden_nan=4),
            PAIRS[0],
            LayerDiff(pair="A-B", layer=1, relative_error=0.5),
            Turn(n=0, path="A.infer", ids=[1, 2], first_token_ms=3.0),
            StateHealth(step=1, zero_scale={"w": 0.25}, saturated={"v": 0.5}, code_changed=0.125),
            Guard(verdict="breach", reading_mib=9.0, limit_mib=8.0),
            Note(text="no frame"),
        ],
        config={"seed": 7, "guard": {"limit_gb": 2}},
        versions={"torch": "2"},
    )
    frames = load_runs(tmp_path)
    assert frames.runs["limit_mib"][0] == 2048
    assert frames.starts["config"][0]["seed"] == 7 and frames.starts["versions"][0] == {"torch": "2"}
    assert math.isnan(frames.phases["ms"][0]) and frames.phases["source"][0] == "rss" and frames.phases["t"][0] == 1.0
    assert list(frames.samples["proc_rss_mib"]) == [12.0] and frames.samples["pid_mem_mib"].dtype == float
    assert math.isnan(frames.losses["loss"][0]) and frames.losses["grad_norm"][0] == math.inf
    assert list(frames.first_tokens["rank"]) == [0, 1, -1] and list(frames.first_tokens["id"]) == [7, 9, -1]
    assert frames.first_tokens["logit"][1] == math.inf and frames.first_tokens["hidden_nan"][2] == 4
    assert list(frames.diffs["kl"]) == [0.001] and frames.diffs["top1_equal"].dtype == bool
    assert list(frames.layers["relative_error"]) == [0.5]
    assert frames.turns["ids"][0] == [1, 2]
    assert (frames.health["zero_scale_w"][0], frames.health["saturated_v"][0]) == (0.25, 0.5)
    assert math.isnan(frames.health["zero_scale_v"][0]) and frames.health["code_changed"][0] == 0.125
    assert list(frames.guards["limit_mib"]) == [8.0]
    for name in Frames.__dataclass_fields__:
        if name not in ("runs", "files"):
            assert set(getattr(frames, name)["run"]) == {"0"}, name


def test_empty_frames_have_their_columns(tmp_path):
    write_run(tmp_path / "0", [], [])
    frames = load_runs(tmp_path)
    assert frames.losses.empty and {"run", "t", "wall", "step", "loss", "grad_norm"} <= set(frames.losses)
    assert {"rank", "id", "logit", "text", "path"} <= set(frames.first_tokens) and "zero_scale_w" in frames.health


def test_records_of_other_versions(tmp_path):
    (tmp_path / "events.jsonl").write_text(
        '{"t": 0.0, "kind": "start", "task": "step", "overrides": ["lr=1"]}\n'
        '{"t": 1.0, "kind": "loss", "loss": 3.5, "from_the_future": 1}\n'
        '{"t": 1.5, "kind": "from_the_future", "x": {"y": 1}}\n'
        '{"t": 2.0, "kind": "first_token_diff", "pair": "A-C", "top1_equal": true, "kl": "nan"}\n'
        '{"t": 2.0, "kind": "turn"}\n'
        '{"t": 3.0, "kind": "end", "status": "completed"}\n'
    )
    frames = load_runs(tmp_path)
    row = frames.runs.iloc[0]
    assert (row["loss"], row["first_token"], row["faults"], row["status"]) == (3.5, "A=C", 0, "completed")
    assert math.isnan(frames.diffs["kl"][0]) and frames.losses["split"][0] == "train"
    assert list(load_events(tmp_path, "from_the_future")["x"]) == [{"y": 1}]


def test_a_value_of_another_type_leaves_the_column_as_it_is(tmp_path):
    (tmp_path / "events.jsonl").write_text(
        '{"kind": "loss", "loss": 1.0, "step": "two"}\n{"kind": "loss", "loss": 2.0, "step": 3}\n'
    )
    assert list(load_runs(tmp_path).losses["step"]) == ["two", 3]


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000), broken=st.integers(0, 10_000))
def test_whatever_is_cut_off_the_rest_is_read(tmp_path_factory, cut, broken):
    """Any prefix of the file gives the whole lines in it, and one line turned to rubbish costs that line alone."""
    folder = tmp_path_factory.mktemp("cut")
    write_run(
        folder / "0", ["prompt=你好"], [Phase(name="start"), Loss(loss=math.nan), Note(text='{"kind": "loss"}\n['), *PAIRS]
    )
    path = folder / "0" / "events.jsonl"
    data, whole = path.read_bytes(), read_events(folder / "0")
    cut %= len(data) + 1
    path.write_bytes(data[:cut])
    count = data[:cut].count(b"\n") + (data[cut : cut + 1] == b"\n")
    assert repr(read_events(folder / "0")) == repr(whole[:count])
    load_runs(folder)
    lines = data.splitlines(keepends=True)
    at = broken % len(lines)
    lines[at] = lines[at][: broken % (len(lines[at]) - 2)] + b"\xff\n"
    path.write_bytes(b"".join(lines))
    assert repr(read_events(folder / "0")) == repr(whole[:at] + whole[at + 1 :])


def test_records_of_one_kind(sweep):
    losses = load_events(sweep, "loss")
    assert list(losses["run"]) == ["0", "0", "2", "10"] and list(losses["loss"])[:3] == [3.0, 2.5, 4.0]
    assert load_events(sweep, "note").empty and "text" in load_events(sweep, "note")
