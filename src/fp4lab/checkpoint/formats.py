"""How each format holds a tensor: its keys, types and shapes before it is read, its bytes when it is there.

Codes and block scales only change their names. The second level is kept, or becomes the reciprocal where the format divides
and the tensor multiplies; a tensor without one gets 1, which changes no value.
"""

import re
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fp4lab.checkpoint import dat, safetensors_file
from fp4lab.checkpoint.layout import Layout, Slot
from fp4lab.checkpoint.public import SCHEMES, WEIGHT, Scheme, is_scalar_of_activation
from fp4lab.checkpoint.weights import TensorInfo, check_range
from fp4lab.errors import UserError
from fp4lab.model.config import EMBEDDING, HEAD
from fp4lab.nvfp4 import BLOCK, PackedTensor, unpack

FORMATS = ("dat", "hf", *SCHEMES)
FLOAT_SCALES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Part = tuple[torch.dtype, tuple[int, ...]]


class Format(Protocol):
    """Keys of a tensor, and its parts by key, floats as they are. Both raise UserError for what the format cannot hold."""

    def parts(self, name: str, info: TensorInfo) -> dict[str, Part]: ...

    def encode(self, name: str, value: Tensor | PackedTensor) -> dict[str, Tensor]: ...

    def plan(self, parts: dict[str, Part], shard_bytes: int) -> list[Layout]: ...


class DatFormat:
    """`.dat`: NAME.qdata, NAME.scale, and an extension for the second level."""

    def __init__(self, dtype: torch.dtype | None, scale_dtype: torch.dtype = torch.float8_e4m3fn):
        self.dtype, self.scale_dtype = dtype, scale_dtype

    def parts(self, name: str, info: TensorInfo) -> dict[str, Part]:
        if is_scalar_of_activation(name):
            return {name: (torch.float32, info.shape)}
        if info.dtype is not None:
            return {name: (_float_dtype(info.dtype, self.dtype), info.shape)}
        if len(info.shape) != 2 or info.shape[1] % BLOCK:
            raise ValueError(f"{name}: shape {list(info.shape)}; the format holds matrices of whole blocks of {BLOCK}")
        rows, cols = info.shape
        found: dict[str, Part] = {
            name + dat.QDATA: (torch.uint8, (rows, cols // 2)),
            name + dat.SCALE: (self.scale_dtype, (rows, cols // BLOCK)),
        }
        if info.levels != "single":
            suffix = dat.DIVIDE if info.divide else dat.MULTIPLY
            found[name + suffix] = (torch.float32, () if info.levels == "tensor" else (rows, 1))
        return found

    def encode(self, name: str, value: Tensor | PackedTensor) -> dict[str, Tensor]:
        if isinstance(value, Tensor):
            return {name: value}
        found = {name + dat.QDATA: value.codes, name + dat.SCALE: value.block_scale}
        if value.global_scale is not None:
            found[name + (dat.DIVIDE if value.divide else dat.MULTIPLY)] = value.global_scale
        return found

    def plan(self, parts: dict[str, Part], shard_bytes: int) -> list[Layout]:
        entries = {}
        for key, (dtype, shape) in parts.items():
            if dtype not in dat.TYPE_OF:
                raise UserError(f"{key}: {dtype} has no element type in a .dat file")
            entries[key] = (dat.TYPE_OF[dtype], shape)
        return [dat.plan("", entries)]


class _Safetensors:
    def plan(self, parts: dict[str, Part], shard_bytes: int) -> list[Layout]:
        """Files of at most `shard_bytes` of tensors, each whole, in order; a larger tensor has a file of its own."""
        shards: list[dict[str, Part]] = [{}]
        room = shard_bytes
        for key, part in parts.items():
            size = Slot(key, *part, 0).nbytes
            if size > room and shards[-1]:
                shards.append({})
                room = shard_bytes
            shards[-1][key] = part
            room -= size
        if len(shards) == 1:
            return [safetensors_file.plan("model.safetensors", shards[0])]
        count = len(shards)
        return [safetensors_file.plan(f"model-{i:05}-of-{count:05}.safetensors", s) for i, s in enumerate(shards, start=1)]


class FloatFormat(_Safetensors):
    """A plain Hugging Face folder: packed tensors become floats, rounded once."""

    def __init__(self, dtype: torch.dtype | None):
        self.dtype = dtype

    def parts(self, name: str, info: TensorInfo) -> dict[str, Part]:
        if is_scalar_of_activation(name):
            return {}
        dtype = self.dtype or torch.bfloat16
        return {name: (dtype if info.dtype is None else _float_dtype(info.dtype, self.dtype), info.shape)}

    def encode(self, name: str, value: Tensor | PackedTensor) -> dict[str, Tensor]:
        if isinstance(value, PackedTensor):
            return {name: unpack(value, self.dtype or torch.bfloat16)}
        return {name: value}


class PublicFormat(_Safetensors):
    """One of the two public schemes. An embedding that is packed becomes floats: nobody else reads a packed one."""

    def __init__(self, scheme: Scheme, dtype: torch.dtype | None):
        self.scheme, self.dtype = scheme, dtype

    def parts(self, name: str, info: TensorInfo) -> dict[str, Part]:
        if is_scalar_of_activation(name):
            return {_renamed(name, self.scheme): (torch.float32, self.scheme.scalar)}
        if info.dtype is not None:
            return {name: (_float_dtype(info.dtype, self.dtype), info.shape)}
        if name == EMBEDDING:
            return {name: (self.dtype or torch.bfloat16, info.shape)}
        if not name.endswith(WEIGHT) or len(info.shape) != 2 or info.shape[1] % BLOCK:
            raise UserError(
                f"{name} {list(info.shape)}: {self.scheme.name} holds weights of matrices of whole blocks of {BLOCK}"
            )
        (rows, cols), s, module = info.shape, self.scheme, name.removesuffix(WEIGHT)
        return {
            module + s.codes: (torch.uint8, (rows, cols // 2)),
            module + s.scale: (torch.float8_e4m3fn, (rows, cols // BLOCK)),
            module + s.second: (torch.float32, s.scalar),
        }

    def encode(self, name: str, value: Tensor | PackedTensor) -> dict[str, Tensor]:
        s = self.scheme
        if is_scalar_of_activation(name):
            assert isinstance(value, Tensor)
            return {_renamed(name, s): (value if name.endswith(s.activation) else 1 / value).reshape(s.scalar)}
        if isinstance(value, Tensor):
            return {name: value}
        if name == EMBEDDING:
            return {name: unpack(value, self.dtype or torch.bfloat16)}
        module = name.removesuffix(WEIGHT)
        second = one_second_level(name, value, s.divide).reshape(s.scalar)
        return {module + s.codes: value.codes, module + s.scale: value.block_scale, module + s.second: second}


def format_of(name: str, dtype: torch.dtype | None, scale_dtype: torch.dtype = torch.float8_e4m3fn) -> Format:
    """`dtype`: of floats, None as they are. `scale_dtype`: of a `.dat` file's block scales. Raises UserError."""
    if name == "dat":
        return DatFormat(dtype, scale_dtype)
    if name == "hf":
        return FloatFormat(dtype)
    if name in SCHEMES:
        return PublicFormat(SCHEMES[name], dtype)
    raise UserError(f"format {name!r}: expected one of {', '.join(FORMATS)}")


def one_second_level(name: str, p: PackedTensor, divide: bool) -> Tensor:
    """The second level of a whole tensor in the convention asked for, fp32 []. Raises UserError where rows differ in it."""
    g = p.global_scale
    if g is None:
        return torch.ones((), dtype=torch.float32)
    if g.ndim:
        if not bool((g == g[0]).all()):
            raise UserError(
                f"{name} has a second-level scale a row, and the format one a tensor. Keep it as .dat, or make floats of it "
                "(--to hf) and quantise those with --levels tensor"
            )
        g = g[0].reshape(())
    return g if p.divide == divide else 1 / g


def same_layout(layouts: Sequence[Layout], parts: dict[str, Part]) -> bool:
    """Whether these files hold just these parts: then a rewrite keeps their order, headers and element types."""
    slots = {key: slot for layout in layouts for key, slot in layout.slots.items()}
    return slots.keys() == parts.keys() and all(_fits(slots[key], *part) for key, part in parts.items())


def fitted(value: Tensor, slot: Slot) -> Tensor:
    """A part as the slot holds it: bytes under another name of byte, E4M3 scales as its floats, [] as [1]. Floats are cast when
    they are written, a piece at a time."""
    if value.dtype == torch.float8_e4m3fn and slot.dtype in FLOAT_SCALES:
        value = value.to(slot.dtype)
    elif value.dtype.is_floating_point and value.dtype.itemsize > 1 and slot.dtype.itemsize > 1:
        check_range(slot.key, value, slot.dtype)
    return value.reshape(slot.shape) if value.numel() == 1 else value


def _fits(slot: Slot, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    if slot.shape != tuple(shape) and not (slot.shape in ((), (1,)) and shape in ((), (1,))):
        return False
    in_dat = slot.key.endswith((dat.QDATA, dat.SCALE))
    if in_dat and dtype.itemsize == 1:
        return slot.dtype.itemsize == 1 or (slot.key.endswith(dat.SCALE) and slot.dtype in FLOAT_SCALES)
    return slot.dtype == dtype


def _float_dtype(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and dtype.is_floating_point and dtype.itemsize > 1 else dtype


def _renamed(name: str, scheme: Scheme) -> str:
    old = next(s.activation for s in SCHEMES.values() if name.endswith(s.activation))
    return name.removesuffix(old) + scheme.activation


def model_order(name: str) -> tuple[int, int, str]:
    """Sorts names as a model computes: embedding, layers by number, what follows them, head."""
    if name == EMBEDDING:
        return 0, 0, name
    found = re.match(r"model\.layers\.(\d+)\.", name)
    if found:
        return 1, int(found[1]), name
    return (3 if name == HEAD else 2), 0, name


def shared_group(name: str) -> tuple[str, ...]:
    """The tensors that serving engines fuse with `name`, itself among them: q, k, v and gate, up of one layer."""
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for member in group:
            if name.endswith(f".{member}{WEIGHT}"):
                stem = name.removesuffix(f"{member}{WEIGHT}")
                return tuple(f"{stem}{m}{WEIGHT}" for m in group)
    return (name,)
