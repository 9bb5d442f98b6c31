"""The NVFP4 tensor: 4-bit E2M1 codes, an E4M3 scale for every 16 input columns, an optional fp32 second-level scale."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 16


@dataclass(frozen=True)
class PackedTensor:
    """value[r, c] = code[r, c] * block_scale[r, c // 16] * global_scale  (or / global_scale when `divide`).

    codes         uint8 [rows, cols / 2], column 2j in the low nibble of byte j
    block_scale   float8_e4m3fn [rows, cols / 16]
    global_scale  None (single level, as the reference file), fp32 [] (one a tensor) or fp32 [rows, 1] (one a row)
    divide        compressed-tensors' convention: its global scale is 2688 / amax
    shape         logical shape; 1-D is held as [1, N], higher ranks as [d0, rest], cols padded to a multiple of 16

    Raises ValueError when parts do not fit together.
    """

    codes: Tensor
    block_scale: Tensor
    global_scale: Tensor | None
    shape: tuple[int, ...]
    divide: bool = False

    def __post_init__(self) -> None:
        rows, cols = matrix_shape(self.shape)
        padded = -(-cols // BLOCK) * BLOCK
        if self.codes.dtype != torch.uint8 or tuple(self.codes.shape) != (rows, padded // 2):
            raise ValueError(
                f"codes are {self.codes.dtype} {list(self.codes.shape)}; expected uint8 {[rows, padded // 2]} "
                f"for shape {list(self.shape)}"
            )
        if self.block_scale.dtype != torch.float8_e4m3fn or tuple(self.block_scale.shape) != (rows, padded // BLOCK):
            raise ValueError(
                f"block_scale is {self.block_scale.dtype} {list(self.block_scale.shape)}; "
                f"expected float8_e4m3fn {[rows, padded // BLOCK]} for shape {list(self.shape)}"
            )
        g = self.global_scale
        if g is not None and (g.dtype != torch.float32 or tuple(g.shape) not in ((), (rows, 1))):
            raise ValueError(f"global_scale is {g.dtype} {list(g.shape)}; expected float32 [] or {[rows, 1]}")
        if g is None and self.divide:
            raise ValueError("divide=True needs a global_scale")

    @property
    def levels(self) -> str:
        """ "single", "tensor" or "row"."""
        if self.global_scale is None:
            return "single"
        return "row" if self.global_scale.ndim else "tensor"

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Codes, block scales and, where there is one, the second-level scale."""
        return [t for t in (self.codes, self.block_scale, self.global_scale) if t is not None]

    def to(self, device: torch.device | str | None) -> "PackedTensor":
        return self._map(lambda t: t.to(device))

    def clone(self) -> "PackedTensor":
        return self._map(torch.Tensor.clone)

    def rows(self, start: int, stop: int) -> "PackedTensor":
        """Rows start..stop as a view of the same bytes."""
        g = self.global_scale
        return PackedTensor(
            self.codes[start:stop],
            self.block_scale[start:stop],
            g[start:stop] if g is not None and g.ndim else g,
            (stop - start, matrix_shape(self.shape)[1]),
            self.divide,
        )

    def _map(self, f) -> "PackedTensor":
        g = self.global_scale
        return dataclasses.replace(
            self, codes=f(self.codes), block_scale=f(self.block_scale), global_scale=None if g is None else f(g)
        )


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """[rows, cols] that a tensor of this shape is packed as."""
    if not shape:
        raise ValueError("a scalar has no blocks to pack")
    if len(shape) == 1:
        return 1, shape[0]
    cols = 1
    for d in shape[1:]:
        cols *= d
    return shape[0], cols
