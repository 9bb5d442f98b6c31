"""Model shape, read from a Qwen3 `config.json` and nothing else: no constant of the model lives in code."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fp4lab.errors import UserError

BLOCK = 16  # NVFP4 block: 16 input columns

# parameter-name suffixes of the linears of one layer, in the order the fused buffers hold them
ATTENTION_IN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP_IN = ("mlp.gate_proj", "mlp.up_proj")
LAYER_LINEARS = (*ATTENTION_IN, "self_attn.o_proj", *MLP_IN, "mlp.down_proj")
LAYER_NORMS = ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm")
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Qwen3Config:
    """The fields of a Qwen3 config.json that decide the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "model.config") -> "Qwen3Config":
        """Checked config. Raises UserError naming `source` and the key at fault."""
        v = dict(values)
        if v.get("model_type", "qwen3") != "qwen3":
            raise UserError(f"{source}: model_type is {v['model_type']!r}; only 'qwen3' is supported.")
        rope = v.get("rope_parameters") or {}  # transformers 5 moved rope_theta there
        if v.get("rope_theta") is None and rope.get("rope_theta") is not None:
            v["rope_theta"] = rope["rope_theta"]
        scaling = v.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", rope.get("rope_type", "default")))
        if kind not in ("default", None):
            raise UserError(f"{source}: rope scaling {kind!r} is not supported; expected none ('default').")
        for key in ("attention_bias", "use_sliding_window"):
            if v.get(key):
                raise UserError(f"{source}: {key}=true is not supported; expected false.")
        if v.get("hidden_act", "silu") != "silu":
            raise UserError(f"{source}: hidden_act is {v['hidden_act']!r}; expected 'silu'.")
        known = {f.name: f.type for f in fields(cls)}
        missing = [k for k in known if v.get(k) is None]
        if missing:
            raise UserError(f"{source}: {', '.join(missing)} missing; a Qwen3 config.json has every one of {list(known)}.")
        out: dict[str, Any] = {}
        for key, kind_ in known.items():
            value = v[key]
            if kind_ is bool:
                ok = isinstance(value, bool)
            elif kind_ is int:
                ok = isinstance(value, int) and not isinstance(value, bool) and value > 0
            else:
                ok = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
            if not ok:
                raise UserError(f"{source}: {key} is {value!r}; expected a positive {getattr(kind_, '__name__', kind_)}.")
            out[key] = float(value) if kind_ is float else value
        config = cls(**out)
        if config.num_attention_heads % config.num_key_value_heads:
            raise UserError(
                f"{source}: num_attention_heads={config.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={config.num_key_value_heads}; grouped-query attention needs that."
            )
        if config.head_dim % 2:
            raise UserError(f"{source}: head_dim={config.head_dim} is odd; rotary embedding needs pairs.")
        for name in ("hidden_size", "intermediate_size", "q_size"):
            if getattr(config, name) % BLOCK:
                raise UserError(f"{source}: {name}={getattr(config, name)} is not a multiple of {BLOCK}, the NVFP4 block.")
        return config

    @classmethod
    def from_json(cls, path: Path) -> "Qwen3Config":
        """Reads a config.json. Raises UserError for a missing or malformed file."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as e:
            raise UserError(f"{path}: cannot read the model config ({e.strerror}); set model.path to its folder.") from e
        except ValueError as e:
            raise UserError(f"{path}: not valid JSON ({e}).") from e
        if not isinstance(values, dict):
            raise UserError(f"{path}: expected a JSON object.")
        return cls.from_dict(values, str(path))

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": "qwen3", **asdict(self)}

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def linear_shape(self, suffix: str) -> tuple[int, int]:
        """[out, in] of a layer's linear, or of "lm_head"."""
        h, i = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (self.q_size, h),
            "self_attn.k_proj": (self.kv_size, h),
            "self_attn.v_proj": (self.kv_size, h),
            "self_attn.o_proj": (h, self.q_size),
            "mlp.gate_proj": (i, h),
            "mlp.up_proj": (i, h),
            "mlp.down_proj": (h, i),
            "lm_head": (self.vocab_size, h),
        }[suffix]

    def linears(self) -> dict[str, tuple[int, int]]:
        """Parameter name -> [out, in] of every linear of the layers (the head apart)."""
        return {
            f"model.layers.{i}.{s}.weight": self.linear_shape(s) for i in range(self.num_hidden_layers) for s in LAYER_LINEARS
        }

    def raw(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape of everything that is not a linear: embedding and norms."""
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, self.hidden_size)}
        for i in range(self.num_hidden_layers):
            for s in LAYER_NORMS:
                size = self.head_dim if s.endswith(("q_norm", "k_norm")) else self.hidden_size
                shapes[f"model.layers.{i}.{s}.weight"] = (size,)
        shapes[FINAL_NORM] = (self.hidden_size,)
        return shapes

    def learns(self, name: str, last_layers: int | None) -> bool:
        """Whether a tensor is trained when only the last layers are (None: all): their linears and norms, nothing else."""
        if last_layers is None:
            return True
        parts = name.split(".")
        return parts[1] == "layers" and int(parts[2]) >= self.num_hidden_layers - last_layers

    def num_parameters(self) -> int:
        head = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return head + sum(_product(s) for s in (*self.linears().values(), *self.raw().values()))


def _product(shape: tuple[int, ...]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n
