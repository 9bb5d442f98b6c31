"""A training that died goes on with the same bits."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fp4lab.checkpoint.safetensors_file import SafetensorsFile
from fp4lab.errors import UserError
from fp4lab.supervise import registry
from fp4lab.tasks.resume import FOLDER, newest
from fp4lab.tasks.worker import main

TRAIN = (
    "task=tune",
    "task.batch_size=2",
    "task.warmup_steps=0",
    "task.schedule=constant",
    "task.prompts=[]",
    "task.log_every=1",
    "lr=1e-2",
    "data.path=data/dialogues/zh_greetings.jsonl",
    "seq_len=32",
    "threads=1",
)
STEPS = [
    ["step=dense"],
    ["step=dense", "backend=dense"],
    ["step=chunked"],
    ["step=chunked", "step.join=true", "step.state=int8_block", "step.master=bf16_stochastic"],
    ["step=fused"],
    ["step=fused", "step.master=packed_residual", "step.state=int8", "weights.levels=row", "weights=random"],
    ["step=fused", "step.master=fp32", "step.state=bf16", "step.train_last_layers=1"],
]


@pytest.fixture
def train(compose, tmp_path):
    """train("name", "steps=4", ...) -> the events of a run with that folder."""

    def run(name: str, *overrides: str) -> list[dict]:
        from fp4lab.events import to_record

        records: list[dict] = []
        config = compose(*TRAIN, *overrides) | {"out_dir": str(tmp_path / name)}
        (tmp_path / name).mkdir(exist_ok=True)
        main(config, lambda event: records.append(to_record(event)))
        return records

    return run


def losses(records: list[dict]) -> list[tuple]:
    return [(r["step"], r["loss"], r["tokens"]) for r in records if r["kind"] == "loss"]


@pytest.mark.parametrize("step", STEPS, ids=lambda s: " ".join(s))
def test_every_step_goes_on_with_the_same_bits(step, train, tmp_path):
    whole = losses(train("whole", *step, "steps=3", "task.checkpoint_every=3"))
    first = losses(train("first", *step, "steps=2", "task.checkpoint_every=2"))
    records = train("second", *step, "steps=3", "task.checkpoint_every=3", f"task.resume={tmp_path / 'first'}")
    assert first[:2] == whole[:2] and losses(records) == whole[2:], "each step is in the records once"
    assert any(r["kind"] == "note" and r["topic"] == "resume" for r in records)
    assert newest(tmp_path / "whole").read_bytes() == newest(tmp_path / "second").read_bytes()
    assert newest(tmp_path / "whole").read_bytes() != newest(tmp_path / "first").read_bytes()


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    def start(name: str, *more: str) -> subprocess.Popen:
        common = [
            *TRAIN,
            "step=fused",
            "tracker=off",
            "steps=8",
            "task.checkpoint_every=1",
            f"hydra.run.dir={tmp_path / name}",
        ]
        return subprocess.Popen([sys.executable, "run.py", *common, *more], stdout=subprocess.DEVNULL)

    whole = start("whole")
    killed = start("killed")
    folder, deadline = tmp_path / "killed" / FOLDER, time.monotonic() + 300
    while not list(folder.glob("step-*.safetensors")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = [e.worker.pid for e in registry.entries() if e.out_dir == str((tmp_path / "killed").resolve())]
    os.kill(workers[0], signal.SIGKILL)
    assert killed.wait(timeout=300) != 0 and whole.wait(timeout=300) == 0
    assert start("again", f"task.resume={tmp_path / 'killed'}").wait(timeout=300) == 0
    assert newest(tmp_path / "whole").name == "step-00000008.safetensors"
    assert newest(tmp_path / "whole").read_bytes() == newest(tmp_path / "again").read_bytes()
    assert len(list((tmp_path / "whole" / FOLDER).iterdir())) == 1, "the newest alone is kept"


def test_another_configuration_is_refused_by_name(train, tmp_path):
    train("first", "steps=1", "task.checkpoint_every=1", "step=fused")
    again = f"task.resume={tmp_path / 'first'}"
    for n, (change, words) in enumerate(
        [
            ("lr=1e-3", r"lr=0\.01, this run has 0\.001"),
            ("step.state=bf16", r"step\.state=nvfp4_two_level, this run has bf16"),
            ("seed=4", "seed=123, this run has 4"),
            ("steps=1", "nothing is left; give more steps"),
        ]
    ):
        with pytest.raises(UserError, match=words):
            train(f"second{n}", "steps=2", "step=fused", again, change)
    (tmp_path / "first" / FOLDER).rename(tmp_path / FOLDER)
    (tmp_path / "first").rmdir()
    with pytest.raises(UserError, match="own folder"):
        train(".", "steps=2", "step=fused", f"task.resume={tmp_path / FOLDER}")


def test_what_is_no_checkpoint(train, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no checkpoint there; expected checkpoints/step-\*"):
        train("a", "step=fused", f"task.resume={tmp_path / 'empty'}")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match="too few for a header"):
        train("b", "step=fused", f"task.resume={tmp_path / 'cut.safetensors'}")
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"x": zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"not a training checkpoint of this version.*weights\.path"):
        train("c", "step=fused", f"task.resume={tmp_path / 'model.safetensors'}")


def test_the_file_is_safetensors_with_everything_in_it(train, tmp_path):
    from safetensors import safe_open

    train("first", "steps=1", "task.checkpoint_every=1", "step=fused")
    with safe_open(newest(tmp_path / "first"), "pt") as f:
        names = set(f.keys())
    assert "random" in names and any(n.endswith("state_m_codes") for n in names)
    assert "stored.model.layers.0.self_attn.q_proj.weight.codes" in names and "model.model.norm.weight" in names
    file = SafetensorsFile(newest(tmp_path / "first"))
    assert set(file.slots) == names
    file.close()
