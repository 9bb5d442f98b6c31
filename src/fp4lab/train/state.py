"""How one matrix of optimizer state is stored between steps, read and written a few rows at a time.

format           bytes an element   notes
fp32, bf16       4, 2               as they are
int8             1 + 4 a row        reference 5.4: per row max / 127, linear; v underflows against the row's maximum
int8_block       1 + 4 a block      of 256: dynamic codes, as bitsandbytes (`int8_block`)
nvfp4            0.5625             reference 5.4: bf16, then native NVFP4, single level; v underflows to 0
nvfp4_two_level  0.5625 + 4 a row   one fp32 a row on top, so small rows keep their range; stochastic

The second level of nvfp4_two_level is a bound on the row, known before any of its values: the running mean of the row's largest
gradient, over 2688, which no running mean of its elements can exceed. A row's largest value would have to be found before
the first one is stored, which costs a kernel a second pass; the bound is looser, and E4M3 has 17 powers of two to spare.
There v is kept as sqrt(v), and zero codes are read as a quarter, the largest that rounds to them: otherwise v = 0 beside
m != 0 makes a step of m / eps. Its rounding is stochastic: sqrt(v) moves by 1/2000 of itself in a step, and to nearest it would
stand where its first steps put it. The other formats keep v as the reference does.
"""

import torch
from torch import Tensor

from fp4lab.nvfp4 import BLOCK, PackedTensor, pack, pack_stochastic, unpack
from fp4lab.nvfp4.codec import E2M1_MAX, E4M3_MAX
from fp4lab.train.int8_block import Int8Blocks

FORMATS = ("nvfp4", "nvfp4_two_level", "int8", "int8_block", "bf16", "fp32")


class Moment:
    """m or v of one parameter as a [rows, cols] matrix, starting from zeros."""

    def __init__(self, rows: int, cols: int, format: str, root: bool, device: torch.device | str, beta: float):
        if format not in FORMATS:
            raise ValueError(f"state format {format!r}: expected one of {', '.join(FORMATS)}")
        self.rows, self.cols, self.format, self.beta = rows, cols, format, beta
        self.root = root and format == "nvfp4_two_level"
        self.packed: PackedTensor | None = None
        self.data: Tensor | None = None
        self.scale: Tensor | None = None
        self.blocks: Int8Blocks | None = None
        if format.startswith("nvfp4"):
            levels = "row" if format == "nvfp4_two_level" else "single"
            rule = "nearest" if format == "nvfp4_two_level" else "native"
            row = pack(torch.zeros(1, cols), rule, levels)  # one of them: all are alike
            codes, scale = row.codes.to(device), row.block_scale.view(torch.uint8).to(device)
            self.packed = PackedTensor(
                codes.repeat(rows, 1),
                scale.repeat(rows, 1).view(torch.float8_e4m3fn),
                None if row.global_scale is None else torch.zeros(rows, 1, device=device),  # of unseen gradients
                (rows, cols),
                row.divide,
            )
        elif format == "int8":
            self.data = torch.zeros(rows, cols, dtype=torch.int8, device=device)
            self.scale = torch.zeros(rows, 1, device=device)
        elif format == "int8_block":
            self.blocks = Int8Blocks(rows, cols, not root, device)
        else:
            dtype = torch.bfloat16 if format == "bf16" else torch.float32
            self.data = torch.zeros(rows, cols, dtype=dtype, device=device)

    def read(self, start: int, stop: int, device: torch.device | None = None) -> Tensor:
        """Rows start..stop, fp32 [stop - start, cols], decoded on `device`: of an offloaded state only stored bytes travel."""
        if self.packed is not None:
            part = self.packed.rows(start, stop).to(device)
            return _squared_root(part) if self.root else unpack(part)
        if self.blocks is not None:
            return self.blocks.read(start, stop, device)
        assert self.data is not None
        value = self.data[start:stop].to(device).float()
        return value if self.scale is None else value * self.scale[start:stop].to(device)

    def write(self, start: int, stop: int, value: Tensor, largest: Tensor, noise: tuple[Tensor, ...] = ()) -> None:
        """Stores fp32 rows, encoded where `value` lies; largest [stop - start, 1] is the largest |gradient| of each, noise what
        `nvfp4.pack_stochastic` takes."""
        if self.packed is not None:
            if self.format == "nvfp4_two_level":
                bound = self._bound(self.packed.rows(start, stop).to(value.device), largest)
                new = pack_stochastic(value.sqrt() if self.root else value, bound, *noise)
            else:
                new = pack(value.to(torch.bfloat16), "native", "single")
            write_rows(self.packed, start, stop, new)
            return
        if self.blocks is not None:
            self.blocks.write(start, stop, value)
            return
        assert self.data is not None
        if self.scale is not None:
            scale = value.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
            self.scale[start:stop] = scale
            self.data[start:stop] = (value / scale).round().clamp(-127, 127).to(torch.int8)
        else:
            self.data[start:stop] = value.to(self.data.dtype)

    def _bound(self, old: PackedTensor, largest: Tensor) -> Tensor:
        """The next second-level scale [rows, 1]: the running mean that m makes, or the root of the one that v makes."""
        assert old.global_scale is not None
        new = largest / (E4M3_MAX * E2M1_MAX)
        if self.root:
            return (old.global_scale.square() * self.beta + new.square() * (1 - self.beta)).sqrt()
        return old.global_scale * self.beta + new * (1 - self.beta)

    def tensors(self) -> list[tuple[str, Tensor]]:
        """(part, tensor) for the byte report."""
        if self.packed is not None:
            return named_parts(self.packed)
        if self.blocks is not None:
            return [("codes", self.blocks.codes), ("scale", self.blocks.absmax)]
        assert self.data is not None
        parts = [("data", self.data)]
        return parts if self.scale is None else [*parts, ("scale", self.scale)]


def write_rows(target: PackedTensor, start: int, stop: int, new: PackedTensor) -> None:
    """Copies `new` over rows start..stop of `target`, in place."""
    part = target.rows(start, stop)
    part.codes.copy_(new.codes)
    part.block_scale.view(torch.uint8).copy_(new.block_scale.view(torch.uint8))
    if part.global_scale is not None and part.global_scale.ndim and new.global_scale is not None:
        part.global_scale.copy_(new.global_scale)


def named_parts(p: PackedTensor) -> list[tuple[str, Tensor]]:
    parts = [("codes", p.codes), ("scale", p.block_scale)]
    return parts if p.global_scale is None else [*parts, ("global_scale", p.global_scale)]


def _squared_root(p: PackedTensor) -> Tensor:
    """v of a packed sqrt(v), fp32: every element is at least the square of a quarter of its scale."""
    assert p.global_scale is not None
    quarter = (p.block_scale.float() * p.global_scale * 0.25).repeat_interleave(BLOCK, dim=1)[:, : p.shape[1]]
    return torch.maximum(unpack(p), quarter).square()
