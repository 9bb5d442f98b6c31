"""Event files replayed into wandb, read back from wandb's own files."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fp4lab.analysis.rows import RunRow
from fp4lab.analysis.sync import sync
from fp4lab.events import End, FirstToken, FirstTokenDiff, Guard, LayerDiff, Loss, Phase, Sample, Start, StateHealth, to_record
from fp4lab.tracking.jsonl import JsonlTracker
from fp4lab.tracking.wandb import WandbTracker
from fp4lab.tracking.wandb_file import finished, read_records
from fp4lab.tracking.wandb_view import options

CONFIG = {"tracker": {"project": "mine", "name": "offline", "group": None, "tags": ["a"]}, "task": {"name": "step"}, "seed": 7}
EVENTS = [
    Phase(name="start", ms=2.0, proc_rss_mib=11.0),
    Sample(proc_rss_mib=12.0),
    FirstToken(path="A.infer", prompt="hi", top10=[(5, 1.5, "x"), (6, float("nan"), "你")]),
    FirstTokenDiff(pair="A-C", prompt="hi", kl=0.5, top1_equal=True),
    LayerDiff(pair="A-C", prompt="hi", layer=0, relative_error=0.25),
    Loss(step=0, loss=5.0, grad_norm=1.0),
    Loss(step=1, loss=4.0, split="eval"),
    StateHealth(step=1, code_changed=0.25, zero_scale={"v": 0.5}),
]
TABLES = {  # kind: the first columns of its first row
    "first_token": ["before", "hi", "A.infer"],
    "first_token_diff": ["before", "hi", "A-C"],
    "layer_diff": ["hi", "A-C", 0],
}
KILLED = [
    Guard(verdict="breach", reason="too much", reading_mib=12.0, limit_mib=10.0),
    End(status="guard_killed", reason="too much"),
]


@pytest.fixture(autouse=True)
def apart(tmp_path_factory, monkeypatch):
    """wandb's own folders in a temporary one, and nothing of the caller's environment."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path_factory.mktemp(name)))


def records(run_id: str, events: list) -> list[dict]:
    start = Start(run_id=run_id, task="step", overrides=["lr=1"], choices={"task": "step"}, config=CONFIG)
    wall = "2026-01-02T03:04:{:02}.500+00:00"
    return [{"t": i / 2, "wall": wall.format(i), **to_record(e)} for i, e in enumerate([start, *events])]


def write(run: Path, run_id: str, events: list) -> list[dict]:
    found = records(run_id, events)
    tracker = JsonlTracker(run / "events.jsonl")
    for record in found:
        tracker.record(record)
    tracker.close({})
    return found


def read(file: Path) -> dict:
    """What a .wandb file says of its run, without when and where it was written."""
    said: dict = {"history": [], "summary": {}, "metrics": set()}
    for r in read_records(file):
        kind = r.WhichOneof("record_type")
        if kind == "run":
            said |= {k: getattr(r.run, k) for k in ("run_id", "project", "display_name", "run_group", "job_type")}
            said |= {"tags": list(r.run.tags), "config": {u.key: json.loads(u.value_json) for u in r.run.config.update}}
            said["config"].pop("_wandb", None)
        elif kind == "history":
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
            said["history"].append({k: v for k, v in row.items() if k != "_runtime" and not k.endswith("artifact_path")})
        elif kind == "summary":
            said["summary"] |= {u.key or "/".join(u.nested_key): json.loads(u.value_json) for u in r.summary.update}
        elif kind == "metric":
            said["metrics"].add((r.metric.name, r.metric.glob_name, r.metric.step_metric))
        elif kind == "exit":
            said["exit"] = r.exit.exit_code
    said["summary"] = {k: v for k, v in said["summary"].items() if not k.startswith("_") and not k.endswith("artifact_path")}
    return said


def the_file(home: Path, run_id: str) -> Path:
    (file,) = (home / "wandb").glob(f"offline-run-*-{run_id}/*.wandb")
    return file


def test_a_replay_is_the_run_as_it_was_tracked(tmp_path):
    tracked = WandbTracker(tmp_path / "live", "offline", options(CONFIG, {"task": "step"}, "0", "sweep"), RunRow())
    found = write(tmp_path / "sweep" / "0", "id0", [*EVENTS, *KILLED])
    for record in found:
        tracked.record(record)
    tracked.close(found[-1])
    said = dict(sync(tmp_path / "sweep"))
    assert said["0"].startswith("written to ")
    file = the_file(tmp_path / "live", "id0")
    deadline = time.monotonic() + 10
    while not finished(file) and time.monotonic() < deadline:  # wandb's own process writes on for a moment
        time.sleep(0.05)
    live, replayed = read(file), read(the_file(tmp_path / "sweep", "id0"))
    assert live == replayed
    assert (live["display_name"], live["run_group"], live["project"], live["exit"]) == ("sweep/0", "sweep", "mine", 124)
    assert live["tags"] == ["a", "task=step"] and live["config"]["seed"] == 7
    assert live["summary"]["status"] == "guard_killed" and live["summary"]["guard/breach"] == "too much"
    assert live["summary"]["result/loss"] == 4.0 and live["summary"]["result/peak_mib"] == 12.0
    rows = {k: r for r in live["history"] for k in r}
    assert rows["memory/proc_rss_mib"]["memory/seconds"] == 1.0 and rows["health/zero_scale/v"]["health/step"] == 1
    folder = the_file(tmp_path / "sweep", "id0").parent / "files"
    tables = {kind: json.loads((folder / rows[f"{kind}/path"][f"{kind}/path"]).read_text()) for kind in TABLES}
    assert {kind: table["data"][0][:3] for kind, table in tables.items()} == TABLES
    assert [row[3:5] for row in tables["first_token"]["data"]] == [[0, 5], [1, 6]] and tables["first_token"]["data"][1][
        6
    ] == "你"


def test_again_changes_nothing_and_what_was_broken_off_is_replaced(tmp_path):
    sweep = tmp_path / "sweep"
    write(sweep / "0", "id0", [*EVENTS, *KILLED])
    write(sweep / "1", "id1", EVENTS)  # killed with its supervisor
    (sweep / "2").mkdir()
    (sweep / "2" / "result.json").write_text('{"status": "failed", "reason": "no", "overrides": []}')
    assert [what.split()[0] for _, what in sync(sweep)] == ["written", "written", "has", "written"]
    files = {p: p.read_bytes() for p in (sweep / "wandb").rglob("*.wandb")}
    assert [what for _, what in sync(sweep)][::3] == ["is there already"] * 2
    assert {p: p.read_bytes() for p in (sweep / "wandb").rglob("*.wandb")} == files
    unfinished = read(the_file(sweep, "id1"))
    assert unfinished["summary"]["status"] == "unfinished" and unfinished["exit"] == 1

    broken = the_file(sweep, "id0")
    was = read(broken)
    broken.write_bytes(broken.read_bytes()[:400])
    assert dict(sync(sweep))["0"].startswith("written to ")
    assert read(the_file(sweep, "id0")) == was
    assert len(list((sweep / "wandb").glob("replaced-offline-run-*-id0"))) == 1


def test_the_report_is_an_artifact_until_the_records_change(tmp_path):
    sweep = tmp_path / "sweep"
    write(sweep / "0", "id0", EVENTS)
    list(sync(sweep))
    (file,) = (sweep / "wandb").glob("offline-run-*-report-*/*.wandb")
    found = list(read_records(file))
    (run,) = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert (run.job_type, run.run_group, run.display_name) == ("report", "sweep", "sweep/report")
    requests = [r.request.log_artifact.artifact for r in found if r.WhichOneof("record_type") == "request"]
    artifacts = [r.artifact for r in found if r.WhichOneof("record_type") == "artifact"] + requests
    assert [(a.name, a.type, [e.path for e in a.manifest.contents]) for a in artifacts if a.name] == [
        ("report-sweep", "report", ["report.html"])
    ]
    write(sweep / "1", "id1", EVENTS)
    assert dict(sync(sweep))["report"].startswith("written to ")


def test_a_run_of_a_sweep_goes_where_its_sweep_has_them(tmp_path):
    sweep = tmp_path / "sweep"
    write(sweep / "3", "id3", EVENTS)
    (sweep / "multirun.yaml").touch()
    assert [run for run, _ in sync(sweep / "3")] == ["3"]
    assert read(the_file(sweep, "id3"))["display_name"] == "sweep/3"
    assert dict(sync(sweep))["3"] == "is there already"


def test_records_without_id_or_configuration(tmp_path):
    """Of an older version: the first line decides the id."""
    for name in ("a", "b"):
        run = tmp_path / name / "0"
        run.mkdir(parents=True)
        (run / "events.jsonl").write_text('{"t": 0.0, "wall": "w", "kind": "start"}\n{"t": 1.0, "kind": "loss", "loss": 2.0}\n')
        list(sync(tmp_path / name))
    names = [
        p.name.rpartition("-")[2]
        for f in ("a", "b")
        for p in (tmp_path / f / "wandb").glob("offline-run-*")
        if "report" not in p.name
    ]
    assert len(names) == 2 and names[0] == names[1]


def test_wandbs_own_reader_agrees(tmp_path):
    write(tmp_path / "0", "id0", [*EVENTS, *KILLED])
    list(sync(tmp_path))
    wandb = shutil.which("wandb", path=str(Path(sys.executable).parent))
    command = [wandb, "leet", "inspect", "--summary", "--json", the_file(tmp_path, "id0")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert '"result/loss"' in done.stdout and "guard_killed" in done.stdout
