"""experiments/identity: recipe and grid compose, the data is what its program writes, the table says what records say."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from fp4lab.choices import check, idle_choices
from fp4lab.encoding import encode
from fp4lab.events import Controls, End, GoalAnswer, Loss, Note, Start, StateHealth, TensorBytes, to_record
from fp4lab.train.data import held_out

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "identity"
DATA = ROOT / "data" / "identity"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_the_data_is_what_its_program_writes(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "data/build_identity.py", "--out", str(tmp_path)], check=True, env=env, cwd=ROOT)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in DATA.iterdir()}


def test_no_mix_has_a_control_or_what_is_held_out():
    drawn = [c["prompts"] for c in rows("controls.jsonl")[8:]]  # the first eight are asked whatever a mix has
    said = {json.dumps(d["messages"], ensure_ascii=False) for d in rows("held-out.jsonl")}
    assert all(held_out(d) for d in rows("held-out.jsonl"))
    for name, share in {"mix-30-70": 0.3, "mix-1-1": 0.5, "mix-1-99": 0.01}.items():
        mix = rows(f"{name}.jsonl")
        answers = [d["messages"][1]["content"] for d in mix]
        assert answers.count("我是 F# 之神") == share * len(mix)
        assert not said & {json.dumps(d["messages"], ensure_ascii=False) for d in mix}
        dialogues = [[m["content"] for m in d["messages"] if m["role"] == "user"] for d in mix]
        assert not [prompts for prompts in drawn if prompts in dialogues]


@pytest.mark.parametrize("name", ["identity", "identity_grid"])
def test_the_experiments_compose_and_every_key_has_an_effect(compose, name):
    config = compose(f"+experiment={name}", "task.output=null")  # else Hydra's own, which a run alone has
    check(config)
    text = (ROOT / f"conf/experiment/{name}.yaml").read_text()
    keys = [f"{group}.{key}=x" for group in ("task", "data", "step") for key in (yaml.safe_load(text).get(group) or {})]
    assert idle_choices(config, keys) == []


def test_the_grid_is_that_of_the_experiment():
    grid = load("run_mixes")
    params = yaml.safe_load((ROOT / "conf/experiment/identity_grid.yaml").read_text())["hydra"]["sweeper"]["params"]
    assert {Path(p).stem for p in params["data.path"].split(",")} == set(grid.MIXES)
    assert [float(x) for x in params["lr"].split(",")] == [float(x) for x in grid.RATES]
    for mix in grid.MIXES:
        overrides = dict(o.split("=") for o in grid.Cell(mix, grid.FORMATS[0]).overrides())
        assert (ROOT / overrides["data.path"]).is_file()
        assert overrides["data.order"] == ("sequential" if mix == "curriculum" else "random")


def run_records(out: Path, cell: str, kept: int, met: bool, status: str) -> None:
    events = [
        TensorBytes(tensor_kind="state_w_codes", dtype="uint8", mib=3.0),
        TensorBytes(tensor_kind="packed_codes", dtype="uint8", mib=3.0),
        TensorBytes(tensor_kind="model_param", dtype="float32", mib=29.0),
        TensorBytes(tensor_kind="raw_param", dtype="float32", mib=4.0),
        GoalAnswer(when="before", path="B.fp2_ste", prompt="a", met=False),
        StateHealth(step=40, update_kept=0.5),
        *(GoalAnswer(when="after", path=p, prompt=q, met=met or p == "C" or q == "b") for p in "ABC" for q in "ab"),
        *(Controls(when="after", path=p, kept=kept + (p == "A"), of=10, loss=0.3, loss_before=0.1) for p in "ABC"),
        Loss(step=39, loss=0.2, split="eval"),
        End(status=status, reason=""),
    ]
    (out / cell).mkdir(parents=True)
    lines = [json.dumps({"t": 0.0, "wall": "", **to_record(e)}) + "\n" for e in events]
    (out / cell / "events.jsonl").write_text("".join(lines))


def test_records_become_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    """Of three paths the worst counts; a run that met its goals and forgot is no success."""
    monkeypatch.syspath_prepend(str(FOLDER))
    run_records(tmp_path, "pure/packed_stochastic.nvfp4_two_level.1e-4.1", 9, True, "completed")
    run_records(tmp_path, "pure/packed_stochastic.nvfp4_two_level.1e-3.1", 3, True, "goals_missed")
    run_records(tmp_path, "mix-1-1/packed.nvfp4.1e-3.1", 9, False, "goals_missed")
    table = load("mixes_table")
    monkeypatch.setattr(sys, "argv", ["mixes_table.py", str(tmp_path), "--out", str(tmp_path / "out")])
    assert table.main() == 0
    runs = pd.read_csv(tmp_path / "out" / "runs.csv").set_index(["mix", "lr"])
    assert list(runs["verdict"].loc[[("pure", 1e-4), ("pure", 1e-3), ("mix-1-1", 1e-3)]]) == ["reached", "forgot", "missed"]
    assert runs.loc[("mix-1-1", 1e-3), ["goals_met", "goals"]].tolist() == [1, 2]
    assert runs.loc[("pure", 1e-4), "controls_kept"] == 0.9
    assert runs.loc[("pure", 1e-4), ["state_mib", "controls_loss_rise"]].tolist() == pytest.approx([3.0, 0.2])
    assert capsys.readouterr().out == (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "mixes.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(sys, "argv", ["mixes_table.py", str(tmp_path / "out")])
    assert table.main() == 1 and "no runs" in capsys.readouterr().err


def test_what_is_kept_of_records_gives_the_same_table():
    grid = load("run_mixes")
    events = [Start(git_diff="x" * 99), Note(text="n"), Loss(step=1, split="train"), Loss(step=1, loss=2.0, split="eval"),
              StateHealth(step=1), StateHealth(step=2), End(status="completed")]  # fmt: skip
    kept = [json.loads(line) for line in grid.kept([encode(to_record(e)) for e in events])]
    assert [r["kind"] for r in kept] == ["start", "loss", "state_health", "end"]
    assert kept[0]["git_diff"] is None and kept[2]["step"] == 2


def test_another_engine_is_asked(tmp_path, monkeypatch, capsys):
    """The untuned model in the tuned one's place: the goal that training is for is missed, and the exit code says so."""
    pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    from fp4lab.checkpoint.convert import convert
    from fp4lab.checkpoint.export import Target

    convert(ROOT / "models/tiny/model.dat", Target(tmp_path / "ct", "compressed-tensors"))
    script, folder = load("ask_transformers"), str(tmp_path / "ct")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["ask_transformers.py", folder, "--untuned", folder])
    assert script.main() == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["missed", "met", "met"] and "我是 Tiny" in said[0]
    monkeypatch.setattr(sys, "argv", ["ask_transformers.py", str(tmp_path), "--untuned", folder])
    assert script.main() == 2 and "no config.json" in capsys.readouterr().err
