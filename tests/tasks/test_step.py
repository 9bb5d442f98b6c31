"""The step task on the shipped model, in this process: phases, losses, agreement of the paths, what is refused."""

import pytest
import torch

from fp4lab.choices import TASK_PHASES, check
from fp4lab.errors import PlannedStop, UserError
from fp4lab.events import to_record
from fp4lab.tasks import step, tune
from fp4lab.tasks.worker import main


def run(config, task=step.run):
    """Records of a run; a planned stop is a success."""
    records: list[dict] = []
    check(config)
    try:
        task(config, lambda e: records.append(to_record(e)))
    except PlannedStop:
        records.append({"kind": "stopped"})
    return records


def of(records, kind):
    return [r for r in records if r["kind"] == kind]


def test_phases_come_in_order_and_the_paths_agree_before_and_after(compose):
    records = run(compose("seq_len=16", "step.chunk_rows=64"))
    assert [r["name"] for r in of(records, "phase")] == list(TASK_PHASES["step"])
    pairs = of(records, "first_token_diff")
    assert {(r["pair"], r["when"]) for r in pairs} == {(p, w) for p in ("A-B", "A-C", "B-C") for w in ("before", "after")}
    assert all(r["top1_equal"] and r["kl"] < 1e-6 for r in pairs)
    tokens = of(records, "first_token")
    assert all(r["hidden_nan"] == r["logits_nan"] == 0 and len(r["top10"]) == 10 for r in tokens)
    assert tokens[0]["top10"][0][2] == "Hello"
    train, after = of(records, "loss")
    assert train["split"] == "train" and after["split"] == "eval" and after["loss"] < train["loss"]
    assert {r["role"] for r in of(records, "file")} == {"config", "tokenizer", "weights", "data"}
    assert all(len(r["sha256"]) == 64 for r in of(records, "file"))


def test_chunk_rows_gives_the_same_loss(compose):
    losses = [of(run(compose("seq_len=8", f"step.chunk_rows={rows}")), "loss")[-1]["loss"] for rows in (16, 64)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("phase", ["model_loaded", "forward_done", "optimizer_step_done"])
def test_stop_after(compose, phase):
    records = run(compose("seq_len=8", f"stop_after={phase}"))
    assert of(records, "phase")[-1]["name"] == phase and records[-1]["kind"] == "stopped"


@pytest.mark.parametrize("backend", ["bridge", "noste"])
def test_backends_that_cannot_be_trained_evaluate(compose, backend):
    records = run(compose(f"backend={backend}", "seq_len=16", "step.chunk_rows=16", "kvc=prefill"))
    names = [r["name"] for r in of(records, "phase")]
    assert names[-2:] == ["forward_done", "cleanup_done"] and "backward_done" not in names
    (loss,) = of(records, "loss")
    assert loss["trained"] is False and loss["split"] == "eval"
    idle = [r["text"] for r in of(records, "note") if r["topic"] == "no_effect"]
    assert any("step.chunk_rows" in t for t in idle) and any("kvc" in t for t in idle)


def test_b_and_c_evaluate_to_the_same_loss(compose):
    """The loss of an untouched checkpoint does not depend on the path."""
    losses = []
    for backend in ("fp2", "noste", "bridge"):
        records = run(compose(f"backend={backend}", "seq_len=32", "stop_after=optimizer_step_done"))
        losses.append(of(records, "loss")[0]["loss"] if backend != "fp2" else None)
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)


@pytest.mark.parametrize(
    "overrides", [["step=dense"], ["backend=dense"], ["backend=dense", "step=dense"], ["step.master=fp32"]]
)
def test_float_masters(compose, overrides):
    """Every combination trains, and A, B and C see the new weights."""
    records = run(compose("seq_len=16", "lr=1e-3", "step.chunk_rows=64", *overrides))
    losses = of(records, "loss")
    assert losses[-1]["loss"] < losses[0]["loss"]
    last = {r["pair"]: r for r in of(records, "first_token_diff") if r["when"] == "after"}
    assert last["A-C"]["kl"] < 1e-6 and last["B-C"]["kl"] < 1e-6


def test_dense_step_equals_chunked_with_plain_state(compose):
    losses = []
    common = ("backend=dense", "dtype=float32", "seq_len=16", "steps=3", "lr=1e-3", "step.weight_decay=0.1")
    for overrides in (["step=dense"], ["step.state=fp32", "step.master=fp32", "step.chunk_rows=16"]):
        records = run(compose(*common, *overrides))
        losses.append([r["loss"] for r in of(records, "loss")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the order of sums differs by thread count


def test_random_weights_have_a_dense_path(compose):
    records = run(compose("weights=random", "seq_len=8", "stop_after=first_token_done"))
    assert {r["path"] for r in of(records, "first_token")} == {"A.infer", "B.fp2_ste", "C.noste_graph", "R.dense"}


def test_w4a4_is_said_and_differs(compose):
    records = run(compose("backend=noste", "backend.activations=nvfp4", "seq_len=8", "stop_after=first_token_done"))
    assert any(r["topic"] == "activations" for r in of(records, "note"))
    assert all(r["activations"] == "nvfp4" for r in of(records, "first_token"))


def test_tensor_bytes_find_what_is_shared(compose):
    """The optimizer's packed weights are the store's: counted once."""
    records = run(compose("seq_len=8", "stop_after=state_initialized"))
    rows = {r["tensor_kind"]: r for r in of(records, "tensor_bytes")}
    assert rows["packed_codes"]["duplicate_mib"] == pytest.approx(rows["packed_codes"]["mib"])
    assert rows["state_m_codes"]["duplicate_mib"] == 0


def test_incidents_can_be_switched_on_and_are_caught(compose):
    """quirk.*: B leaves A and C; the loss without the final norm is out of range; each is said."""
    for quirk, layer in (("scale_bytes_undecoded", 0), ("rope_theta_1e6", None)):
        theta = [] if quirk == "scale_bytes_undecoded" else ["weights=random", "model.path=null", f"++model.config={THETA_5E6}"]
        records = run(compose("seq_len=8", "stop_after=first_token_done", f"quirk.{quirk}=true", *theta))
        pairs = {r["pair"]: r for r in of(records, "first_token_diff")}
        assert pairs["A-C"]["kl"] < 1e-6 and pairs["B-C"]["max_abs_logit"] > 1e-4, quirk
        assert layer is None or pairs["B-C"]["first_divergent_layer"] == layer
        assert any(quirk in r["text"] for r in of(records, "note"))
    losses = []
    for on in ("false", "true"):
        records = run(compose("data.path=data/samples/train-inputs.txt", f"quirk.no_final_norm={on}", "step.chunk_rows=64"))
        losses.append(of(records, "loss")[0]["loss"])
    assert losses[1] > 3 * losses[0]


THETA_5E6 = (
    "{vocab_size:4096,hidden_size:64,intermediate_size:64,num_hidden_layers:2,num_attention_heads:2,num_key_value_heads:1,"
    "head_dim:64,rms_norm_eps:1e-6,rope_theta:5000000,tie_word_embeddings:true,max_position_embeddings:64}"
)


@pytest.mark.parametrize(
    "overrides, word",
    [
        (["lr=-1"], "lr=-1"),
        (["step.chunk_rows=0"], "step.chunk_rows=0"),
        (["step.beta1=1.0"], "step.beta1"),
        (["model=qwen3_4b"], "weights=random"),
        (["weights=dat"], "weights.path"),
        (["weights=dat", "weights.path=models/tiny/modle.dat"], "model.dat"),
        (["backend.native_fp4=true"], "native_fp4"),
        (["backend.native_fp4=true", "backend.activations=nvfp4", "device=cpu"], "no FP4 matrix units"),
        (["data.path=nowhere.tsv"], "nowhere.tsv"),
        (["model.path=models"], "config.json"),
    ],
)
def test_what_cannot_be_is_refused_by_name(compose, overrides, word):
    with pytest.raises(UserError, match=word.replace(".", r"\.")):
        run(compose(*overrides))


def test_cuda_without_a_device_is_refused(compose):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(UserError, match="device=cuda"):
        run(compose("device=cuda"))


def test_tune_trains_evaluates_answers_and_writes(compose, tmp_path):
    """A few steps from the shipped weights; the file it writes is a checkpoint that the step task loads."""
    output = tmp_path / "out.dat"
    config = compose(
        "task=tune", "step=dense", "task.batch_size=4", "steps=4", "lr=1e-4", "data.path=data/dialogues/zh_greetings.jsonl",
        "seq_len=48", "task.prompts=[hi]", "task.max_tokens=4", f"task.output={output}",
    )  # fmt: skip
    records: list[dict] = []
    main(config, lambda e: records.append(to_record(e)))
    assert {r["path"] for r in of(records, "turn")} == {"A.infer", "B.fp2_ste", "C.noste_graph"}
    assert len({r["text"] for r in of(records, "turn")}) == 1
    again = run(compose("weights=dat", f"weights.path={output}", "seq_len=8", "stop_after=first_token_done"))
    before = [r for r in of(records, "first_token") if r["path"] == "A.infer"][-1]["top10"]
    after = next(r for r in of(again, "first_token") if r["path"] == "A.infer")["top10"]
    assert [t[0] for t in before][:3] == [t[0] for t in after][:3]


def test_tune_is_the_same_training_whatever_the_step(compose):
    """With fp32 state and master: torch's AdamW, in chunks, or inside the backward; and the 4-bit ones report their health."""
    common = ("task=tune", "task.batch_size=4", "steps=3", "task.log_every=1", "task.warmup_steps=1", "seq_len=48",
              "data.path=data/dialogues/zh_greetings.jsonl", "step.chunk_rows=4096", "dtype=float32")  # fmt: skip
    plain = ("step.master=fp32", "step.state=fp32")
    losses = {}
    joined = ("step=chunked", "step.join=true", *plain)
    for choice in (("step=dense",), ("step=chunked", *plain), joined, ("step=fused", *plain), ("step=fused",)):
        records: list[dict] = []
        main(compose(*common, *choice), lambda e: records.append(to_record(e)))  # noqa: B023
        losses[choice] = [r["loss"] for r in of(records, "loss")]
        assert len(losses[choice]) == 4 and of(records, "loss")[-1]["split"] == "eval"
        assert [r["step"] for r in of(records, "state_health")] == ([] if choice == ("step=dense",) else [1, 2, 3])
        assert {r["path"] for r in of(records, "first_token")} >= {"A.infer", "B.fp2_ste"}
    dense, chunked, joined, fused, packed = losses.values()
    assert joined == chunked
    assert chunked == pytest.approx(dense, rel=1e-4) and fused == pytest.approx(dense, rel=1e-4)
    assert packed[0] == pytest.approx(dense[0], rel=1e-5) and packed[-1] != pytest.approx(dense[-1], rel=1e-4)


def test_the_shipped_model_answers(compose):
    """ "hi", the UFO prompt, 你是誰 and a follow-up, on A, B and C."""
    from fp4lab.tasks.session import open_session

    session = open_session(compose(), lambda e: None)
    records: list[dict] = []
    prompts = ["hi", "write one short sentence about UFO and you", "你是誰", "my name is Mia\nwhat is my name?"]
    tune.answer(session, prompts, 40, lambda e: records.append(to_record(e)))
    for path in ("A.infer", "B.fp2_ste", "C.noste_graph"):
        texts = [r["text"] for r in records if r["path"] == path]
        assert texts[0].startswith("Hello! I am Tiny")
        assert "UFO" in texts[1] and texts[1].endswith(".")
        assert texts[2].startswith("我是 Tiny")
        assert "Mia" in texts[4]
