"""The Qwen3 block graph, written once. `make_linear` decides what each linear is (see `linears`).

Parameter names equal those of the Hugging Face checkpoint. Oracle: transformers' Qwen3ForCausalLM.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fp4lab.model.config import EMBEDDING, FINAL_NORM, Qwen3Config
from fp4lab.model.layers import (
    KVCache,
    Rope,
    attend,
    heads,
    joint_silu_mul,
    residual_norm,
    rms_norm,
    rotate,
    silu_mul,
    within,
)
from fp4lab.model.linears import ConsumingLinear, lookup
from fp4lab.nvfp4 import PackedTensor

MakeLinear = Callable[[str], nn.Module]  # parameter name, or "...qkv" or "...gate_up" of a joint one -> its linear


def recomputed(module: nn.Module, run: Callable[..., Tensor], *args: Any) -> Tensor:
    """run(*args), of which the backward computes again what it needs. `module` has the linears that run in it."""
    linears = [m for m in module.modules() if isinstance(m, ConsumingLinear)]

    @contextmanager
    def again() -> Iterator[None]:
        for linear in linears:
            linear.again = True
        try:
            yield
        finally:
            for linear in linears:
                linear.again = False

    # Stopping early raises an error inside of the last linear, which torch 2.11 at times loses (SystemError). `last` is enough.
    with set_checkpoint_early_stop(False):
        return checkpoint(run, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))


class RMSNorm(nn.Module):
    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def residual(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + y, where there is a y, and the norm of it."""
        return residual_norm(x, y, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int, make: MakeLinear, raw: dict[str, nn.Parameter], joint: bool):
        super().__init__()
        self.layer, self.head_dim, self.joint = layer, config.head_dim, joint
        self.queries, self.keys = config.num_attention_heads, config.num_key_value_heads
        self.offset_mask = True  # False: quirk.no_offset_mask
        prefix = f"model.layers.{layer}.self_attn."
        if joint:
            self.qkv_proj = make(f"model.layers.{layer}.qkv")
        else:
            self.q_proj, self.k_proj, self.v_proj = (make(f"{prefix}{s}_proj.weight") for s in "qkv")
        self.o_proj = make(f"{prefix}o_proj.weight")
        self.q_norm = RMSNorm(raw[prefix + "q_norm.weight"], config.rms_norm_eps)
        self.k_norm = RMSNorm(raw[prefix + "k_norm.weight"], config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, mask: Tensor | None = None) -> Tensor:
        b, t, _ = x.shape

        def apart(y: Tensor) -> Tensor:  # [B, T, n * D] -> [B, T, n, D]
            return y.view(b, t, -1, self.head_dim)

        if self.joint:
            norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
            q, k, v = heads(self.qkv_proj(x), *norms, cos, sin, self.queries, self.keys)
        else:
            q = rotate(self.q_norm(apart(self.q_proj(x))).transpose(1, 2), cos, sin)
            k = rotate(self.k_norm(apart(self.k_proj(x))).transpose(1, 2), cos, sin)
            v = apart(self.v_proj(x)).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return self.o_proj(attend(q, k, v, self.offset_mask, mask).transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self, layer: int, make: MakeLinear, joint: bool):
        super().__init__()
        prefix, self.joint = f"model.layers.{layer}.mlp.", joint
        if joint:
            self.gate_up_proj = make(f"model.layers.{layer}.gate_up")
        else:
            self.gate_proj, self.up_proj = (make(f"{prefix}{s}_proj.weight") for s in ("gate", "up"))
        self.down_proj = make(f"{prefix}down_proj.weight")
        if isinstance(self.down_proj, ConsumingLinear):
            self.down_proj.last = True

    def forward(self, x: Tensor) -> Tensor:
        if self.joint:
            both = self.gate_up_proj(x)
            if isinstance(self.down_proj, ConsumingLinear):
                return self.down_proj.gated(both)
            return self.down_proj(joint_silu_mul(both))
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int, make: MakeLinear, raw: dict[str, nn.Parameter], joint: bool):
        super().__init__()
        prefix = f"model.layers.{layer}."
        self.input_layernorm = RMSNorm(raw[prefix + "input_layernorm.weight"], config.rms_norm_eps)
        self.self_attn = Attention(config, layer, make, raw, joint)
        self.post_attention_layernorm = RMSNorm(raw[prefix + "post_attention_layernorm.weight"], config.rms_norm_eps)
        self.mlp = MLP(layer, make, joint)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, mask: Tensor | None = None, recompute: str = "none"
    ) -> Tensor:
        """`recompute`: see `Qwen3`."""
        if recompute == "block":
            return recomputed(self, self.forward, x, cos, sin, cache, mask)
        x, normed = self.input_layernorm.residual(x, None)
        attended = self.self_attn(normed, cos, sin, cache, mask)
        if recompute == "selective":
            return recomputed(self.mlp, self._rest, x, attended)
        return self._rest(x, attended)

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x, normed = self.post_attention_layernorm.residual(x, attended)
        return x + self.mlp(normed)


class Embedding(nn.Module):
    """Not nn.Embedding, which wraps the given Parameter into a new one: a tied head would no longer share it.

    `weight` [V, H] may be packed; then it is no parameter.
    """

    def __init__(self, weight: nn.Parameter | PackedTensor, dtype: torch.dtype):
        super().__init__()
        self.weight, self.dtype = weight, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return lookup(self.weight, ids, self.dtype)


class Decoder(nn.Module):
    """Embedding, blocks, final norm: the part Hugging Face names `model.`."""

    def __init__(self, config: Qwen3Config, make: MakeLinear, raw: dict[str, Any], dtype: torch.dtype, joint: bool):
        super().__init__()
        self.embed_tokens: nn.Module = Embedding(raw[EMBEDDING], dtype)
        self.layers = nn.ModuleList(Block(config, i, make, raw, joint) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(raw[FINAL_NORM], config.rms_norm_eps)


class Qwen3(nn.Module):
    """`hidden` then `logits`, so that a caller pays for the head only where it wants logits.

    `joint`: q, k and v are one linear, and gate and up.
    """

    def __init__(
        self, config: Qwen3Config, make_linear: MakeLinear, raw: dict[str, Any], dtype: torch.dtype, joint: bool = False
    ):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.model = Decoder(config, make_linear, raw, dtype, joint)
        self.lm_head = make_linear("lm_head.weight")
        self.rope = Rope(config.head_dim, config.rope_theta, raw[FINAL_NORM].device)
        # What the backward computes again. block: all of a block; selective: its MLP, with its three wide activations
        self.recompute = "none"

    def hidden(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        trace: list[Tensor] | None = None,
        final_norm: bool = True,
        segments: Tensor | None = None,
    ) -> Tensor:
        """ids [B, T] int64 -> hidden states after the final norm [B, T, H] in the compute dtype.

        `final_norm=False` leaves it out (quirk.no_final_norm).
        `segments` [B, T]: a token sees only what came before it in its own segment. Not with a cache.
        `trace` receives the hidden states after each block, before the final norm.
        """
        x = self.model.embed_tokens(ids)
        cos, sin = self.rope.table(cache.length if cache else 0, ids.shape[1], self.dtype)
        mask = None if segments is None else within(segments)
        for block in self.model.layers:
            x = block(x, cos, sin, cache, mask, self.recompute if torch.is_grad_enabled() else "none")
            if trace is not None:
                trace.append(x)
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.model.norm(x) if final_norm else x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> logits [..., V], fp32."""
        return self.lm_head(hidden).float()

    def last_logits(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the last position, [B, V] fp32."""
        return self.logits(self.hidden(ids, cache)[:, -1])

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        c = self.config
        device = self.rope.inv_freq.device
        return KVCache(c.num_hidden_layers, batch, c.num_key_value_heads, capacity, c.head_dim, self.dtype, device)
