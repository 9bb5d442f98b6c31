"""What every checkpoint is to its readers: tensors by the names that Hugging Face has, packed or not."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fp4lab.checkpoint.layout import Layout
from fp4lab.errors import UserError
from fp4lab.nvfp4 import PackedTensor

FP16_MAX = 65504.0


@dataclass(frozen=True)
class FileInfo:
    """A file that a run used. `sha256` is computed when first asked for."""

    role: str
    path: Path
    format: str

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size

    @functools.cached_property
    def sha256(self) -> str:
        with self.path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()


@dataclass(frozen=True)
class TensorInfo:
    """A tensor before it is read: logical shape; the dtype of its floats, or None with the levels of a packed one."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    levels: str = "single"
    divide: bool = False

    @classmethod
    def of(cls, value: Tensor | PackedTensor) -> "TensorInfo":
        if isinstance(value, Tensor):
            return cls(tuple(value.shape), value.dtype)
        return cls(value.shape, None, value.levels, value.divide)


def check_range(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Raises UserError where float16 would make an infinity of a number."""
    if dtype == torch.float16 and value.dtype != dtype and value.numel():
        low, high = torch.aminmax(value)
        if max(-float(low), float(high)) > FP16_MAX:
            raise UserError(f"{name} has values beyond {FP16_MAX:g}, the largest of float16; write bfloat16 (--dtype bfloat16)")


class Weights(Protocol):
    """A checkpoint, open. `format` is one of formats.FORMATS, or "memory"."""

    @property
    def format(self) -> str: ...

    @property
    def files(self) -> list[FileInfo]: ...

    def names(self) -> list[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def get(self, name: str) -> Tensor | PackedTensor: ...

    def layouts(self) -> list[Layout]:
        """Of its files, for writing the same files with other tensors; none for what is not on the disk."""
        ...

    def close(self) -> None: ...


class MemoryWeights:
    """Tensors that are in memory already, in this order."""

    format = "memory"

    def __init__(self, tensors: dict[str, Tensor | PackedTensor]):
        self.tensors = tensors
        self.files: list[FileInfo] = []

    def names(self) -> list[str]:
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo.of(self.tensors[name])

    def get(self, name: str) -> Tensor | PackedTensor:
        return self.tensors[name]

    def layouts(self) -> list[Layout]:
        return []

    def close(self) -> None:
        pass


class Replaced:
    """A checkpoint with the values of a trained model in the places of its own: names in its order, then new ones.

    A float is told in the dtype that the checkpoint has it in, and given as it is: whoever writes it rounds it once.
    """

    def __init__(self, weights: Weights, values: dict[str, Tensor | PackedTensor]):
        self.weights, self.values = weights, values
        self.format, self.files = weights.format, weights.files
        self._known = set(weights.names())

    def names(self) -> list[str]:
        return [*(n for n in self.weights.names()), *(n for n in self.values if n not in self._known)]

    def info(self, name: str) -> TensorInfo:
        if name not in self.values:
            return self.weights.info(name)
        found = TensorInfo.of(self.values[name])
        if found.dtype is None or name not in self._known:
            return found
        return TensorInfo(found.shape, self.weights.info(name).dtype or found.dtype)

    def get(self, name: str) -> Tensor | PackedTensor:
        return self.values[name] if name in self.values else self.weights.get(name)

    def layouts(self) -> list[Layout]:
        return self.weights.layouts()

    def close(self) -> None:
        self.weights.close()
