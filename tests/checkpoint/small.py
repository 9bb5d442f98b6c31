"""A small model's checkpoint in every format, for the tests of this folder."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fp4lab.checkpoint import open_weights
from fp4lab.model.config import EMBEDDING, HEAD
from fp4lab.nvfp4 import PackedTensor

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
LINEARS = {
    "self_attn.q_proj": (128, 64),
    "self_attn.k_proj": (64, 64),
    "self_attn.v_proj": (64, 64),
    "self_attn.o_proj": (64, 128),
    "mlp.gate_proj": (112, 64),
    "mlp.up_proj": (112, 64),
    "mlp.down_proj": (64, 112),
}
NORMS = {"input_layernorm": 64, "post_attention_layernorm": 64, "self_attn.q_norm": 32, "self_attn.k_norm": 32}


def floats(dtype=torch.bfloat16, tied=True) -> dict[str, torch.Tensor]:
    """Every tensor of the model, by name. The linears of a group differ in size of values."""
    g = torch.Generator().manual_seed(7)
    out = {EMBEDDING: torch.randn(96, 64, generator=g) * 0.5}
    for i in range(2):
        for n, (name, shape) in enumerate(LINEARS.items()):
            out[f"model.layers.{i}.{name}.weight"] = torch.randn(shape, generator=g) * 0.02 * (n + 1)
        for name, size in NORMS.items():
            out[f"model.layers.{i}.{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=g)
    out["model.norm.weight"] = 1 + 0.1 * torch.randn(64, generator=g)
    if not tied:
        out[HEAD] = torch.randn(96, 64, generator=g) * 0.1
    return {n: t.to(dtype) for n, t in out.items()}


def hf_folder(path: Path, tensors: dict[str, torch.Tensor] | None = None, shards: int = 1, **config) -> Path:
    """A Hugging Face folder with tokenizer files and a chat template."""
    tensors = floats() if tensors is None else tensors
    path.mkdir()
    names = list(tensors)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    else:
        where = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            mine = {n: tensors[n] for n in names[i::shards]}
            save_file(mine, path / file, metadata={"format": "pt", "shard": str(i)})
            where.update(dict.fromkeys(mine, file))
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}, indent=3))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "tokenizer_config.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "generation_config.json").write_text("{}")
    (path / "README.md").write_text("of the original")
    return path


def read_all(path: Path) -> dict[str, torch.Tensor | PackedTensor]:
    weights = open_weights("dat" if path.is_file() else "hf", path)
    try:
        return {n: weights.get(n) for n in weights.names()}
    finally:
        weights.close()


def same_value(a: torch.Tensor | PackedTensor, b: torch.Tensor | PackedTensor) -> bool:
    """Bit for bit, of whatever kind."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if not (isinstance(a, PackedTensor) and isinstance(b, PackedTensor)):
        return False
    same_second = a.global_scale is b.global_scale is None or (
        a.global_scale is not None and b.global_scale is not None and torch.equal(a.global_scale, b.global_scale)
    )
    return same_second and a.divide == b.divide and same_codes(a, b)


def same_codes(a: PackedTensor, b: PackedTensor) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.block_scale.view(torch.uint8), b.block_scale.view(torch.uint8))


def files_of(path: Path) -> dict[str, bytes]:
    """Contents by name, without the manifest, which names the source."""
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.name != "fp4lab_manifest.json"}
