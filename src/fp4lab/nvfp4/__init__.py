"""The number format: packed tensors, the reference codec, and the layouts hardware wants."""

from fp4lab.nvfp4.changes import count_changed, keep_zero_signs
from fp4lab.nvfp4.codec import LEVELS, RULES, decode_e4m3, encode_e2m1, encode_e4m3, largest, pack, repack_like, scale_of_amax
from fp4lab.nvfp4.dispatch import decode, matmul, matmul_back, unpack
from fp4lab.nvfp4.emulate import quantize_activations
from fp4lab.nvfp4.native import native_available, operand, scaled_fp4_matmul
from fp4lab.nvfp4.packed import BLOCK, PackedTensor
from fp4lab.nvfp4.swizzle import swizzle, unswizzle
from fp4lab.nvfp4.update import pack_stochastic, update_stochastic

__all__ = [
    "BLOCK",
    "LEVELS",
    "RULES",
    "PackedTensor",
    "count_changed",
    "decode",
    "decode_e4m3",
    "encode_e2m1",
    "encode_e4m3",
    "keep_zero_signs",
    "largest",
    "matmul",
    "matmul_back",
    "native_available",
    "operand",
    "pack",
    "pack_stochastic",
    "quantize_activations",
    "repack_like",
    "scale_of_amax",
    "scaled_fp4_matmul",
    "swizzle",
    "unpack",
    "unswizzle",
    "update_stochastic",
]
