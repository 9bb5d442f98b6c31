"""What scale should the int8 residual of a packed master have? Error of three, rounded to nearest, and their bits.

python experiments/state-formats/residual_scale.py

own cell    no scale stored: the width of the element's own code's cell, as `train/residual.py` has it
fp32 block  one fp32 for 16 elements: the largest residual / 127
fp32 row    one fp32 a row
"""

from pathlib import Path

import torch

from fp4lab.checkpoint import open_weights
from fp4lab.nvfp4 import BLOCK, PackedTensor, pack, unpack
from fp4lab.train import residual

TOP = residual.TOP


def scaled(left: torch.Tensor, block: int) -> torch.Tensor:
    """`left` through int8 with one fp32 scale for `block` columns."""
    parts = left.view(left.shape[0], -1, block)
    scale = parts.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / TOP
    return ((parts / scale).round() * scale).view_as(left)


def errors(x: torch.Tensor, levels: str) -> dict[str, tuple[float, float]]:
    """name -> (bits a weight, relative error of the master)."""
    image = pack(x, "torchao", levels)
    left = x - unpack(image)
    held = {
        "codes alone": (4.5, torch.zeros_like(left)),
        "own cell": (12.5, residual.decode(image, residual.encode(x, image)) - unpack(image)),
        "fp32 block": (12.5 + 32 / BLOCK, scaled(left, BLOCK)),
        "fp32 row": (12.5 + 32 / x.shape[1], scaled(left, x.shape[1])),
        "(bf16)": (16.0, x.bfloat16().float() - unpack(image)),
    }
    return {name: (bits, float((left - kept).norm() / x.norm())) for name, (bits, kept) in held.items()}


def main() -> None:
    torch.manual_seed(0)
    weights = open_weights("dat", Path("models/tiny/model.dat"))
    packed = weights.get("model.layers.3.mlp.gate_proj.weight")
    assert isinstance(packed, PackedTensor)
    trained = unpack(packed)
    cases = {
        "normal, sd 0.02": torch.randn(512, 1024) * 0.02,
        "normal, sd 0.1": torch.randn(512, 1024) * 0.1,
        "Student t, 3 degrees": torch.distributions.StudentT(3.0).sample((512, 1024)) * 0.02,
        "shipped gate_proj, moved by 0.002": trained + torch.randn_like(trained) * 0.002,
    }
    print(f"{'weights':<36}{'levels':<8}" + "".join(f"{name:>22}" for name in errors(trained, "single")))
    for name, x in cases.items():
        for levels in ("single", "row"):
            row = "".join(f"{bits:>12.2f} b {error:>8.1e}" for bits, error in errors(x, levels).values())
            print(f"{name:<36}{levels:<8}{row}")


if __name__ == "__main__":
    main()
