"""One way to read weights, whatever holds them: names as Hugging Face has them, tensors packed or not."""

import difflib
import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fp4lab.checkpoint.dat import DatEntry, DatError, DatFile, write_dat
from fp4lab.checkpoint.hf import HfDirectory
from fp4lab.errors import UserError
from fp4lab.nvfp4 import BLOCK, PackedTensor

QDATA, SCALE = ".qdata", ".scale"
# An extension of ours: the second-level scale that the reference's format lacks. Files without one are plain.
MULTIPLY, DIVIDE = ".scale_2", ".global_scale"
PARTS = (QDATA, SCALE, MULTIPLY, DIVIDE)
_BYTES = (torch.uint8, torch.int8, torch.float8_e4m3fn)


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


class Weights(Protocol):
    """A checkpoint, open."""

    @property
    def files(self) -> list[FileInfo]: ...

    def names(self) -> list[str]: ...

    def get(self, name: str) -> Tensor | PackedTensor: ...

    def close(self) -> None: ...


class DatWeights:
    """A `.dat` file: `NAME.qdata` and `NAME.scale` are one packed tensor, the rest is raw."""

    def __init__(self, path: Path):
        self.file = DatFile.open(path)
        self.files = [FileInfo("weights", path.resolve(), "dat")]
        self._parts = _pair(self.file)

    def names(self) -> list[str]:
        return list(self._parts)

    def get(self, name: str) -> Tensor | PackedTensor:
        """Raises DatError for a pair whose parts do not fit together."""
        parts = self._parts[name]
        if "raw" in parts:
            return self.file.tensor(parts["raw"].key)
        codes = self.file.tensor(parts[QDATA].key).view(torch.uint8)
        second, divide = None, DIVIDE in parts
        for suffix in (MULTIPLY, DIVIDE):
            if suffix in parts:
                second = self.file.tensor(parts[suffix].key)
        scale = _block_scale(self.file, parts[SCALE])
        return PackedTensor(codes, scale, second, (codes.shape[0], codes.shape[1] * 2), divide)

    def close(self) -> None:
        self.file.close()


class HfWeights:
    """A Hugging Face folder."""

    def __init__(self, path: Path):
        self.folder = HfDirectory.open(path)
        self.files = [FileInfo("weights", p.resolve(), "safetensors") for p in self.folder.paths]

    def names(self) -> list[str]:
        return self.folder.names()

    def get(self, name: str) -> Tensor:
        return self.folder.tensor(name)

    def close(self) -> None:
        self.folder.close()


def open_weights(kind: str, path: str | Path) -> Weights:
    """kind "dat" or "hf". Raises UserError, naming files of similar name where the path does not exist."""
    path = Path(path)
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in _siblings(path)], n=3, cutoff=0.4)
        hint = f" Near it: {', '.join(near)}." if near else ""
        raise UserError(f"weights.path={path}: no such file or folder.{hint}")
    if kind == "dat" and path.is_dir():
        raise UserError(f"weights.path={path}: a folder; weights=dat takes a .dat file (weights=hf takes a folder)")
    return DatWeights(path) if kind == "dat" else HfWeights(path)


def save_dat(
    path: str | Path, tensors: dict[str, Tensor | PackedTensor], scale_dtype: torch.dtype = torch.float8_e4m3fn
) -> FileInfo:
    """Writes a `.dat` file, whole or not at all. Single-level packed tensors give a file of the reference's format.

    `scale_dtype` float16 writes block scales as the reference's first exporter did (quirk.fp16_scales).
    """
    entries = [e for name, value in tensors.items() for e in _entries(name, value, scale_dtype)]
    write_dat(path, entries, len(entries))
    return FileInfo("output", Path(path).resolve(), "dat")


def wide_scales(path: str | Path) -> tuple[int, int]:
    """(entries, bytes) of the block scales in a `.dat` file that are floats of several bytes and not E4M3 bytes."""
    with DatFile.open(path) as file:
        wide = [e for key, e in file.entries.items() if key.endswith(SCALE) and e.dtype not in _BYTES]
    return len(wide), sum(e.nbytes for e in wide)


def _entries(name: str, value: Tensor | PackedTensor, scale_dtype: torch.dtype) -> Iterable[tuple[str, Tensor, int | None]]:
    if isinstance(value, Tensor):
        yield name, value, None
        return
    if len(value.shape) != 2 or value.shape[1] % BLOCK:
        raise ValueError(f"{name}: shape {list(value.shape)}; the format holds matrices of whole blocks of {BLOCK}")
    yield name + QDATA, value.codes, None
    yield name + SCALE, value.block_scale.to(scale_dtype), None
    if value.global_scale is not None:
        yield name + (DIVIDE if value.divide else MULTIPLY), value.global_scale, None


def _siblings(path: Path) -> list[Path]:
    return list(path.parent.iterdir()) if path.parent.is_dir() else []


def _pair(file: DatFile) -> dict[str, dict[str, DatEntry]]:
    """Logical name -> its entries, checked against each other."""
    parts: dict[str, dict[str, DatEntry]] = {}
    for key, entry in file.entries.items():
        suffix = next((s for s in PARTS if key.endswith(s)), None)
        name = key[: -len(suffix)] if suffix else key
        if "raw" in parts.setdefault(name, {}) or (suffix is None and parts[name]):
            raise _error(file, entry, f"{name} is there both packed and raw; expected one of them")
        parts[name][suffix or "raw"] = entry
    for found in parts.values():
        check_pair(file, found)
    return parts


def check_pair(file: DatFile, found: dict[str, DatEntry]) -> None:
    """Raises DatError unless the entries of one tensor, by suffix, fit together."""
    if "raw" in found:
        return
    some = next(iter(found.values()))
    for needed in (QDATA, SCALE):
        if needed not in found:
            raise _error(file, some, f"its {needed} entry is missing; packed tensors come in pairs")
    codes, scale = found[QDATA], found[SCALE]
    if codes.dtype not in (torch.uint8, torch.int8):
        raise _error(file, codes, f"packed codes are of element type {codes.elem_type}; expected 0, 1 or 100")
    if len(codes.dims) != 2 or codes.dims[1] * 2 % BLOCK:
        raise _error(file, codes, f"packed codes are {list(codes.dims)}; expected [out, in / 2] with in % {BLOCK} == 0")
    wanted = (codes.dims[0], codes.dims[1] * 2 // BLOCK)
    if scale.dims != wanted:
        raise _error(file, scale, f"block scales are {list(scale.dims)}; expected {list(wanted)} for these codes")
    if MULTIPLY in found and DIVIDE in found:
        raise _error(file, found[DIVIDE], f"there is a {MULTIPLY} entry too; expected one second-level scale")
    for suffix in (MULTIPLY, DIVIDE):
        e = found.get(suffix)
        if e is not None and (e.dtype != torch.float32 or e.dims not in ((), (codes.dims[0], 1))):
            raise _error(file, e, f"expected float32 [] or {[codes.dims[0], 1]}, got {e.dtype} {list(e.dims)}")


def _block_scale(file: DatFile, entry: DatEntry) -> Tensor:
    """E4M3 scales. Bytes are decoded as E4M3, never as integers (reference section 2.5); float scales must be E4M3 numbers."""
    value = file.tensor(entry.key)
    if value.dtype in _BYTES:
        return value.view(torch.float8_e4m3fn)
    if not value.dtype.is_floating_point:
        raise _error(file, entry, f"block scales are of element type {entry.elem_type}; expected bytes or floats")
    exact = value.to(torch.float8_e4m3fn)
    if not torch.equal(exact.to(value.dtype), value):
        raise _error(file, entry, "float block scales that no E4M3 number equals; convert the file again with E4M3 scales")
    return exact


def _error(file: DatFile, entry: DatEntry, what: str) -> DatError:
    return DatError(f"{file.path}: entry {entry.number} ({entry.key}), byte {entry.offset}: {what}")
