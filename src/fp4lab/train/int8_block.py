"""8-bit block-wise dynamic moments, the format of bitsandbytes' 8-bit optimizers (Dettmers et al. 2022, arXiv 2110.02861).

A block of 256 columns of a row shares one fp32 absmax; each element is the index of the nearest of 256 values in [-1, 1], or
for v, which has no sign, in [0, 1]. The values are those of dynamic tree quantization: the number of leading zeros is a power
of ten, 10^-6 to 1, and what bits are left divide [0.1, 1] evenly, so that seven decades are covered, the top one in 64 steps
(signed) or 128. Zero and one are values of their own; -1 is not, so a block's largest loses 0.35 % where it is negative.

Blocks start anew in each row, so that rows can be read and written apart: a row whose length is no multiple of 256 ends in a
shorter block. bitsandbytes runs its blocks over the flattened tensor, which is the same where the length is a multiple.
"""

from functools import lru_cache

import torch
from torch import Tensor

WIDTH = 256  # columns of a block
DECADES = 7


@lru_cache(maxsize=8)
def dynamic_map(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 256 values, fp32, ascending."""
    values = [0.0, 1.0]
    for decade in range(DECADES):
        parts = 2**decade if signed else 2 ** (decade + 1)
        middles = [0.1 + 0.9 * (i + 0.5) / parts for i in range(parts)]
        values += [x * 10.0 ** (decade + 1 - DECADES) for x in middles]
    if signed:
        values += [-x for x in values if x not in (0.0, 1.0)]
    return torch.tensor(sorted(values), device=device)


@lru_cache(maxsize=8)
def _borders(signed: bool, device: torch.device) -> Tensor:
    """[255]: halfway between neighbours."""
    values = dynamic_map(signed, device)
    return (values[1:] + values[:-1]) / 2


class Int8Blocks:
    """A [rows, cols] matrix of zeros at first. codes uint8 [rows, cols]; absmax fp32 [rows, ceil(cols / 256)]."""

    def __init__(self, rows: int, cols: int, signed: bool, device: torch.device | str):
        self.cols, self.signed = cols, signed
        zero = int((dynamic_map(signed) == 0).nonzero())
        self.codes = torch.full((rows, cols), zero, dtype=torch.uint8, device=device)
        self.absmax = torch.zeros(rows, -(-cols // WIDTH), device=device)

    def read(self, start: int, stop: int, device: torch.device | None = None) -> Tensor:
        """Rows start..stop, fp32 [stop - start, cols], decoded on `device`."""
        codes, absmax = self.codes[start:stop].to(device), self.absmax[start:stop].to(device)
        return dynamic_map(self.signed, codes.device)[codes.int()] * self._spread(absmax)

    def write(self, start: int, stop: int, value: Tensor) -> None:
        """Stores fp32 rows, to nearest. A block with a NaN or an infinity reads as neither a number nor finite."""
        rest = -self.cols % WIDTH
        padded = torch.nn.functional.pad(value, (0, rest)) if rest else value
        absmax = padded.view(value.shape[0], -1, WIDTH).abs().amax(dim=-1)
        unit = value / self._spread(torch.where(absmax == 0, 1.0, absmax))
        self.codes[start:stop] = torch.bucketize(unit, _borders(self.signed, value.device)).to(torch.uint8)
        self.absmax[start:stop] = absmax

    def _spread(self, absmax: Tensor) -> Tensor:
        """One number a block -> one an element, [rows, cols]."""
        return absmax.repeat_interleave(WIDTH, dim=1)[:, : self.cols]
