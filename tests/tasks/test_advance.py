"""One step of task=tune: parts of a batch, gates, the last layers alone, and samples that share a row."""

import json

import pytest
import torch

from fp4lab.choices import check
from fp4lab.errors import Diverged, PlannedStop, UserError
from fp4lab.events import to_record
from fp4lab.tasks import tune
from fp4lab.tasks.advance import Advance
from fp4lab.tasks.session import open_session
from fp4lab.tasks.worker import main
from fp4lab.train.batches import batches
from fp4lab.train.data import load_samples

COMMON = ("task=tune", "task.batch_size=4", "seq_len=48", "data.path=data/dialogues/zh_greetings.jsonl", "dtype=float32",
          "step.chunk_rows=65536")  # fmt: skip
EXACT = ("step.master=fp32", "step.state=fp32")
STEPS = (
    ("step=dense",),
    ("step=chunked", *EXACT),
    ("step=chunked", "step.join=true"),
    ("step=fused",),
    ("step=fused", *EXACT),
)


def opened(compose, *overrides: str):
    config = compose(*COMMON, *overrides)
    check(config)
    return open_session(config, lambda e: None)


def run(compose, *overrides: str) -> list[dict]:
    records: list[dict] = []
    main(compose(*COMMON, "step=fused", "steps=1", *overrides), lambda e: records.append(to_record(e)))
    return records


def first_batch(session, pack: bool):
    samples = load_samples(session.config["data"]["path"], session.tokenizer, session.config["seq_len"], split="train")
    return next(batches(samples, 4, session.tokenizer.endoftext, 1, seq_len=session.config["seq_len"], pack=pack))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("step", [("step=dense",), ("step=chunked", *EXACT)])
def test_parts_of_a_batch_are_the_same_step(compose, step, pack):
    """Also where the parts have different numbers of targets, and with more parts than rows that have any."""
    after, done = [], []
    for parts in (1, 3, 4):
        session = opened(compose, *step, f"task.accumulate={parts}")
        advance = Advance(session, lambda e: None)
        done.append(advance(first_batch(session, pack), 1e-3))
        after.append({n: p.detach().clone() for n, p in session.model.named_parameters()})
    for other, values in zip(done[1:], after[1:], strict=True):
        assert other.loss == pytest.approx(done[0].loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(done[0].grad_norm, rel=1e-4)
        for name, value in after[0].items():  # Adam's first step is a sign: where the gradient is noise it may turn
            assert float(((values[name] - value).abs() > 1e-4).float().mean()) < 0.01, name


def test_fused_cannot_accumulate_and_says_what_to_do(compose):
    with pytest.raises(UserError, match=r"task.accumulate=2: step=fused uses each gradient .* Use step=chunked"):
        check(compose(*COMMON, "step=fused", "task.accumulate=2"))


@pytest.mark.parametrize("step", STEPS, ids=" ".join)
def test_the_last_layers_alone_learn(compose, step):
    session = opened(compose, *step, "step.train_last_layers=2")
    before = {n: p.codes.clone() for n, p in session.store.packed.items()}
    raw = {n: t.clone() for n, t in session.store.raw.items()}
    advance = Advance(session, lambda e: None)
    for _ in range(2):
        advance(first_batch(session, False), 2e-2)
    moved = {n for n, p in session.store.packed.items() if not torch.equal(p.codes, before[n])}
    moved |= {n for n, t in session.store.raw.items() if not torch.equal(t, raw[n])}
    wanted = {n for n in (*before, *raw) if n.startswith(("model.layers.4.", "model.layers.5."))}
    assert moved == wanted


def test_more_layers_than_there_are(compose):
    with pytest.raises(UserError, match=r"step\.train_last_layers=7: the model has 6 layers"):
        opened(compose, "step.train_last_layers=7")
    with pytest.raises(UserError, match=r"step\.train_last_layers=0: expected a number of at least 1"):
        opened(compose, "step.train_last_layers=0")


def poisoned(session):
    """A gradient of one element is NaN, and the loss is not."""
    parameter = session.model.model.layers[0].input_layernorm.weight
    parameter.register_hook(lambda g: torch.where(torch.arange(len(g)) == 3, torch.nan, g))
    return parameter


def test_samples_beyond_the_window_are_told(compose, tmp_path):
    """Cut, left out, or all of them: then with what to do."""
    (tmp_path / "d.tsv").write_text("who are you?\tI am Tiny.\nhi\tI am a small language model, and this is a long answer.\n")
    for seq_len, says in ((64, []), (18, ["1 of 2 samples are cut to seq_len=18"])):
        records = run(compose, f"data.path={tmp_path / 'd.tsv'}", f"data.held_out={tmp_path / 'd.tsv'}", f"seq_len={seq_len}")
        assert [r["text"] for r in records if r["kind"] == "note" and r["topic"] == "window"] == says
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "bye " * 20},
    ]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": turns}))
    with pytest.raises(UserError, match=r"data.path=.*d.jsonl: no target fits into seq_len=12; give a larger one"):
        run(compose, f"data.path={tmp_path / 'd.jsonl'}", f"data.held_out={tmp_path / 'd.jsonl'}", "seq_len=12")


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_update(compose):
    session = opened(compose, "step=chunked", *EXACT)
    parameter = poisoned(session)
    start = parameter.detach().clone()
    with pytest.raises(Diverged, match="the gradient's norm is nan at step 0, and the loss was finite"):
        Advance(session, lambda e: None)(first_batch(session, False), 1e-3)
    assert torch.equal(parameter, start)


def test_or_is_set_to_zero_and_said(compose):
    session = opened(compose, "step=chunked", *EXACT, "step.sanitize=true")
    parameter = poisoned(session)
    start, notes = parameter.detach().clone(), []
    done = Advance(session, lambda e: notes.append(to_record(e)))(first_batch(session, False), 1e-3)
    assert done.grad_norm > 0 and parameter[3] == start[3] and not torch.equal(parameter, start)
    assert "step 0: 1 non-finite gradients were set to 0" in [r.get("text") for r in notes]


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_each_step_says_which_samples_it_saw(compose, order):
    """The order is written down: each sample once a pass, shuffled by the seed or as in the file."""
    data = "data/samples/whoami.tsv"
    config = compose(*COMMON, "step=chunked", "lr=0", "steps=3", f"data.path={data}", f"data.held_out={data}",
                     f"data.order={order}", "seed=5", "stop_after=optimizer_step_done")  # fmt: skip
    records: list[dict] = []
    with pytest.raises(PlannedStop):
        tune.run(config, lambda e: records.append(to_record(e)))
    found = [r["samples"] for r in records if r["kind"] == "batch"]
    assert [list(f) for f in found] == [[data]] * 3
    lines = [line for f in found for line in f[data]]
    assert sorted(lines) == list(range(2, 14))  # line 1 is a comment
    assert (lines == sorted(lines)) is (order == "sequential")


@pytest.mark.parametrize("step", [("step=dense",), ("step=fused",)])
def test_samples_that_share_a_row_train_like_alone(compose, step):
    """The loss of packed rows is that of the same samples, each in a row of its own."""
    losses = []
    for pack in (True, False):
        session = opened(compose, *step)
        samples = load_samples(session.config["data"]["path"], session.tokenizer, 48)[:4]
        (batch,) = batches(samples, 4, session.tokenizer.endoftext, 1, seq_len=256, pack=pack)
        assert (batch.ids[:, 0] != session.tokenizer.endoftext).sum() == (1 if pack else 4)
        losses.append(Advance(session, lambda e: None)(batch, 0.0))
    packed, alone = losses
    assert packed.loss == pytest.approx(alone.loss, rel=1e-5)
    assert packed.grad_norm == pytest.approx(alone.grad_norm, rel=1e-4)
