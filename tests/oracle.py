"""Small random Qwen3 models of several shapes, and transformers' model on the same weights."""

import functools

import pytest
import torch

from fp4lab.model.config import HEAD, Qwen3Config
from fp4lab.model.store import build_store
from fp4lab.nvfp4 import pack, unpack

SHAPES = {
    "head_dim 128, hidden 96, 1 group": {
        "hidden_size": 96,
        "head_dim": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "untied, 4 groups": {
        "hidden_size": 64,
        "head_dim": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "tied, 4 groups, other theta": {
        "hidden_size": 64,
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_theta": 1e4,
    },
}
COMMON = {
    "vocab_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e6,
    "max_position_embeddings": 64,
}


def shape_of(name: str) -> Qwen3Config:
    return Qwen3Config.from_dict({**COMMON, **SHAPES[name]})


def hf_model(name, seed=1, **changes):
    """transformers' model of SHAPES[name] in fp32, with random weights and norms."""
    transformers = pytest.importorskip("transformers")
    values = {**COMMON, **SHAPES[name], **changes}
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        **{k: v for k, v in values.items() if k != "rope_theta"},
        rope_parameters={"rope_type": "default", "rope_theta": values["rope_theta"]},
        attn_implementation="sdpa",
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def weights_of(model):
    """By name; without a head that is tied."""
    return {n: t.detach() for n, t in model.state_dict().items() if n != HEAD or not model.config.tie_word_embeddings}


@torch.no_grad()
def dequantised_hf(name, store):
    """transformers' model with the dequantised weights of `store`, its head untied since that one is quantised."""
    model = hf_model(name, tie_word_embeddings=False)
    for key, p in model.named_parameters():
        p.copy_(unpack(store.packed[key]) if key in store.packed else store.raw[key])
    return model


def store_of(shape, weights, dtype=torch.float32, levels="single", keep_dense=True, pack_embedding=False):
    return build_store(
        shape,
        set(weights),
        weights.__getitem__,
        device="cpu",
        dtype=dtype,
        quantise=functools.partial(pack, rule="torchao", levels=levels),
        keep_dense=keep_dense,
        source="test",
        pack_embedding=pack_embedding,
    )
