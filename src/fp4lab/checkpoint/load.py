"""One way to read weights, whatever holds them: names as Hugging Face has them, tensors packed or not."""

import difflib
from pathlib import Path

import torch
from torch import Tensor

from fp4lab.checkpoint.atomic import whole_file
from fp4lab.checkpoint.dat import DIVIDE, MULTIPLY, QDATA, SCALE, DatEntry, DatError, DatFile
from fp4lab.checkpoint.formats import DatFormat, fitted
from fp4lab.checkpoint.hf import HfDirectory
from fp4lab.checkpoint.layout import FileWriter, Layout
from fp4lab.checkpoint.public import PublicWeights, detect
from fp4lab.checkpoint.weights import FileInfo, TensorInfo, Weights
from fp4lab.errors import UserError
from fp4lab.nvfp4 import BLOCK, PackedTensor

PARTS = (QDATA, SCALE, MULTIPLY, DIVIDE)
_BYTES = (torch.uint8, torch.int8, torch.float8_e4m3fn)


class DatWeights:
    """A `.dat` file: `NAME.qdata` and `NAME.scale` are one packed tensor, the rest is raw."""

    format = "dat"

    def __init__(self, path: Path):
        self.file = DatFile.open(path)
        self.files = [FileInfo("weights", path.resolve(), "dat")]
        self._parts = _pair(self.file)

    def names(self) -> list[str]:
        return list(self._parts)

    def info(self, name: str) -> TensorInfo:
        parts = self._parts[name]
        if "raw" in parts:
            return TensorInfo(parts["raw"].dims, parts["raw"].dtype)
        second = parts.get(MULTIPLY) or parts.get(DIVIDE)
        rows, half = parts[QDATA].dims
        levels = "single" if second is None else "row" if second.dims else "tensor"
        return TensorInfo((rows, half * 2), None, levels, DIVIDE in parts)

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

    def layouts(self) -> list[Layout]:
        return [self.file.layout(self.file.path.name)]

    def close(self) -> None:
        self.file.close()


class HfWeights:
    """A Hugging Face folder of floats."""

    format = "hf"

    def __init__(self, path: Path):
        self.folder = HfDirectory.open(path)
        self.files = [FileInfo("weights", p.resolve(), "safetensors") for p in self.folder.paths]

    def names(self) -> list[str]:
        return self.folder.names()

    def info(self, name: str) -> TensorInfo:
        slot = self.folder.slot(name)
        return TensorInfo(slot.shape, slot.dtype)

    def get(self, name: str) -> Tensor:
        return self.folder.tensor(name)

    def layouts(self) -> list[Layout]:
        return self.folder.layouts()

    def close(self) -> None:
        self.folder.close()


def open_weights(kind: str, path: str | Path) -> Weights:
    """kind "dat" or "hf"; the folder's config.json says whether it is plain, compressed-tensors or ModelOpt.

    Raises UserError as `check_path` does, and for what is no such checkpoint.
    """
    path = check_path(kind, path)
    if kind == "dat":
        return DatWeights(path)
    scheme = detect(path)
    return HfWeights(path) if scheme is None else PublicWeights(path, scheme)


def check_path(kind: str, path: str | Path, key: str = "weights.path=") -> Path:
    """Raises UserError for what is not there, naming files of similar name, and for a file where a folder is expected."""
    path = Path(path)
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in _siblings(path)], n=3, cutoff=0.4)
        hint = f" Near it: {', '.join(near)}." if near else ""
        raise UserError(f"{key}{path}: no such file or folder.{hint}")
    if path.is_file() and path.suffix in (".safetensors", ".bin", ".pt"):
        raise UserError(
            f"{key}{path}: one file of a Hugging Face folder; give the folder, with its config.json"
            + (" (weights=hf)" if key and kind == "dat" else "")
        )
    if kind == "dat" and path.is_dir():
        raise UserError(f"{key}{path}: a folder; weights=dat takes a .dat file (weights=hf takes a folder)")
    if kind == "hf" and path.is_file():
        raise UserError(f"{key}{path}: a file; weights=hf takes a folder (weights=dat takes a .dat file)")
    return path


def save_dat(
    path: str | Path, tensors: dict[str, Tensor | PackedTensor], scale_dtype: torch.dtype = torch.float8_e4m3fn
) -> FileInfo:
    """Writes a `.dat` file, whole or not at all. Single-level packed tensors give a file of the reference's format.

    `scale_dtype` float16 writes block scales as the reference's first exporter did (quirk.fp16_scales).
    """
    form = DatFormat(None, scale_dtype)
    parts = {k: p for name, value in tensors.items() for k, p in form.parts(name, TensorInfo.of(value)).items()}
    (layout,) = form.plan(parts, 0)
    with whole_file(path) as part, FileWriter(part, layout) as writer:
        for name, value in tensors.items():
            for key, t in form.encode(name, value).items():
                writer.put(key, fitted(t, layout.slots[key]), cast=True)
    return FileInfo("output", Path(path).resolve(), "dat")


def wide_scales(path: str | Path) -> tuple[int, int]:
    """(entries, bytes) of the block scales in a `.dat` file that are floats of several bytes and not E4M3 bytes."""
    with DatFile.open(path) as file:
        wide = [e for key, e in file.entries.items() if key.endswith(SCALE) and e.dtype not in _BYTES]
    return len(wide), sum(e.nbytes for e in wide)


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
