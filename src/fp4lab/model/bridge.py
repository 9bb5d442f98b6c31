"""Path A, the inference forward: packed weights, fused q/k/v and gate/up products, logits of the last position only.

It is written apart from the block graph of `qwen3` on purpose: A equal to C tests the graph, and C equal to B
tests the straight-through estimator (reference section 1.1).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4lab.model.layers import KVCache, Rope, attend, rms_norm, rotate
from fp4lab.model.linears import lookup, packed_matmul
from fp4lab.model.store import WeightStore


class Bridge:
    """Inference over a WeightStore; holds no weights of its own, so it sees every change of the store."""

    def __init__(self, store: WeightStore, dtype: torch.dtype, activations: str = "none", native: bool = False):
        self.store, self.config, self.dtype = store, store.config, dtype
        self.activations, self.native = activations, native
        self.rope = Rope(self.config.head_dim, self.config.rope_theta, store.device)
        self.watch: Callable[[str, Tensor, Tensor], None] | None = None  # sees every product: name, input, output

    def _linear(self, x: Tensor, name: str) -> Tensor:
        out = packed_matmul(x, self.store.fused[name], self.activations, self.native)
        if self.watch is not None:
            self.watch(name, x, out)
        return out

    @torch.no_grad()
    def hidden(self, ids: Tensor, cache: KVCache | None = None, trace: list[Tensor] | None = None) -> Tensor:
        """ids [B, T] int64 -> hidden states after the final norm [B, T, H]."""
        raw = self.store.raw
        x = lookup(self.store.embedding, ids, self.dtype)
        cos, sin = self.rope.table(cache.length if cache else 0, ids.shape[1], self.dtype)
        for i in range(self.config.num_hidden_layers):
            x = self.layer(i, x, cos, sin, cache)
            if trace is not None:
                trace.append(x)
        if cache is not None:
            cache.advance(ids.shape[1])
        return rms_norm(x, raw["model.norm.weight"], self.config.rms_norm_eps)

    def layer(self, i: int, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        """One layer: x [B, T, H] -> [B, T, H]."""
        c, raw, prefix = self.config, self.store.raw, f"model.layers.{i}."
        b, t, _ = x.shape
        y = rms_norm(x, raw[prefix + "input_layernorm.weight"], c.rms_norm_eps)
        qkv = self._linear(y, prefix + "qkv").view(b, t, -1, c.head_dim)
        q, k, v = qkv.split((c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads), dim=2)
        q = rms_norm(q, raw[prefix + "self_attn.q_norm.weight"], c.rms_norm_eps)
        k = rms_norm(k, raw[prefix + "self_attn.k_norm.weight"], c.rms_norm_eps)
        q, k, v = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(i, k, v)
        x = x + self._linear(attend(q, k, v).transpose(1, 2).reshape(b, t, -1), prefix + "o")
        y = rms_norm(x, raw[prefix + "post_attention_layernorm.weight"], c.rms_norm_eps)
        gate, up = self._linear(y, prefix + "gate_up").chunk(2, dim=-1)
        return x + self._linear(F.silu(gate) * up, prefix + "down")

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> logits [..., V], fp32."""
        return self._linear(hidden, "lm_head").float()

    def last_logits(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the last position, [B, V] fp32."""
        return self.logits(self.hidden(ids, cache)[:, -1])

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        c = self.config
        return KVCache(c.num_hidden_layers, batch, c.num_key_value_heads, capacity, c.head_dim, self.dtype, self.store.device)
