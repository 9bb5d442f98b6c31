"""task=compare: equal paths are equal, a fault is found at its layer and part, and nothing expected is called a fault."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import SHAPES, hf_model, shape_of, store_of, weights_of

from fp4lab.choices import TASK_PHASES, check
from fp4lab.errors import UserError
from fp4lab.events import to_record
from fp4lab.model.paths import bridge_model, fp2_model, noste_model, reference_model
from fp4lab.nvfp4 import pack, unpack
from fp4lab.tasks import compare
from fp4lab.tasks.microscope import PARTS, apart, first_part, layer_input, parts, trace
from fp4lab.tasks.probe import difference
from fp4lab.tasks.tolerance import expected, relative

IDS = [5, 17, 40, 2, 88, 31]


def run(config):
    records: list[dict] = []
    check(config)
    compare.run(config, lambda e: records.append(to_record(e)))
    return records


def small(layers):
    """Overrides: random weights of a small shape."""
    shape = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": layers, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6, "rope_theta": 5e6, "vocab_size": 4096}
    shape |= {"max_position_embeddings": 64, "tie_word_embeddings": True}
    return ["weights=random", "model.path=null", *(f"+model.config.{k}={v}" for k, v in shape.items())]


def of(records, kind):
    return [r for r in records if r["kind"] == kind]


def test_an_untouched_checkpoint_shows_no_fault(compose):
    records = run(compose("task=compare", "task.prompts=[hi,who are you]"))
    assert [p["name"] for p in of(records, "phase")] == list(TASK_PHASES["compare"])
    assert {(r["prompt"], r["pair"]) for r in of(records, "first_token_diff")} == {
        (p, pair) for p in ("hi", "who are you") for pair in ("A-B", "A-C", "B-C")
    }
    assert not any(r["fault"] for r in of(records, "first_token_diff"))
    layers = of(records, "layer_diff")
    assert len(layers) == 2 * 3 * 6 and not any(r["part"] for r in layers)
    assert all(r["cosine"] == pytest.approx(1, abs=1e-4) for r in layers)
    weights = of(records, "weight_diff")
    assert len(weights) == 43 and {r["relative_error"] for r in weights} == {0.0}
    assert {r["max_abs_difference"] for r in weights} == {0.0} and {r["codes_equal"] for r in weights} == {1.0}
    one, two, both = of(records, "loss")
    assert (one["step"], two["step"], both["tokens"]) == (0, 1, one["tokens"] + two["tokens"])
    mean = (one["loss"] * one["tokens"] + two["loss"] * two["tokens"]) / both["tokens"]
    assert both["loss"] == pytest.approx(mean)
    assert all(len(r["layer_rms"]) == 6 for r in of(records, "first_token"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("activations", ["none", "nvfp4"])
def test_quantisation_is_expected_and_said_to_be_so(compose, dtype, activations):
    records = run(compose("task=compare", "weights=random", f"dtype={dtype}", f"backend.activations={activations}"))
    pairs = {r["pair"]: r for r in of(records, "first_token_diff")}
    assert len(pairs) == 6 and not any(r["fault"] for r in pairs.values())
    assert pairs["A-R"]["kl"] > 100 * pairs["A-C"]["kl"] and "unquantised" in pairs["A-R"]["why"]
    masters = [r["master_relative_error"] for r in of(records, "weight_diff")]
    assert all(0.1 < x < 0.15 for x in masters), "reference 0.8: 0.11 to 0.13"


@pytest.mark.parametrize("quirk, part", [("scale_bytes_undecoded", "q"), ("rope_theta_1e6", None)])
def test_a_quirk_of_b_is_a_fault_of_b(compose, quirk, part):
    records = run(compose("task=compare", "dtype=float32", *small(2), f"quirk.{quirk}=true"))
    faults = {r["pair"] for r in of(records, "first_token_diff") if r["fault"]}
    assert {"A-B", "B-C"} <= faults and "A-C" not in faults
    found = [r["part"] for r in of(records, "layer_diff") if r["pair"] == "B-C" and r["part"]]
    assert found == [part or "attention"]
    assert max(r["max_abs_difference"] for r in of(records, "weight_diff")) > 1 or quirk == "rope_theta_1e6"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activations", ["none", "nvfp4"])
def test_depth_alone_is_no_fault(compose, dtype, activations):
    """As many layers as Qwen3-4B has: the tolerances were measured at 6."""
    records = run(compose("task=compare", *small(36), f"dtype={dtype}", f"backend.activations={activations}"))
    diffs = of(records, "first_token_diff")
    assert len(diffs) == 6 and not any(r["fault"] for r in diffs)
    assert all(r["relative_error"] <= r["expected"] for r in of(records, "layer_diff"))


def test_a_trace_holds_the_last_position_and_nothing_else(models):
    """A slice of [T, H] would hold all of it."""
    for path in models[1].values():
        whole: list = []
        with torch.no_grad():
            path.hidden(torch.tensor([IDS]), trace=whole)
        layers, hidden, _ = trace(path, IDS)
        assert len(layers) == len(whole)
        for x, full in zip(layers, whole, strict=True):
            assert torch.equal(x, full[0, -1])
        assert all(x.untyped_storage().nbytes() == 4 * x.numel() for x in (*layers, hidden))


def test_the_loss_in_pieces_is_the_loss(compose, monkeypatch):
    config = compose("task=compare", *small(2))
    whole = of(run(config), "loss")
    monkeypatch.setattr(compare, "_ROWS", 3)
    pieces = of(run(config), "loss")
    assert whole[0]["tokens"] > 6 and [r["loss"] for r in pieces] == pytest.approx([r["loss"] for r in whole], rel=1e-6)


@given(st.floats(1e-6, 1e6), st.integers(0, 1000))
def test_a_difference_is_the_same_both_ways(scale, seed):
    x, y = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))
    assert apart(x, scale * y) == pytest.approx(apart(scale * y, x))
    assert apart(x, x) == 0 and apart(x, 1e6 * x) == pytest.approx(1e6, rel=1e-4)
    assert apart(x, 0 * x) == math.inf and math.isnan(apart(x, math.nan * y))


@pytest.fixture(params=SHAPES)
def models(request):
    store = store_of(shape_of(request.param), weights_of(hf_model(request.param)))
    return store, {
        "A": bridge_model(store, torch.float32),
        "B": fp2_model(store, torch.float32, torch.float32),
        "C": noste_model(store, torch.float32),
        "R": reference_model(store, torch.float32),
    }


def test_parts_are_what_a_layer_computes(models):
    """Every path has all parts; together they are the layer."""
    _, paths = models
    x = layer_input(paths["C"], IDS, 1)
    seen = {name: parts(path, 1, x) for name, path in paths.items()}
    for name, found in seen.items():
        assert set(found) == set(PARTS)
        layers: list = []
        with torch.no_grad():
            paths[name].hidden(torch.tensor([IDS]), trace=layers)
        assert torch.equal(layer_input(paths[name], IDS, 1), layers[0])
    whole = x + seen["C"]["o"] + seen["C"]["down"]
    layers = []
    with torch.no_grad():
        paths["C"].hidden(torch.tensor([IDS]), trace=layers)
    torch.testing.assert_close(whole, layers[1])
    for part in PARTS:
        torch.testing.assert_close(seen["A"][part], seen["C"][part], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part", ["q", "k", "v", "o", "gate", "up", "down"])
def test_a_wrong_weight_is_found_by_name(part):
    """C with one linear replaced against A: the layer and the part come out."""
    store = store_of(shape_of("untied, 4 groups"), weights_of(hf_model("untied, 4 groups")))
    a, c = bridge_model(store, torch.float32), noste_model(store, torch.float32)
    block = c.model.layers[1]
    module = getattr(block.self_attn if part in "qkvo" else block.mlp, f"{part}_proj")
    module.packed = pack(1.1 * unpack(module.packed))
    diff = difference("A-C", torch.float32, "none", trace(a, IDS), trace(c, IDS))
    assert diff.fault and diff.first_divergent_layer == 1
    assert first_part(a, c, 1, layer_input(a, IDS, 1), relative("A-C", torch.float32, 1, "none")[0]) == part


def test_not_a_number_is_a_fault_in_its_layer(models):
    store, paths = models
    store.raw["model.layers.1.input_layernorm.weight"][3] = math.nan
    broken, whole = trace(paths["A"], IDS), trace(reference_of(store), IDS)
    diff = difference("A-R", torch.float32, "none", broken, whole)
    assert diff.fault and diff.first_divergent_layer == 1 and math.isnan(diff.kl)


def reference_of(store):
    """R with its own, healthy norms."""
    model = reference_model(store, torch.float32)
    weight = model.model.layers[1].input_layernorm.weight
    model.model.layers[1].input_layernorm.weight = torch.nn.Parameter(weight.detach().nan_to_num(1.0), requires_grad=False)
    return model


def test_tolerances_follow_their_rule():
    logits = torch.linspace(-3, 3, 1000)
    both = (logits, logits)
    fp32, bf16 = (expected("A-C", d, 6, "none", both) for d in (torch.float32, torch.bfloat16))
    assert bf16.relative / fp32.relative == pytest.approx(2**15 * 6 / 16)
    assert bf16.kl == pytest.approx(2 * (bf16.relative * float(logits.std())) ** 2)
    assert expected("A-C", torch.float32, 24, "none", both).relative == pytest.approx(2 * fp32.relative)
    assert expected("A-R", torch.float32, 999, "none", both).relative == 1.0
    assert "W4A4" in expected("A-C", torch.float32, 6, "nvfp4", both).why
    assert expected("A-C", torch.float32, 6, "none", (logits * math.nan, logits)).kl == fp32.kl


def test_prompts_from_a_file(compose, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo\n")
    assert compare.read_prompts(compose(f"task.prompt_file={path}")) == ["one", "two"]
    path.write_text("\n")
    with pytest.raises(UserError, match="no prompt in it"):
        compare.read_prompts(compose(f"task.prompt_file={path}"))
    with pytest.raises(UserError, match="cannot be read"):
        compare.read_prompts(compose("task.prompt_file=nowhere.txt"))
