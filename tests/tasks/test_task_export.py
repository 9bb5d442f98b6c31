"""task=export and what task=tune writes: any format, loaded again, the same model; everything trained is in it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp4lab.checkpoint import DatFile, open_weights
from fp4lab.choices import idle_choices
from fp4lab.errors import UserError
from fp4lab.events import to_record
from fp4lab.model.config import EMBEDDING, HEAD
from fp4lab.nvfp4 import PackedTensor
from fp4lab.tasks import tune
from fp4lab.tasks.export import reloading, save_model
from fp4lab.tasks.session import open_session
from fp4lab.tasks.worker import main

SHIPPED = Path("models/tiny/model.dat")
TRAIN = (
    "task=tune",
    "step=dense",
    "task.batch_size=2",
    "steps=2",
    "lr=1e-2",
    "data.path=data/dialogues/zh_greetings.jsonl",
    "seq_len=32",
    "task.max_tokens=2",
)
SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)


def of(records, kind, **values):
    return [r for r in records if r["kind"] == kind and all(r.get(k) == v for k, v in values.items())]


def run(config) -> list[dict]:
    records: list[dict] = []
    main(config, lambda e: records.append(to_record(e)))
    return records


@pytest.mark.parametrize("form", ["dat", "compressed-tensors", "modelopt", "hf"])
def test_export_and_load_again(form, compose, tmp_path):
    """The shipped model in every format gives the same logits on every path; its files are reported with checksums."""
    out = tmp_path / "out"
    records = run(compose("task=export", f"task.format={form}", f"task.output={out}"))
    assert [r["name"] for r in of(records, "phase")] == [
        *("start", "model_loaded", "first_token_done", "export_done", "cleanup_done"),
    ]
    written = of(records, "file", role="output")
    assert {Path(r["path"]).parent for r in written} == {tmp_path if form == "dat" else out} and all(
        r["sha256"] for r in written
    )
    diffs = {r["pair"]: r for r in of(records, "first_token_diff", when="export")}
    assert diffs.keys() == {"A-A", "B-B", "C-C"}
    for diff in diffs.values():
        assert diff["top1_equal"] and (diff["kl"] == 0 or form == "hf"), diff
    assert any("loaded again" in r["text"] for r in of(records, "note", topic="reload"))
    if form == "dat":
        assert out.read_bytes() == SHIPPED.read_bytes()


def test_random_weights_are_quantised_as_the_session_does(compose, tmp_path):
    """weights.rule and weights.levels decide, a fused group has one scale, and the reloaded model is the session's."""
    records = run(
        compose(
            "task=export",
            "task.format=compressed-tensors",
            f"task.output={tmp_path / 'out'}",
            "weights=random",
            "weights.rule=four_over_six",
            "weights.levels=tensor",
        )
    )
    assert all(r["kl"] < 1e-9 for r in of(records, "first_token_diff", when="export"))
    assert any("42 tensors were quantised" in r["text"] for r in of(records, "note", topic="export"))
    weights = open_weights("hf", tmp_path / "out")
    q, k = (weights.get(f"model.layers.0.self_attn.{m}_proj.weight") for m in "qk")
    assert isinstance(q, PackedTensor) and isinstance(k, PackedTensor)
    assert q.levels == "tensor" and torch.equal(q.global_scale, k.global_scale)
    assert HEAD not in weights.names(), "tied"
    weights.close()


def test_a_head_of_its_own(compose, tmp_path):
    """task.head=nvfp4 unties it: engines then compute the head that paths A, B and C compute."""
    out = tmp_path / "out"
    run(compose("task=export", "task.format=modelopt", "task.head=nvfp4", f"task.output={out}", "weights=random"))
    weights = open_weights("hf", out)
    assert isinstance(weights.get(HEAD), PackedTensor)
    weights.close()
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """The shipped model as a folder of floats with a tied head."""
    from safetensors.torch import load_file, save_file

    from fp4lab.checkpoint.convert import convert
    from fp4lab.checkpoint.export import Target

    out = tmp_path_factory.mktemp("hf") / "hf"
    convert(SHIPPED.absolute(), Target(out, "hf"))
    tensors = load_file(out / "model.safetensors")
    tensors.pop(HEAD)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return out


@pytest.mark.parametrize("form", ["dat", "compressed-tensors", "modelopt", "hf"])
@pytest.mark.parametrize("source", ["shipped", "hf"])
def test_everything_trained_is_exported(form, source, compose, hf, tmp_path):
    """Every norm, embedding, linear and the head of the file is what the session ended with; loaded again it answers so."""
    weights = ["weights=shipped"] if source == "shipped" else ["weights=hf", f"weights.path={hf}"]
    session, seen = None, []

    def keep(s, *args, **kwargs):
        nonlocal session
        session = s
        return save_model(s, *args, **kwargs)

    original, tune.save_model = tune.save_model, keep  # type: ignore[attr-defined]
    try:
        config = compose(*TRAIN, *weights, f"task.format={form}", f"task.output={tmp_path / 'out'}", "task.prompts=[hi]")
        seen = run(config)
    finally:
        tune.save_model = original  # type: ignore[attr-defined]
    assert session is not None and of(seen, "file", role="output")
    again = {r["pair"]: r for r in of(seen, "first_token_diff", when="export")}
    assert again.keys() == {"A-A", "B-B", "C-C"} and all(r["top1_equal"] and not r["fault"] for r in again.values())
    written = open_weights("dat" if form == "dat" else "hf", tmp_path / "out")
    start = open_weights("dat", SHIPPED)
    tied = source == "hf" and form != "dat"
    assert set(written.names()) == set(start.names()) - ({HEAD} if tied else set())
    for name in written.names():
        value, old = written.get(name), start.get(name)
        if name in session.store.raw:
            now = session.store.raw[name]
            assert torch.equal(value.float(), now.to(value.dtype).float()), name
            assert not torch.equal(now.float(), old.float()), f"{name} was not trained"
        elif isinstance(value, PackedTensor):
            packed = session.store.packed[name]
            assert torch.equal(value.codes, packed.codes) and torch.equal(
                value.block_scale.view(torch.uint8), packed.block_scale.view(torch.uint8)
            )
    written.close()
    start.close()
    done = type("Done", (), {"format": form, "path": tmp_path / "out"})()
    again = open_session(reloading(config, done), lambda e: None, trains=False)
    assert again.tokenizer.vocab_size == session.tokenizer.vocab_size
    if form != "hf":
        for name, p in session.store.packed.items():
            if name != HEAD or not tied:
                assert torch.equal(again.store.packed[name].codes, p.codes), name


@pytest.mark.parametrize("form", ["dat", "compressed-tensors"])
def test_a_trained_file_that_reads_otherwise_is_told(form, compose, tmp_path, monkeypatch):
    """What was trained is loaded again whether goals are asked or not: an export that lost one layer's scales is no success."""
    key = "model.layers.3.mlp.down_proj.weight"

    def damaged(*args, **kwargs):
        done = save_model(*args, **kwargs)
        if form == "dat":
            with DatFile.open(done.path) as file:
                scale = file.entries[f"{key}.scale"]
            with done.path.open("r+b") as f:
                f.seek(scale.offset)
                f.write(bytes([0x38]) * scale.nbytes)  # 1.0
        else:
            tensors = load_file(done.path / "model.safetensors")
            tensors[f"{key}_global_scale"] /= 64
            save_file(tensors, done.path / "model.safetensors", metadata={"format": "pt"})
        return done

    monkeypatch.setattr(tune, "save_model", damaged)
    with pytest.raises(
        UserError, match=r"out: reloaded, path A.infer gives other logits \(KL .*: this is a fault of the export"
    ):
        run(compose(*TRAIN, f"task.format={form}", f"task.output={tmp_path / 'out'}"))


def test_element_types_of_a_trained_file_stay(compose, tmp_path):
    """The .dat file of a trained model has the entries of its source: keys, order, types, shapes."""
    run(compose(*TRAIN, f"task.output={tmp_path / 'out.dat'}"))
    with DatFile.open(SHIPPED) as a, DatFile.open(tmp_path / "out.dat") as b:
        assert [(e.key, e.elem_type, e.dims) for e in a.entries.values()] == [
            (e.key, e.elem_type, e.dims) for e in b.entries.values()
        ]
        assert all(a.payload(k) != b.payload(k) for k in a.entries if k.endswith("norm.weight") or k == EMBEDDING)


@pytest.mark.parametrize("task", ["export", "tune"])
def test_what_would_stop_the_writing_is_told_first(task, compose, tmp_path):
    """Before a model is loaded or trained."""
    (tmp_path / "there").write_text("x")
    base = ["task=export"] if task == "export" else list(TRAIN)
    for output, says in (
        (tmp_path / "there", "exists already"),
        (tmp_path / "no/such/file", "its folder .* does not exist"),
        (SHIPPED.absolute(), "exists already"),
    ):
        records: list[dict] = []
        with pytest.raises(UserError, match=says):
            main(compose(*base, f"task.output={output}"), lambda e, r=records: r.append(to_record(e)))
        assert not of(records, "phase")
    with pytest.raises(UserError, match="what is being read"):
        main(compose(*base, f"task.output={SHIPPED.absolute()}", "task.overwrite=true"), lambda e: None)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["weights=random", "weights.levels=row", "task.format=modelopt"], "task.format=modelopt has one second-level scale"),
        (["task.format=compressed-tensors", "task.head=float"], "task.head=float: a trained head"),
        (["weights=random", "model=qwen3_0_6b", "task.format=hf"], "these weights are of no folder"),
        (["task.format=dat"], "needs 6 MiB, and the disk has 2 MiB left"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_first_step(overrides, says, compose, tmp_path, monkeypatch):
    """Not after hours of training, when all that is left of it is the message."""
    if overrides == ["task.format=dat"]:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 2 << 20))  # type: ignore[attr-defined]
    if "model=qwen3_0_6b" in overrides:
        small = json.loads((SHIPPED.parent / "config.json").read_text())
        overrides = [*overrides, *(f"++model.config.{k}={small[k]}" for k in SHAPE), "guard.force=true"]
    records: list[dict] = []
    with pytest.raises(UserError, match=says):
        main(compose(*TRAIN, *overrides, f"task.output={tmp_path / 'out'}"), lambda e: records.append(to_record(e)))
    assert of(records, "file", role="config") or of(records, "note"), "it got as far as the model"
    assert not of(records, "batch") and not of(records, "loss")
    assert list(tmp_path.iterdir()) == []


def test_rows_that_do_not_learn_may_keep_their_scales(compose, tmp_path):
    """A source whose q, k and v differ in their second level: layers that are frozen are written as they came."""
    out = tmp_path / "out"
    run(
        compose(
            "task=export", "task.format=modelopt", f"task.output={tmp_path / 'mo'}", "weights=random", "weights.levels=tensor"
        )
    )
    file = tmp_path / "mo/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.k_proj.weight_scale_2"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    base = [*TRAIN, "weights=hf", f"weights.path={tmp_path / 'mo'}", "task.format=modelopt", f"task.output={out}"]
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.\w_proj\.weight is trained with one a row"):
        run(compose(*base))
    run(compose(*base, "step.train_last_layers=1"))
    again = load_file(out / "model.safetensors")
    assert again["model.layers.0.self_attn.k_proj.weight_scale_2"] == tensors["model.layers.0.self_attn.k_proj.weight_scale_2"]


def test_export_needs_an_output(compose):
    with pytest.raises(UserError, match=r"task\.output=<file\.dat or folder>"):
        main(compose("task=export"), lambda e: None)


def test_choices_without_effect_are_told(compose):
    said = idle_choices(compose("task=export", "lr=1", "task.turns=2"), ["lr=1", "task.turns=2", "task.format=hf"])
    assert [s.split()[0] for s in said] == ["lr=1", "task.turns=2"]
