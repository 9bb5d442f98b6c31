"""Every incident of the log: absent by default, there when switched on, and visible in the records either way.

What is run is conf/experiment/incident_*.yaml, each choice of its sweep once, in this process.
"""

import contextlib
import csv
import itertools
import math
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
import torch
import yaml

from fp4lab.checkpoint import open_weights
from fp4lab.choices import check
from fp4lab.config import RunConfig
from fp4lab.errors import Collapsed, PlannedStop
from fp4lab.events import to_record
from fp4lab.tasks import chat, step, tune

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "conf/experiment").glob("incident_*.yaml"))
TASKS = {"step": step.run, "tune": tune.run, "chat": chat.run}
SMALL = (
    "{vocab_size:4096,hidden_size:64,intermediate_size:128,num_hidden_layers:2,num_attention_heads:2,num_key_value_heads:1,"
    "head_dim:32,rms_norm_eps:1e-6,rope_theta:1e6,tie_word_embeddings:true,max_position_embeddings:128}"
)


def sweep(path: Path) -> dict[str, list[str]]:
    params = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]["sweeper"]["params"]
    return {key: values.split(",") for key, values in params.items()}


@pytest.fixture
def runs(compose):
    """runs("final_norm", ...) -> the records of each run of the experiment's sweep, in its order."""

    def make(name: str, *extra: str) -> list[list[dict]]:
        choices = sweep(ROOT / f"conf/experiment/incident_{name}.yaml")
        return [
            one(f"+experiment=incident_{name}", *(f"{k}={v}" for k, v in zip(choices, values, strict=True)), *extra)
            for values in itertools.product(*choices.values())
        ]

    def one(*overrides: str) -> list[dict]:
        config, records = compose(*overrides), []
        check(config)
        with contextlib.suppress(PlannedStop):
            TASKS[config["task"]["name"]](config, lambda e: records.append(to_record(e)))
        return records

    return make


def of(records, kind, **fields):
    return [r for r in records if r["kind"] == kind and all(r[k] == v for k, v in fields.items())]


def topics(records) -> set[str]:
    return {r["topic"] for r in of(records, "note")}


def pair(records, name):
    return of(records, "first_token_diff", pair=name)[-1]


def faults(records) -> set[str]:
    return {r["pair"] for r in of(records, "first_token_diff", fault=True)}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_the_first_choice_is_the_default_and_the_incident_is_described(path):
    for key, values in sweep(path).items():
        if key != "kvc":
            default = reduce(getattr, key.split("."), RunConfig())
            assert values[0] == (str(default).lower() if isinstance(default, bool) else default.name)
    text = (ROOT / "doc/incidents.md").read_text(encoding="utf-8")
    assert f"+experiment={path.stem}`" in text


def test_every_quirk_has_its_experiment():
    swept = {key for path in EXPERIMENTS for key in sweep(path)}
    assert {f"quirk.{name}" for name in vars(RunConfig().quirk)} <= swept


def test_a_default_run_has_no_sign_of_any(compose):
    records: list[dict] = []
    step.run(compose("seq_len=16", "step.chunk_rows=64"), lambda e: records.append(to_record(e)))
    assert topics(records) == set()
    (health,) = of(records, "state_health")
    assert health["update_kept"] == pytest.approx(1, abs=0.02) and health["max_update_over_lr"] < 2


def test_scale_bytes(runs):
    """The collapse to !!!!: not a number from layer 0, in B alone."""
    off, on = runs("scale_bytes")
    assert pair(off, "B-C")["kl"] == 0 and pair(on, "A-C")["kl"] == 0
    assert pair(on, "B-C")["first_divergent_layer"] == 0 and math.isnan(pair(on, "B-C")["kl"])
    assert faults(off) == set() and faults(on) == {"A-B", "B-C"}
    for records, bad in ((off, 0), (on, 4096)):
        (b,) = of(records, "first_token", path="B.fp2_ste")
        assert b["logits_nan"] == bad


def test_rope_theta(runs):
    off, on = runs("rope_theta")
    assert pair(off, "B-C")["kl"] < 1e-6 and pair(off, "B-C")["first_divergent_layer"] is None
    assert pair(on, "A-C")["kl"] < 1e-6 and pair(on, "B-C")["kl"] > 1e-3 and pair(on, "B-C")["first_divergent_layer"] == 0
    assert faults(off) == set() and faults(on) == {"A-B", "B-C"}


def test_offset_mask_in_a_conversation(runs):
    persistent, replay, wrong, replay_wrong = (of(r, "turn") for r in runs("offset_mask", "task.turns=2"))
    for good in (persistent, replay_wrong):
        assert [t["ids"] for t in good] == [t["ids"] for t in replay]
        assert [t["nll"] for t in good] == pytest.approx([t["nll"] for t in replay], abs=1e-5)
    assert wrong[0]["nll"] == pytest.approx(replay[0]["nll"], abs=1e-5), "the first turn has nothing behind it"
    assert abs(wrong[1]["nll"] - replay[1]["nll"]) > 5e-4


@pytest.mark.parametrize("on", [False, True])
def test_offset_mask_in_the_model(compose, on):
    """Behind a cache a position must not know what comes after it; the same prefill from the start never does."""
    from fp4lab.tasks.session import open_session

    model = open_session(compose(f"quirk.no_offset_mask={on}"), lambda e: None, trains=False).model
    ids = torch.arange(40, 60).view(1, -1)
    with torch.no_grad():
        whole = model.hidden(ids)
        cache = model.new_cache(1, 20)
        parts = [model.hidden(ids[:, :8], cache), model.hidden(ids[:, 8:], cache)]
    apart = (torch.cat(parts, dim=1) - whole).abs().amax(dim=(0, 2))
    assert apart[:8].max() < 1e-4
    assert (apart[8:19].min() > 1e-3) if on else (apart.max() < 1e-4)


def test_requantisation_by_another_rule(runs):
    """lr 0 after which codes are not what they were."""
    off, on = runs("requantise", "seq_len=8", "step.chunk_rows=64")
    (health,) = of(off, "state_health")
    assert health["code_changed"] == 0 and len({r["loss"] for r in of(off, "loss")}) == 1
    (health,) = of(on, "state_health")
    assert health["code_changed"] > 0.05 and "requantised" in topics(on) - topics(off)
    first, after = (r["loss"] for r in of(on, "loss"))
    assert first != after


def test_final_norm(runs):
    off, on = (r for r in runs("final_norm", "step.chunk_rows=64"))
    assert of(on, "loss")[0]["loss"] > 5 * of(off, "loss")[0]["loss"]
    assert "loss" in topics(on) - topics(off)


def test_end_token(runs):
    """Same data and steps: one answer ends, the other goes on with its last token."""
    small = ["model.path=null", f"++model.config={SMALL}", "task.batch_size=8", "threads=1"]
    off, on = runs("end_token", *small)
    (ends,) = {tuple(t["ids"]) for t in of(off, "turn")}
    (runs_on,) = {tuple(t["ids"]) for t in of(on, "turn")}
    assert len(ends) < 32 == len(runs_on)
    assert "targets" in topics(on) - topics(off)
    tokens = [of(r, "loss", split="eval")[-1]["tokens"] for r in (off, on)]
    assert tokens[1] < tokens[0]


def test_newline_of_the_training_template(runs):
    off, on = runs("template_newline")
    official, other = (of(r, "loss")[0] for r in (off, on))
    assert official["tokens"] == other["tokens"] and other["loss"] > 1.05 * official["loss"]
    assert "template" in topics(on) - topics(off)


def test_single_level_moment_scales(runs):
    off, on = runs("moment_scales", "steps=2", "seq_len=8", "step.chunk_rows=64")
    first, second = of(on, "state_health")
    assert first["zero_scale"]["v"] > 0.9 and second["max_update_over_lr"] > 1e4
    assert of(off, "state_health")[1]["max_update_over_lr"] < 4 and of(off, "state_health")[1]["zero_scale"]["v"] < 0.01
    assert "moments" in topics(on) - topics(off)


def test_inertia_of_packed_weights(runs):
    off, on = runs("inertia", "steps=1", "seq_len=8", "step.chunk_rows=64")
    (moves,), (stays,) = of(off, "state_health"), of(on, "state_health")
    assert moves["code_changed"] > 0 and moves["update_kept"] == pytest.approx(1, abs=0.1)
    assert stays["code_changed"] == stays["update_kept"] == 0 and stays["update_lost"] == 1
    assert "inertia" in topics(on) - topics(off)


def test_fp16_scales(runs, tmp_path):
    """An export of untouched weights is the file they came from, to the byte, or it is another file."""
    output = tmp_path / "model.dat"
    off, on = runs("fp16_scales", f"task.output={output}", "task.overwrite=true")
    for records, same in ((off, True), (on, False)):
        (source, again), (written,) = of(records, "file", role="weights"), of(records, "file", role="output")
        assert again["sha256"] == written["sha256"]
        assert (source["sha256"] == written["sha256"]) is same and (source["bytes"] == written["bytes"]) is same
    assert "export" in topics(on) - topics(off)
    ours, source = open_weights("dat", output), open_weights("dat", ROOT / "models/tiny/model.dat")
    name = "model.layers.0.mlp.up_proj.weight"  # our reader is not misled by it: the element type says what they are
    assert torch.equal(ours.get(name).block_scale.float(), source.get(name).block_scale.float())


def test_e4m3_table(runs):
    off, on = runs("e4m3_table")
    for records, bad in ((off, 0), (on, 4096)):
        (b,) = of(records, "first_token", path="B.fp2_ste")
        assert b["logits_nan"] == bad
    assert pair(off, "B-C")["kl"] == 0 and pair(on, "A-C")["kl"] == 0
    assert faults(off) == set() and faults(on) == {"A-B", "B-C", "B-R"}


def test_pack_everything(runs):
    off, on = runs("pack_everything", "seq_len=8", "step.chunk_rows=64", "stop_after=state_initialized")
    held = [{r["tensor_kind"]: r["mib"] for r in of(records, "tensor_bytes")} for records in (off, on)]
    assert held[1]["state_w_codes"] > held[0]["state_w_codes"]


@pytest.mark.parametrize(
    "overrides, word",
    [
        (["quirk.rope_theta_1e6=true"], "1e6"),
        (["quirk.e4m3_top_nan=true"], "256"),
        (["quirk.no_offset_mask=true"], "kvc=persistent"),
        (["quirk.no_final_norm=true", "backend=noste"], "trained"),
        (["quirk.pack_everything=true", "step=dense"], "step=chunked"),
        (["quirk.no_end_token=true", "data.path=data/samples/train-inputs.txt"], "dialogues"),
        (["quirk.fp16_scales=true"], "task.output"),
        (["quirk.top_p_can_empty=true"], "task.top_p"),
    ],
)
def test_an_incident_that_cannot_show_is_said_to(compose, overrides, word):
    records: list[dict] = []
    with pytest.raises(PlannedStop):
        step.run(compose("stop_after=model_loaded", *overrides), lambda e: records.append(to_record(e)))
    said = [r["text"] for r in of(records, "note", topic="no_effect")]
    assert any(overrides[0] in text and word in text for text in said)


def test_the_sweep_runs_from_the_door(tmp_path):
    """python run.py -m +experiment=...: two rows, quirk off and on."""
    args = ["-m", "+experiment=incident_rope_theta", "tracker=off", "threads=1", f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run([sys.executable, "run.py", *args], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [(r["quirk.rope_theta_1e6"], float(r["worst_kl"]) > 1e-3) for r in rows] == [("False", False), ("True", True)]


def test_top_p(compose):
    """After "hi" the shipped model is surer than top_p: the nucleus is its one token, or nothing."""
    records: list[dict] = []
    chat.run(compose("+experiment=incident_top_p"), lambda e: records.append(to_record(e)))
    (turn,) = of(records, "turn")
    assert turn["text"]
    with pytest.raises(Collapsed, match="left no token"):
        chat.run(compose("+experiment=incident_top_p", "quirk.top_p_can_empty=true"), lambda e: None)
