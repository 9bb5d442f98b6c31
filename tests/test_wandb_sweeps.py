"""experiments/sweeps/*.yaml, run as a wandb agent runs them: its own code builds and starts the command lines."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import yaml

from fp4lab.analysis.frames import load_runs
from fp4lab.analysis.rows import RESULTS
from fp4lab.tracking.wandb_file import read_records

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "experiments/sweeps").glob("*.yaml"))


def draw(parameter: dict, at: float):
    """A value of a sweep's parameter, `at` 0 the first or smallest, 1 the last or largest."""
    if "value" in parameter:
        return parameter["value"]
    if "values" in parameter:
        return parameter["values"][round(at * (len(parameter["values"]) - 1))]
    low, high = parameter["min"], parameter["max"]
    if parameter["distribution"] == "log_uniform_values":
        return math.exp(math.log(low) + at * (math.log(high) - math.log(low)))
    value = low + at * (high - low)
    return round(value) if parameter["distribution"] == "int_uniform" else value


def test_there_is_one_of_each_method():
    methods = [yaml.safe_load(p.read_text())["method"] for p in SWEEPS]
    assert sorted(methods) == ["bayes", "grid", "random"]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_what_is_optimised_is_a_result(path):
    room, _, name = yaml.safe_load(path.read_text())["metric"]["name"].partition("/")
    assert room == "result" and name in RESULTS


@pytest.mark.parametrize(
    ("path", "at"), list(zip(SWEEPS, (1.0, 0.5, 0.0), strict=True)), ids=lambda p: getattr(p, "stem", None)
)
def test_an_agents_command_line(tmp_path, monkeypatch, path, at):
    from wandb.wandb_agent import Agent

    sweep = yaml.safe_load(path.read_text())
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent sets them; here they are unset again
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_MODE", "offline")  # the one thing that is not an agent's: there is no server here
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.chdir(tmp_path)
    for name in ("conf", "models", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "run.py").write_text((ROOT / "run.py").read_text())

    agent = Agent.__new__(Agent)
    agent._sweep_command, agent._function, agent._in_jupyter = sweep["command"], None, False
    agent._forward_signals, agent._run_processes = False, {}
    arguments = {name: {"value": draw(p, at)} for name, p in sweep["parameters"].items()}
    agent._command_run({"run_id": "chosen1", "program": sweep["program"], "args": arguments})
    (process,) = agent._run_processes.values()
    assert process.wait() == 0

    folder = tmp_path / "outputs" / "sweep1"
    row = load_runs(folder).runs.iloc[0]
    assert row["run"] == "chosen1" and row["status"] == "completed"
    assert {name: row[name] for name in arguments} == {name: str(a["value"]) for name, a in arguments.items()}
    (file,) = folder.glob("chosen1/wandb/offline-run-*-chosen1/run-chosen1.wandb")
    records = list(read_records(file))
    (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.sweep_id) == ("chosen1", "sweep1")
    updates = [u for r in records if r.WhichOneof("record_type") == "summary" for u in r.summary.update]
    summary = {u.key or "/".join(u.nested_key): json.loads(u.value_json) for u in updates}
    assert summary[sweep["metric"]["name"]] == pytest.approx(row[sweep["metric"]["name"].partition("/")[2]])
