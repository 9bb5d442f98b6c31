"""A training that died goes on with the same bits."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fp4lab.analysis.records import read_events, run_folders
from fp4lab.checkpoint.safetensors_file import SafetensorsFile
from fp4lab.config import CHECKPOINTS
from fp4lab.encoding import EVENTS
from fp4lab.errors import UserError
from fp4lab.events import to_record
from fp4lab.supervise import registry
from fp4lab.supervise.resume import attempt, set_aside
from fp4lab.tasks.resume import newest
from fp4lab.tasks.worker import main
from fp4lab.tracking.jsonl import JsonlTracker

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
    """train("name", "steps=4", ...) -> the records of a run with that folder, where they are too."""

    def run(name: str, *overrides: str) -> list[dict]:
        config = compose(*TRAIN, *overrides) | {"out_dir": str(tmp_path / name)}
        tracker = JsonlTracker(tmp_path / name / EVENTS)
        main(config, lambda event: tracker.record(to_record(event)))
        return read_events(tmp_path / name)

    return run


def losses(records: list[dict]) -> list[tuple]:
    return [(r["step"], r["loss"], r["tokens"]) for r in records if r["kind"] == "loss"]


@pytest.mark.parametrize("step", STEPS, ids=lambda s: " ".join(s))
def test_every_step_goes_on_with_the_same_bits(step, train, tmp_path):
    whole = losses(train("whole", *step, "steps=3", "task.checkpoint_every=3"))
    first = losses(train("first", *step, "steps=2", "task.checkpoint_every=2"))
    records = train("second", *step, "steps=3", "task.checkpoint_every=3", f"task.resume={tmp_path / 'first'}")
    assert first[:2] == whole[:2] and losses(records) == first + whole[2:], "each step is in the records once"
    assert any(r["kind"] == "note" and r["topic"] == "resume" for r in records)
    assert newest(tmp_path / "whole").read_bytes() == newest(tmp_path / "second").read_bytes()
    assert newest(tmp_path / "whole").read_bytes() != newest(tmp_path / "first").read_bytes()


def test_killed_again_and_again(tmp_path):
    """The worker, then its supervisor, at any moment, in the run's own folder: in the end it is the run that nobody killed."""
    common = [*TRAIN, "step=fused", "tracker=off", "steps=6", "task.checkpoint_every=1", "task.eval_every=2"]

    def start(name: str, *more: str) -> subprocess.Popen:
        command = [sys.executable, "run.py", *common, f"hydra.run.dir={tmp_path / name}", *more]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    whole = start("whole")
    folder = tmp_path / "killed"
    for victim, target in (("worker", 1), ("supervisor", 3)):  # and the steps after which the kill comes
        process, deadline = start("killed", "sweep.resume=true"), time.monotonic() + 90
        while not reached(folder, target):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(random.random() * 0.05)
        entry = next(e for e in registry.entries() if e.out_dir == str(folder.resolve()) and not e.abandoned)
        assert getattr(entry, victim).send(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode != 0
    assert whole.wait(timeout=90) == 0, whole.stdout.read()
    last = start("killed", "sweep.resume=true")
    out, _ = last.communicate(timeout=90)
    assert last.returncode == 0, out
    assert newest(tmp_path / "whole").name == "step-00000006.safetensors"
    assert newest(tmp_path / "whole").read_bytes() == newest(folder).read_bytes()
    assert losses(read_events(folder)) == losses(read_events(tmp_path / "whole")), "no step is missing, none is there twice"
    assert [p.name for p in run_folders(folder)] == ["killed"]
    kept = [p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors")]
    assert kept == ["checkpoints/step-00000006.safetensors"], "the newest alone is kept, of all attempts"
    assert {p.parent.name for p in folder.glob("before-*/events.jsonl")} == {"before-1", "before-2"}
    again = start("killed", "sweep.resume=true")
    assert "skipped: already completed" in again.communicate(timeout=60)[0]
    untouched = (folder / "result.json").read_bytes()
    anew = start("killed")
    assert "has what an earlier run goes on from; sweep.resume=true does" in anew.communicate(timeout=60)[0]
    assert anew.returncode == 1 and (folder / "result.json").read_bytes() == untouched


def reached(folder: Path, steps: int) -> bool:
    return any(int(p.stem.removeprefix("step-")) >= steps for p in (folder / CHECKPOINTS).glob("step-*.safetensors"))


def test_a_run_that_died_after_its_last_step_is_finished(train, tmp_path):
    whole = train("whole", "step=fused", "steps=2", "task.checkpoint_every=2")
    with (tmp_path / "whole" / EVENTS).open("a") as f:
        f.write('{"kind": "loss", "st')
    records = train("again", "step=fused", "steps=2", f"task.resume={tmp_path / 'whole'}")
    assert losses(records) == losses(whole)
    assert [r["top10"] for r in records if r["kind"] == "first_token"] == [
        r["top10"] for r in whole if r["kind"] == "first_token"
    ]


def test_what_it_wrote_before_it_died_does_not_stop_it(train, tmp_path):
    """Its export, in its own folder, is replaced when the run is gone on with; another's, or without that wish, never."""
    run = ["step=fused", "steps=2", "task.checkpoint_every=2"]
    inside, outside = f"task.output={tmp_path / 'again' / 'out.dat'}", f"task.output={tmp_path / 'out.dat'}"
    train("again", *run, inside)
    (tmp_path / "again").rename(tmp_path / "died")
    (tmp_path / "again").mkdir()
    for file in (tmp_path / "again" / "out.dat", tmp_path / "out.dat"):
        file.write_text("old")
    resume = f"task.resume={tmp_path / 'died'}"
    with pytest.raises(UserError, match="exists already"):
        train("again", *run, inside, resume)
    with pytest.raises(UserError, match="exists already"):
        train("again", *run, outside, resume, "sweep.resume=true")
    train("again", *run, inside, resume, "sweep.resume=true")
    assert (tmp_path / "again" / "out.dat").read_bytes() == (tmp_path / "died" / "out.dat").read_bytes()
    assert (tmp_path / "out.dat").read_text() == "old"


def test_a_move_that_was_cut_off_is_taken_up(tmp_path):
    """Checkpoints move last; an attempt that died before its first one leaves the source to the attempt before it."""
    (tmp_path / CHECKPOINTS).mkdir()
    (tmp_path / CHECKPOINTS / "step-00000001.safetensors").touch()
    (tmp_path / "before-1").mkdir()
    (tmp_path / "before-1" / EVENTS).write_text("old")
    assert attempt(tmp_path) == tmp_path
    assert set_aside(tmp_path, [EVENTS]) == tmp_path / "before-1" == attempt(tmp_path)
    assert (tmp_path / "before-1" / EVENTS).read_text() == "old" and not (tmp_path / CHECKPOINTS).exists()
    (tmp_path / CHECKPOINTS).mkdir()
    assert attempt(tmp_path) == tmp_path / "before-1"
    (tmp_path / EVENTS).touch()
    assert set_aside(tmp_path, [EVENTS]) == tmp_path / "before-2" and not (tmp_path / EVENTS).exists()


def test_another_configuration_is_refused_by_name(train, tmp_path):
    train("first", "steps=1", "task.checkpoint_every=1", "step=fused")
    again = f"task.resume={tmp_path / 'first'}"
    for n, (change, words) in enumerate(
        [
            ("lr=1e-3", r"lr=0\.01, this run has 0\.001"),
            ("step.state=bf16", r"step\.state=nvfp4_two_level, this run has bf16"),
            ("seed=4", "seed=123, this run has 4"),
            ("task.batch_size=1", r"task\.batch_size=2, this run has 1"),
        ]
    ):
        with pytest.raises(UserError, match=words):
            train(f"second{n}", "steps=2", "step=fused", again, change)
    train("long", "steps=2", "step=fused", "task.checkpoint_every=2")
    with pytest.raises(UserError, match="has done 2 steps, and steps=1; give at least as many"):
        train("short", "steps=1", "step=fused", f"task.resume={tmp_path / 'long'}")
    (tmp_path / "first" / CHECKPOINTS).rename(tmp_path / CHECKPOINTS)
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(UserError, match="own folder"):
        train(".", "steps=2", "step=fused", f"task.resume={tmp_path / CHECKPOINTS}")


def test_other_data_is_refused(train, tmp_path):
    data = tmp_path / "data.tsv"
    data.write_text("".join(f"prompt {i}\tanswer {i}\n" for i in range(20)))
    here = ["step=fused", f"data.path={data}", "task.checkpoint_every=1"]
    train("first", *here, "steps=1")
    data.write_text(data.read_text().replace("answer 3", "answer 4"))
    with pytest.raises(UserError, match=r"the content of data\.path="):
        train("second", *here, "steps=2", f"task.resume={tmp_path / 'first'}")


def test_a_full_disk_is_told_before_the_first_step(train, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1 << 21))
    with pytest.raises(UserError, match=r"checkpoints needs .* MiB, and the disk has 2 MiB left"):
        train("first", "step=fused", "steps=1", "task.checkpoint_every=1")


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
