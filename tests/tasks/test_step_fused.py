"""step=fused as a run: the losses of step=chunked, less memory in the estimate, and what it refuses."""

import pytest

from fp4lab.choices import TASK_PHASES, check
from fp4lab.errors import UserError
from fp4lab.events import to_record
from fp4lab.tasks import step


def run(config):
    records: list[dict] = []
    check(config)
    step.run(config, lambda e: records.append(to_record(e)))
    return records


def of(records, kind):
    return [r for r in records if r["kind"] == kind]


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("weights=random",),
        ("step.master=packed", "recompute=block"),
        ("weights=random", "step.master=fp32"),
        ("step.master=fp32", "step.state=int8_block"),
        ("weights=random", "step.master=packed_residual"),
    ],
    ids=str,
)
def test_a_fused_run_is_a_chunked_run(compose, more):
    """Untied and tied heads, both roundings: losses, norm, agreement of the paths afterwards."""
    common = ("dtype=float32", "seq_len=16", "steps=3", "step.chunk_rows=64", *more)
    fused, chunked = (run(compose(f"step={name}", *common)) for name in ("fused", "chunked"))
    assert [p["name"] for p in of(fused, "phase")] == [p["name"] for p in of(chunked, "phase")]
    assert {p["name"] for p in of(fused, "phase")} == set(TASK_PHASES["step"])
    for ours, theirs in zip(of(fused, "loss"), of(chunked, "loss"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        if theirs["grad_norm"] is not None:
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert not any(d["fault"] for d in of(fused, "first_token_diff") if not d["pair"].endswith("R"))
    kinds = {r["tensor_kind"] for r in of(fused, "tensor_bytes")}
    own = {"state_w_data"} if "step.master=fp32" in more else set()  # step=chunked has it as its parameters
    assert kinds == {r["tensor_kind"] for r in of(chunked, "tensor_bytes")} - {"dense_param"} | own
    assert ("state_w_residual" in kinds) == ("step.master=packed_residual" in more)
    params = {name: sum(r["mib"] for r in of(records, "tensor_bytes") if r["tensor_kind"] == "model_param") for name, records in
              (("fused", fused), ("chunked", chunked))}  # fmt: skip
    assert params["fused"] < params["chunked"] / 3


@pytest.mark.parametrize("weights", ["shipped", "random"])
def test_a_packed_embedding_leaves_no_float_table(compose, weights):
    """Paths agree before and after, the loss falls, and a tied head is the embedding's bytes."""
    config = compose("step=fused", f"weights={weights}", "weights.embedding=nvfp4", "dtype=float32", "seq_len=16", "steps=3")
    records = run(config)
    pairs = of(records, "first_token_diff")
    assert {r["pair"] for r in pairs} == {"A-B", "A-C", "B-C"} and not any(r["fault"] for r in pairs)
    losses = of(records, "loss")
    assert losses[-1]["loss"] < losses[0]["loss"]
    held = {r["tensor_kind"]: r["mib"] for r in of(records, "tensor_bytes")}
    assert held["raw_param"] < 0.1 and held["state_w_codes"] == held["packed_codes"]
    (estimate,) = of(records, "estimate")
    assert estimate["rows"]["embedding and norms"] < 0.1


def test_a_packed_embedding_is_for_fused_training_and_for_evaluation(compose):
    with pytest.raises(UserError, match="use step=fused"):
        check(compose("weights.embedding=nvfp4"))
    with pytest.raises(UserError, match="no unquantised weights"):
        check(compose("weights.embedding=nvfp4", "backend=dense", "task=chat"))
    check(compose("weights.embedding=nvfp4", "backend=bridge"))
    check(compose("weights.embedding=nvfp4", "task=compare"))


def test_the_estimate_knows_it(compose):
    need = {}
    for name in ("fused", "chunked"):
        (estimate,) = of(run(compose(f"step={name}", "seq_len=8", "step.chunk_rows=64")), "estimate")
        need[name] = estimate["total_mib"] - estimate["rows"]["process before the model"]
    assert need["fused"] < 0.75 * need["chunked"]


@pytest.mark.parametrize(
    "choice, word",
    [
        ("step.clip_grad=1.0", "step.max_update"),
        ("loss=scalar", "loss=ce"),
        ("backend=dense", "backend=fp2"),
        ("quirk.pack_everything=true", "step=chunked"),
    ],
)
def test_what_it_cannot_do_is_refused_with_an_alternative(compose, choice, word):
    with pytest.raises(UserError, match=word) as e:
        check(compose("step=fused", choice))
    assert choice.partition("=")[0].split(".")[0] in str(e.value)


def test_choices_without_effect_are_said(compose):
    records = run(compose("step=fused", "seq_len=8", "step.chunk_rows=64", "step.offload_mv=true"))
    assert any("step.offload_mv=true has no effect" in n["text"] for n in of(records, "note"))
