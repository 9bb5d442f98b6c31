"""Inside a forward: hidden states layer by layer, and the parts of one layer."""

import math
from typing import Any

import torch
from torch import Tensor

from fp4lab.model.bridge import Bridge
from fp4lab.model.qwen3 import Qwen3
from fp4lab.train.loss import embed

PARTS = ("q", "k", "v", "attention", "o", "gate", "up", "down")  # in the order in which a layer computes them


class LastPosition(list[Tensor]):
    """A trace that keeps of each layer the last position alone, as a copy: a slice would hold all of [T, H] in memory."""

    def append(self, x: Tensor) -> None:
        super().append(x[0, -1].to(torch.float32, copy=True))


class OneLayer(list[Tensor]):
    """A trace that keeps one layer's hidden states and lets the others go."""

    def __init__(self, layer: int):
        super().__init__()
        self._ahead = layer

    def append(self, x: Tensor) -> None:
        if self._ahead == 0:
            super().append(x)
        self._ahead -= 1


@torch.no_grad()
def trace(path: Qwen3 | Bridge, ids: list[int]) -> tuple[list[Tensor], Tensor, Tensor]:
    """(hidden state of the last position after each layer [H] fp32, after the final norm [H], logits [V] fp32).

    The last position alone is kept: it has seen all others, and a long prompt on a large model would not fit.
    """
    layers = LastPosition()
    hidden = path.hidden(torch.tensor([ids], device=path.rope.inv_freq.device), trace=layers)[:, -1].clone()
    return layers, hidden[0], path.logits(hidden)[0]


@torch.no_grad()
def layer_input(path: Qwen3 | Bridge, ids: list[int], layer: int) -> Tensor:
    """What layer `layer` is given, [1, T, H]."""
    tensor = torch.tensor([ids], device=path.rope.inv_freq.device)
    if layer:
        before = OneLayer(layer - 1)
        path.hidden(tensor, trace=before)
        return before[0]
    return embed(path, tensor)


@torch.no_grad()
def parts(path: Qwen3 | Bridge, layer: int, x: Tensor) -> dict[str, Tensor]:
    """Outputs of the parts of one layer for the input x [1, T, H], by name of PARTS; "attention" is what `o` is given."""
    found: dict[str, Tensor] = {}
    cos, sin = path.rope.table(0, x.shape[1], path.dtype)
    if isinstance(path, Bridge):
        c = path.config
        widths = {"qkv": (c.q_size, c.kv_size, c.kv_size), "gate_up": (c.intermediate_size,) * 2}

        def watch(name: str, given: Tensor, out: Tensor) -> None:
            part = name.rpartition(".")[2]
            if part in widths:
                names = ("q", "k", "v") if part == "qkv" else ("gate", "up")
                found.update(zip(names, out.split(widths[part], dim=-1), strict=True))
            else:
                found.update({"attention": given, "o": out} if part == "o" else {part: out})

        path.watch = watch
        try:
            path.layer(layer, x, cos, sin, None)
        finally:
            path.watch = None
        return found
    block: Any = path.model.layers[layer]
    handles = []
    for name, module in (*block.self_attn.named_children(), *block.mlp.named_children()):
        if name.endswith("_proj"):
            handles.append(module.register_forward_hook(_keep(found, name.removesuffix("_proj"))))
    try:
        block(x, cos, sin, None)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _keep(found: dict[str, Tensor], part: str) -> Any:
    def hook(module: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
        if part == "o":
            found["attention"] = given[0]
        found[part] = out

    return hook


def apart(a: Tensor, b: Tensor) -> float:
    """|a - b| over the smaller of |a| and |b|; not-a-number if either has one.

    The smaller, so that it is the same both ways and a path a million times too large is not merely off by 1.
    """
    a, b = a.float(), b.float()
    off, norms = float((a - b).norm()), (float(a.norm()), float(b.norm()))
    return off if off == 0 or math.isnan(off) else off / min(norms) if min(norms) else math.inf


def first_part(path_a: Qwen3 | Bridge, path_b: Qwen3 | Bridge, layer: int, x: Tensor, tolerance: float) -> str | None:
    """The first part of a layer that two paths compute differently from the same input; None if they add up only later."""
    a, b = parts(path_a, layer, x), parts(path_b, layer, x)
    for name in PARTS:
        if not apart(a[name], b[name]) <= tolerance:  # not-a-number is different
            return name
    return None
