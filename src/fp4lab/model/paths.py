"""The four paths over one weight store.

R.dense        unquantised weights; exists only where the checkpoint has them
A.infer        `Bridge`: packed weights, fused products
B.fp2_ste      block graph, straight-through linears over float masters
C.noste_graph  block graph over the packed linears of A
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp4lab.model.bridge import Bridge
from fp4lab.model.config import EMBEDDING, HEAD
from fp4lab.model.layers import Rope
from fp4lab.model.linears import ConsumingEmbedding, ConsumingLinear, DenseLinear, PackedLinear, SteLinear
from fp4lab.model.qwen3 import Qwen3
from fp4lab.model.store import WeightStore
from fp4lab.nvfp4 import BLOCK, PackedTensor, kernels, unpack

PATHS = {"bridge": "A.infer", "fp2": "B.fp2_ste", "noste": "C.noste_graph", "dense": "R.dense"}
TRAINABLE = ("dense", "fp2")
E4M3_TOP_EXPONENT, E4M3_NAN = 0x78, 0x7F  # bytes 0x78..0x7E are 256..448


@dataclass(frozen=True)
class Quirks:
    """Incidents of the reference log that change what B computes; see `quirk` in config.py."""

    scale_bytes_undecoded: bool = False
    rope_theta_1e6: bool = False
    no_offset_mask: bool = False
    e4m3_top_nan: bool = False


def _frozen(store: WeightStore) -> dict[str, Any]:
    frozen: dict[str, Any] = {name: nn.Parameter(t, requires_grad=False) for name, t in store.raw.items()}
    return frozen | ({EMBEDDING: store.packed[EMBEDDING]} if EMBEDDING in store.packed else {})


def noste_model(store: WeightStore, dtype: torch.dtype, activations: str = "none", native: bool = False) -> Qwen3:
    """C."""
    return Qwen3(store.config, lambda name: PackedLinear(store.packed[name], activations, native), _frozen(store), dtype)


def bridge_model(store: WeightStore, dtype: torch.dtype, activations: str = "none", native: bool = False) -> Bridge:
    """A."""
    return Bridge(store, dtype, activations, native)


def valueless(parameter: Tensor) -> bool:
    """Whether it only has a shape and a gradient: one number is all that lies in memory."""
    return parameter.ndim > 1 and not any(parameter.stride())


def _masters(store: WeightStore, master_dtype: torch.dtype, codes_alone: bool = False) -> dict[str, nn.Parameter]:
    """Own float parameters for every tensor: the unquantised ones where there are any, else the dequantised; those of linears
    whose codes are all that is kept are `valueless`."""
    masters = {name: nn.Parameter(t.detach().clone().to(master_dtype)) for name, t in store.raw.items()}
    for name, p in store.packed.items():
        if name == HEAD and store.tied:
            masters[name] = masters[EMBEDDING]
            continue
        if codes_alone:
            masters[name] = nn.Parameter(torch.zeros((), dtype=master_dtype, device=p.device).expand(p.shape))
            continue
        value = store.dense[name].clone() if store.dense else unpack(p, master_dtype)
        masters[name] = nn.Parameter(value.to(master_dtype))
    return masters


def dense_model(store: WeightStore, dtype: torch.dtype, master_dtype: torch.dtype | None = None) -> Qwen3:
    """R as a trainable model. Without unquantised weights in the store it starts from the dequantised ones."""
    masters = _masters(store, master_dtype or dtype)
    return Qwen3(store.config, lambda name: DenseLinear(masters[name]), masters, dtype)


def reference_model(store: WeightStore, dtype: torch.dtype) -> Qwen3 | None:
    """R for the first-token probe, over the store's own tensors; None where no unquantised weights exist."""
    if store.dense is None:
        return None
    dense = store.dense
    return Qwen3(store.config, lambda n: DenseLinear(nn.Parameter(dense[n], requires_grad=False)), _frozen(store), dtype)


def fp2_model(
    store: WeightStore,
    dtype: torch.dtype,
    master_dtype: torch.dtype | None,
    activations: str = "none",
    eval_cache: bool = False,
    quirks: Quirks | None = None,
    codes_alone: bool = False,
) -> Qwen3:
    """B: float masters of its own, the store's codes in the forward. Without `master_dtype` it has none and only evaluates.

    `codes_alone`: the optimizer keeps the linears as their codes, and nobody reads a float of theirs.
    """
    masters = _frozen(store) if master_dtype is None else _masters(store, master_dtype, codes_alone)
    quirks = quirks or Quirks()

    def make(name: str) -> nn.Module:
        wrong = _undecoded if quirks.scale_bytes_undecoded else _top_nan if quirks.e4m3_top_nan else None
        if wrong is not None:
            return DenseLinear(nn.Parameter(wrong(store.packed[name]).to(master_dtype or dtype)))
        return SteLinear(masters.get(name), store.packed[name], activations, eval_cache)

    model = Qwen3(store.config, make, masters, dtype)
    if quirks.rope_theta_1e6:
        model.rope = Rope(store.config.head_dim, 1e6, store.device)
    if quirks.no_offset_mask:
        for block in model.model.layers:
            block.self_attn.offset_mask = False  # type: ignore[union-attr]
    return model


def fused_model(store: WeightStore, dtype: torch.dtype, activations: str = "none", joint: bool | None = None) -> Qwen3:
    """B for step=fused: the store's codes are the only weights of its linears, and gradients are handed on, not kept.

    `joint`: q/k/v and gate/up are one linear each, for a third fewer kernels; by default on a GPU, whose time it saves.
    """
    joint = kernels.available(store.device) if joint is None else joint
    members = store.members()

    def make(name: str) -> ConsumingLinear:
        if name in members:
            return ConsumingLinear(store.fused[name], activations, members[name])
        return ConsumingLinear(store.packed[name], activations)

    raw: dict[str, Any] = {n: nn.Parameter(t, requires_grad=t.ndim == 1) for n, t in store.raw.items()}
    raw[EMBEDDING] = raw.get(EMBEDDING, store.embedding)
    model = Qwen3(store.config, make, raw, dtype, joint)
    model.model.embed_tokens = ConsumingEmbedding(raw[EMBEDDING], dtype)
    return model


def _undecoded(p: PackedTensor) -> Tensor:
    """Codes times the E4M3 byte read as an integer: hundreds of times too large (reference section 2.5)."""
    ones = torch.full_like(p.block_scale.view(torch.uint8), 0x38).view(torch.float8_e4m3fn)  # 0x38 is 1.0
    units = unpack(PackedTensor(p.codes, ones, None, p.shape))
    return units * p.block_scale.view(torch.uint8).float().repeat_interleave(BLOCK, dim=1)


def _top_nan(p: PackedTensor) -> Tensor:
    """Decoded by a table that takes every E4M3 byte of exponent 15 for NaN (reference section 2.4)."""
    byte = p.block_scale.view(torch.uint8)
    scale = torch.where((byte & E4M3_TOP_EXPONENT) == E4M3_TOP_EXPONENT, E4M3_NAN, byte).view(torch.float8_e4m3fn)
    return unpack(dataclasses.replace(p, block_scale=scale))


def ste_linears(model: Qwen3) -> Iterator[tuple[str, SteLinear]]:
    """(parameter name, linear) of every straight-through linear."""
    for name, module in model.named_modules():
        if isinstance(module, SteLinear):
            yield f"{name}.weight", module


def clear_eval_cache(model: Qwen3) -> None:
    """Frees the dequantised weights that `eval_cache` kept."""
    for _, linear in ste_linears(model):
        linear.clear_eval_cache()


def parameter_dict(model: Qwen3) -> dict[str, nn.Parameter]:
    """Trainable parameters by Hugging Face name; a tied head appears once, as the embedding."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
