"""A Hugging Face model folder: config.json and safetensors, in one file or several with an index. Pickle is never loaded."""

import json
import math
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fp4lab.errors import UserError

INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")


class HfDirectory:
    """Tensors by name, read when asked for."""

    def __init__(self, folder: Path, where: dict[str, Path]):
        self.folder, self._where = folder, where
        self._open: dict[Path, Any] = {}

    @classmethod
    def open(cls, folder: str | Path) -> "HfDirectory":
        """Finds every tensor of the folder. Raises UserError naming what is missing."""
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; weights.path takes one with config.json and *.safetensors")
        index = folder / INDEX
        if index.is_file():
            where = _read_index(index)
        else:
            files = sorted(folder.glob("*.safetensors"))
            if not files:
                hint = ""
                if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
                    hint = " Its .bin or .pt files are pickles, which are never loaded: save it with safe_serialization."
                raise UserError(f"{folder}: no *.safetensors in it.{hint}")
            where = {}
            for file in files:
                for name in cls._handle(file).keys():  # noqa: SIM118  (not a dict)
                    if name in where:
                        raise UserError(f"{file}: {name} is already in {where[name].name}; expected it once")
                    where[name] = file
        return cls(folder, where)

    @property
    def paths(self) -> list[Path]:
        return sorted(set(self._where.values()))

    def names(self) -> list[str]:
        return list(self._where)

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the dtype of the file. Raises UserError."""
        file = self._where[name]
        try:
            dtype = self._slice(name).get_dtype()
            if dtype not in FLOATS:
                raise UserError(f"{file}: {name} is {dtype}; expected one of {', '.join(FLOATS)}")
            return self._open[file].get_tensor(name)
        except SafetensorError as e:
            raise UserError(f"{file}: {name} is announced by the index, but: {e}") from e

    def header(self, name: str) -> tuple[str, tuple[int, ...], int]:
        """(dtype as the file names it, shape, bytes), without reading the tensor."""
        found = self._slice(name)
        dtype, shape = found.get_dtype(), tuple(found.get_shape())
        bits = int(re.sub(r"\D.*", "", dtype.lstrip("BFIUC")) or 8)  # BF16, F8_E4M3, BOOL
        return dtype, shape, math.prod(shape) * bits // 8

    def _slice(self, name: str) -> Any:
        file = self._where[name]
        if file not in self._open:
            self._open[file] = self._handle(file)
        try:
            return self._open[file].get_slice(name)
        except SafetensorError as e:
            raise UserError(f"{file}: {name} is announced by the index, but: {e}") from e

    def close(self) -> None:
        self._open.clear()

    @staticmethod
    def _handle(file: Path) -> Any:
        try:
            return safe_open(str(file), framework="pt")
        except (OSError, SafetensorError) as e:
            raise UserError(f"{file}: not a readable safetensors file ({e})") from e


def _read_index(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        where = {str(name): index.parent / str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{index}: expected a JSON object with a 'weight_map' of tensor to file ({e!r})") from e
    for file in sorted(set(where.values())):
        if file.parent != index.parent or not file.is_file():
            raise UserError(f"{index}: names {file.name}, which is not in the folder; download it again")
    return where
