"""The Qwen3 graph against transformers, and the paths against each other."""

import pytest
import torch
from oracle import COMMON, SHAPES, hf_model, shape_of, store_of, weights_of

from fp4lab.errors import UserError
from fp4lab.model.config import HEAD, Qwen3Config
from fp4lab.model.paths import bridge_model, clear_eval_cache, dense_model, fp2_model, noste_model, reference_model
from fp4lab.model.store import build_store
from fp4lab.nvfp4 import PackedTensor, pack, unpack


@pytest.fixture(params=SHAPES)
def oracle(request):
    """(shape, transformers' model in fp32 with random norms, its weights by name)."""
    model = hf_model(request.param)
    return shape_of(request.param), model, weights_of(model)


IDS = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(path, ids=IDS):
    return path.logits(path.hidden(ids))


def test_dense_equals_transformers(oracle):
    shape, model, weights = oracle
    ours = logits_of(reference_model(store_of(shape, weights), torch.float32))
    with torch.no_grad():
        theirs = model(IDS).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("levels", ["single", "tensor", "row"])
def test_packed_paths_equal_transformers_on_dequantised_weights(oracle, levels):
    """A and C compute what a dense model computes with the dequantised weights."""
    shape, model, weights = oracle
    store = store_of(shape, weights, levels=levels)
    dequantised = {n: unpack(p) for n, p in store.packed.items()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in dequantised and name != HEAD:
                p.copy_(dequantised[name])
        hidden = model.model(IDS).last_hidden_state
        theirs = hidden @ dequantised[HEAD].T
    for path in (bridge_model(store, torch.float32), noste_model(store, torch.float32, "none")):
        torch.testing.assert_close(logits_of(path), theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("activations", ["none", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untouched_checkpoint_gives_a_equal_b_equal_c(oracle, activations, dtype):
    """The reference system never reached this (its sections 0.1 and 2.4)."""
    shape, _, weights = oracle
    store = store_of(shape, weights, dtype=dtype)
    c = logits_of(noste_model(store, dtype, activations))
    b = logits_of(fp2_model(store, dtype, dtype, activations))
    a = logits_of(bridge_model(store, dtype, activations))
    assert torch.equal(b, c)
    tolerance = 1e-4 if dtype == torch.float32 and activations == "none" else 0.1
    torch.testing.assert_close(a, c, atol=tolerance * float(c.abs().max()), rtol=0)


def test_w4a4_is_not_w4a16(oracle):
    shape, _, weights = oracle
    store = store_of(shape, weights)
    assert not torch.equal(
        logits_of(noste_model(store, torch.float32, "nvfp4")), logits_of(noste_model(store, torch.float32, "none"))
    )


@pytest.mark.parametrize("split", [1, 5, 16])
def test_cache_gives_the_logits_of_a_replay(oracle, split):
    """Prefill at an offset sees no future token (reference 0.4), then token by token."""
    shape, _, weights = oracle
    store = store_of(shape, weights)
    for path in (bridge_model(store, torch.float32), noste_model(store, torch.float32, "none")):
        whole = logits_of(path)
        cache = path.new_cache(2, 17)
        with torch.no_grad():
            first = path.logits(path.hidden(IDS[:, :3], cache))
            parts = [first]
            for start in range(3, 17, split):
                parts.append(path.logits(path.hidden(IDS[:, start : start + split], cache)))
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match="17 tokens"), torch.no_grad():
            path.hidden(IDS[:, :1], cache)


def test_straight_through_gradient_is_that_of_the_dequantised_weight(oracle):
    """Forward: exactly the dequantised value. Backward: the master gets the gradient of that value."""
    shape, _, weights = oracle
    store = store_of(shape, weights)
    b = fp2_model(store, torch.float32, torch.float32)
    dequantised = {n: unpack(p) for n, p in store.packed.items() if n != HEAD or not store.tied}
    if store.tied:
        pytest.skip("a tied head shares its master with the embedding, which is not quantised")
    r = dense_model(store_of(shape, {**weights, **dequantised}), torch.float32)
    for model in (b, r):
        model.logits(model.hidden(IDS)).square().mean().backward()
    theirs = dict(r.named_parameters())
    for name, p in b.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name].grad, atol=1e-5, rtol=1e-4)


def test_eval_cache_is_used_cleared_and_never_stale_in_training(oracle):
    shape, _, weights = oracle
    store = store_of(shape, weights)
    model = fp2_model(store, torch.float32, torch.float32, eval_cache=True)
    before = logits_of(model)
    name = "model.layers.0.mlp.down_proj.weight"
    store.update(name, pack(torch.zeros(store.packed[name].shape)))
    assert torch.equal(logits_of(model), before), "the cache holds"
    assert not torch.equal(model.logits(model.hidden(IDS)), before), "with gradients on it is not used"
    clear_eval_cache(model)
    assert not torch.equal(logits_of(model), before)


def test_every_path_sees_an_update_of_the_store():
    """Fused and plain products read the same bytes."""
    shape = shape_of("untied, 4 groups")
    torch.manual_seed(0)
    weights = {
        n: torch.randn(s) * 0.1 for n, s in {**shape.linears(), **shape.raw(), HEAD: shape.linear_shape("lm_head")}.items()
    }
    store = store_of(shape, weights)
    a, c = bridge_model(store, torch.float32), noste_model(store, torch.float32, "none")
    before = logits_of(a)
    name = "model.layers.1.self_attn.k_proj.weight"
    store.update(name, pack(torch.randn(store.packed[name].shape)))
    assert not torch.equal(logits_of(a), before)
    torch.testing.assert_close(logits_of(a), logits_of(c), atol=1e-4, rtol=1e-4)


def test_packed_and_raw_checkpoint_tensors_are_used_as_they_are():
    """A packed checkpoint is not quantised again."""
    shape = shape_of("untied, 4 groups")
    torch.manual_seed(0)
    weights: dict = {n: pack(torch.randn(s)) for n, s in {**shape.linears(), HEAD: shape.linear_shape("lm_head")}.items()}
    weights |= {n: torch.randn(s) for n, s in shape.raw().items()}
    store = build_store(
        shape, set(weights), weights.__getitem__, device="cpu", dtype=torch.float32, quantise=pack, keep_dense=True, source="x"
    )
    assert store.dense is None
    for name, value in weights.items():
        if isinstance(value, PackedTensor):
            assert torch.equal(store.packed[name].codes, value.codes)


@pytest.mark.parametrize("broken", ["missing", "shape", "no head"])
def test_a_wrong_checkpoint_is_named(broken):
    shape = shape_of("untied, 4 groups")
    weights = {n: torch.zeros(s) for n, s in {**shape.linears(), **shape.raw(), HEAD: shape.linear_shape("lm_head")}.items()}
    victim = HEAD if broken == "no head" else "model.layers.1.mlp.up_proj.weight"
    if broken == "shape":
        weights[victim] = torch.zeros(16, 16)
    else:
        del weights[victim]
    with pytest.raises(UserError, match=victim.replace(".", r"\.")):
        store_of(shape, weights)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim"),
        ({"hidden_size": 100}, "hidden_size=100"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"rope_theta": None}, "rope_theta missing"),
        ({"model_type": "llama"}, "llama"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ],
)
def test_a_wrong_config_names_its_key(change, word):
    with pytest.raises(UserError, match=word):
        Qwen3Config.from_dict({**COMMON, **SHAPES["untied, 4 groups"], **change})


def test_config_reads_both_places_of_rope_theta():
    values = {**COMMON, **SHAPES["untied, 4 groups"]}
    moved = {**values, "rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}
    assert Qwen3Config.from_dict(moved) == Qwen3Config.from_dict(values)


def test_qwen3_4b_counts(compose):
    """Reference section 2.3: 3,633,509,376 in layers, 388,956,160 in the embedding."""
    shape = Qwen3Config.from_dict(compose("model=qwen3_4b", "weights=random")["model"]["config"])
    assert shape.num_parameters() == 3_633_509_376 + 388_956_160 + 2560
    assert len(shape.linears()) == 252
