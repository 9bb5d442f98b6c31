"""A Hugging Face model folder: config.json and safetensors, in one file or several with an index. Pickle is never loaded."""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fp4lab.checkpoint.layout import Layout, Slot
from fp4lab.checkpoint.safetensors_file import NAMES, SafetensorsFile
from fp4lab.errors import UserError

INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "F16", "BF16")


class HfDirectory:
    """Tensors by name, read when asked for."""

    def __init__(self, folder: Path, where: dict[str, Path]):
        self.folder, self._where = folder, where
        self._open: dict[Path, SafetensorsFile] = {}

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
                opened = SafetensorsFile(file)
                opened.close()
                for name in opened.slots:
                    if name in where:
                        raise UserError(f"{file}: {name} is already in {where[name].name}; expected it once")
                    where[name] = file
        return cls(folder, where)

    @property
    def paths(self) -> list[Path]:
        return sorted(set(self._where.values()))

    def names(self) -> list[str]:
        return list(self._where)

    def tensor(self, name: str, expected: Sequence[str] = FLOATS) -> Tensor:
        """One tensor, in the dtype of the file. Raises UserError when that is none of `expected`."""
        slot = self.slot(name)
        if NAMES[slot.dtype] not in expected:
            raise UserError(f"{self._where[name]}: {name} is {NAMES[slot.dtype]}; expected one of {', '.join(expected)}")
        return self._file(self._where[name]).tensor(name)

    def slot(self, name: str) -> Slot:
        """Type, shape and size of one tensor, without reading it."""
        file = self._where[name]
        slots = self._file(file).slots
        if name not in slots:
            raise UserError(f"{file}: {name} is announced by the index, but is not in the file")
        return slots[name]

    def layouts(self) -> list[Layout]:
        """Layouts whose files are this folder's, byte for byte, when they get the same tensors."""
        return [self._file(path).layout(path.name) for path in self.paths]

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _file(self, file: Path) -> SafetensorsFile:
        if file not in self._open:
            self._open[file] = SafetensorsFile(file)
        return self._open[file]


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
