"""How far two paths may be apart, and why: what is beyond is a fault.

A relative difference r of the hidden states is expected from what sets two paths apart:

rounding    same weights, another order of sums: r = c u sqrt(layers), u the unit roundoff of the compute dtype. Measured over
            the shipped model and random ones (replay against token by token, which sums otherwise): c up to 4.3 in float32,
            1.6 in bfloat16 and float16. Taken: 16 and 6.
W4A4        a rounding error that crosses the border between two FP4 codes becomes a step of the code. Measured 0.02 to 0.14
            at 6 layers; taken 0.12 sqrt(layers).
NVFP4       R computes with the unquantised weights: each linear is off by 0.10 to 0.13 (reference 0.8), by 0.16 with rounded
            activations too. Measured 0.29 to 0.48 at 6 random layers; taken twice 0.13 or 0.16 times sqrt(layers).

No two vectors of like size are expected to be apart by more than r = 1.
Of the logits, s is the standard deviation over the vocabulary: their difference has r s, at most r max(6 s, max |logit|),
and KL = (r s)^2 / 2, which the measurements met to two digits; four times that is allowed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDOFF = {torch.float32: (2.0**-24, 16.0), torch.bfloat16: (2.0**-9, 6.0), torch.float16: (2.0**-12, 6.0)}


@dataclass(frozen=True)
class Expected:
    relative: float  # of hidden states
    kl: float  # nats
    max_abs_logit: float
    why: str


def relative(pair: str, dtype: torch.dtype, layers: int, activations: str) -> tuple[float, str]:
    """(largest relative difference of hidden states, why). `pair` is of record letters, "A-C"; R is the unquantised path."""
    unit, factor = _ROUNDOFF[dtype]
    name, depth = str(dtype).removeprefix("torch."), math.sqrt(layers)
    found, why = factor * unit * depth, f"{name} sums in another order"
    if "R" in pair.split("-"):
        each = 0.16 if activations == "nvfp4" else 0.13
        found, why = found + 2 * each * depth, "unquantised against NVFP4 weights" + (" (W4A4)" if each == 0.16 else " (W4A16)")
    elif activations == "nvfp4":
        found, why = found + 0.12 * depth, f"{name} sums in another order, which flip FP4 codes of activations (W4A4)"
    return min(found, 1.0), why


def expected(pair: str, dtype: torch.dtype, layers: int, activations: str, logits: tuple[Tensor, Tensor]) -> Expected:
    """`logits`: [V] fp32 of both paths. The one with the smaller spread counts, since the other may be the broken one."""
    r, why = relative(pair, dtype, layers, activations)
    sizes = []
    for x in (x[x.isfinite()] for x in logits):
        if len(x) > 1:
            s = float(x.std())
            sizes.append((s, max(6 * s, float((x - x.mean()).abs().max()))))
    s, largest = min(sizes, default=(0.0, 0.0))
    return Expected(r, 2 * (r * s) ** 2, r * largest, why)
