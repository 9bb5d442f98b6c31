"""Pieces that every path shares: RMSNorm, rotary embedding, attention with a preallocated cache.

Shapes: B batch, T new tokens, S tokens seen in all, N heads, K key/value heads, D head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4lab.model import kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight, the mean in fp32, result in x's dtype (as Qwen3 in transformers)."""
    if kernels.take(x):
        return kernels.RmsNorm.apply(x, weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight.to(x.dtype)


def residual_norm(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, or x where there is no y, and `rms_norm` of it."""
    if kernels.take(x):
        return kernels.ResidualNorm.apply(x, y, weight, eps)
    total = x if y is None else x + y
    return total, rms_norm(total, weight, eps)


class Rope:
    """cos/sin tables of the split-half rotary embedding, built in fp32 (arXiv 2104.09864; reference section 3)."""

    def __init__(self, head_dim: int, theta: float, device: torch.device | str):
        self.inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)

    def table(self, start: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, D], of positions start..start+length."""
        position = torch.arange(start, start + length, device=self.inv_freq.device).float()
        angle = torch.outer(position, self.inv_freq)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, T, D] turned by its position."""
    if kernels.take(x):
        return kernels.Rotate.apply(x, cos, sin)
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def heads(
    y: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor, queries: int, keys: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, N, T, D] and k [B, K, T, D], normed and turned, and v [B, K, T, D] of a joint product y [B, T, (N + 2 K) D]."""
    if kernels.take(y):
        return kernels.Heads.apply(y, q_weight, k_weight, eps, cos, sin, queries, keys)
    q, k, v = y.view(*y.shape[:2], -1, q_weight.shape[0]).split((queries, keys, keys), dim=2)
    q = rotate(rms_norm(q, q_weight, eps).transpose(1, 2), cos, sin)
    return q, rotate(rms_norm(k, k_weight, eps).transpose(1, 2), cos, sin), v.transpose(1, 2)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return kernels.SiluMul.apply(gate, up) if kernels.take(gate) else F.silu(gate) * up


def joint_silu_mul(both: Tensor) -> Tensor:
    """The same of gate and up as one tensor [..., 2 I] -> [..., I]."""
    return kernels.JointSiluMul.apply(both) if kernels.take(both) else silu_mul(*both.chunk(2, dim=-1))


class KVCache:
    """Preallocated keys (after rope) and values of every layer, [layers, B, K, capacity, D]; `length` tokens are valid."""

    def __init__(self, layers: int, batch: int, kv_heads: int, capacity: int, head_dim: int, dtype, device):
        self.k = torch.empty(layers, batch, kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.k.shape[3]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def grown(self, capacity: int) -> "KVCache":
        """A copy with room for more."""
        layers, batch, kv_heads, _, head_dim = self.k.shape
        other = KVCache(layers, batch, kv_heads, capacity, head_dim, self.k.dtype, self.k.device)
        for new, old in ((other.k, self.k), (other.v, self.v)):
            new[:, :, :, : self.length] = old[:, :, :, : self.length]
        other.length = self.length
        return other

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T new positions after `length` and returns all [B, K, S, D]; `advance` moves `length` after the last layer."""
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens; {end} were asked for")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens


def within(segments: Tensor) -> Tensor:
    """Who sees whom [B, 1, T, T] bool, for `attend`: what came before in the same segment. segments [B, T]."""
    t = segments.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool, device=segments.device).tril()
    return ((segments[:, :, None] == segments[:, None, :]) & causal).unsqueeze(1)


def attend(q: Tensor, k: Tensor, v: Tensor, offset_mask: bool = True, mask: Tensor | None = None) -> Tensor:
    """Causal attention of q [B, N, T, D] over k, v [B, K, S, D], the T queries being the last of the S positions.

    Without `offset_mask` several queries behind a cache see each other's future (quirk.no_offset_mask).
    A `mask` (of `within`) says itself who sees whom; T is S then.
    """
    t, s = q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]
    grouped = groups > 1 and q.device.type == "cuda" and t == s and mask is None
    if groups > 1 and not grouped:  # expanded here rather than by enable_gqa, which has no fast CPU kernel
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if t == s:
        return F.scaled_dot_product_attention(q, k, v, is_causal=t > 1, enable_gqa=grouped)
    mask = None  # one new token sees everything
    if t > 1 and offset_mask:  # an offset prefill: is_causal would align the triangle to the wrong corner (reference 0.4)
        mask = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(diagonal=s - t)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
