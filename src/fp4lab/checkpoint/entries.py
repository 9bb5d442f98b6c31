"""What is in a checkpoint, tensor by tensor, and what would not be loaded. Only headers and scale bytes are read."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fp4lab.checkpoint.dat import FP4, QDATA, SCALE, DatEntry, DatFile
from fp4lab.checkpoint.hf import FLOATS, HfDirectory
from fp4lab.checkpoint.load import PARTS, check_pair
from fp4lab.checkpoint.public import PublicWeights, Scheme, detect
from fp4lab.checkpoint.safetensors_file import NAMES
from fp4lab.errors import UserError


@dataclass(frozen=True)
class EntryInfo:
    number: int
    key: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    scale_min: int | None = None
    scale_max: int | None = None
    pair: str | None = None
    refused: str | None = None


def entries(path: Path) -> Iterator[EntryInfo]:
    """Of a .dat file or a Hugging Face folder, in the file's order. Raises UserError for what is neither."""
    if path.is_dir():
        yield from _hf(path)
    elif path.is_file():
        yield from _dat(path)
    else:
        raise UserError(f"{path}: no such file or folder; expected a .dat checkpoint or a folder with *.safetensors")


def _dat(path: Path) -> Iterator[EntryInfo]:
    with DatFile.open(path) as file:
        groups: dict[str, dict[str, DatEntry]] = {}
        for e in file.entries.values():
            name, suffix = split_key(e.key)
            groups.setdefault(name, {})[suffix or "raw"] = e
        refused = {name: _refusal(file, found) for name, found in groups.items()}
        for e in file.entries.values():
            name, suffix = split_key(e.key)
            low = high = None
            if suffix == SCALE and e.nbytes and e.dtype.itemsize == 1:
                low, high = _byte_range(file, e)
            yield EntryInfo(
                number=e.number,
                key=e.key,
                type=f"{e.elem_type} fp4 pairs" if e.elem_type == FP4 else f"{e.elem_type} {str(e.dtype)[6:]}",
                shape=e.dims,
                nbytes=e.nbytes,
                scale_min=low,
                scale_max=high,
                pair=_partner(groups[name], suffix),
                refused=refused[name],
            )


def _byte_range(file: DatFile, e: DatEntry) -> tuple[int, int]:
    """Smallest and largest byte, a piece of the map at a time. Bit 7 is the sign, which a scale does not have."""
    low, high = 255, 0
    for start in range(0, e.nbytes, 1 << 22):
        piece = np.frombuffer(file.piece(e.key, start, 1 << 22), dtype=np.uint8)
        low, high = min(low, int(piece.min())), max(high, int(piece.max()))
    return low, high


def split_key(key: str) -> tuple[str, str | None]:
    """(tensor, part): "x.qdata" is the part ".qdata" of "x"."""
    suffix = next((s for s in PARTS if key.endswith(s)), None)
    return (key[: -len(suffix)], suffix) if suffix else (key, None)


def _partner(found: dict[str, DatEntry], suffix: str | None) -> str | None:
    other = {QDATA: SCALE, SCALE: QDATA}.get(suffix or "", QDATA)
    return found[other].key if suffix and other in found else None


def _refusal(file: DatFile, found: dict[str, DatEntry]) -> str | None:
    try:
        check_pair(file, found)
    except UserError as e:
        return str(e).partition(": ")[2]
    return None


def _hf(path: Path) -> Iterator[EntryInfo]:
    scheme = detect(path)
    folder = HfDirectory.open(path)
    try:
        wrong, partner = (None, {}) if scheme is None else _pairs(path, scheme)
        for number, name in enumerate(folder.names()):
            slot = folder.slot(name)
            bad = wrong if wrong and name in wrong.split() else None
            if name not in partner and NAMES[slot.dtype] not in FLOATS and bad is None:
                bad = f"{NAMES[slot.dtype]}; expected one of {', '.join(FLOATS)}"
            low = high = None
            if name in partner and slot.dtype == torch.float8_e4m3fn and slot.nbytes:
                data = folder.tensor(name, ("F8_E4M3",)).view(torch.uint8)
                low, high = int(data.min()), int(data.max())
            yield EntryInfo(number, name, NAMES[slot.dtype], slot.shape, slot.nbytes, low, high, partner.get(name), bad)
    finally:
        folder.close()


def _pairs(path: Path, scheme: Scheme) -> tuple[str | None, dict[str, str]]:
    """(why the folder would be refused, or None; codes and scales by key, each the other's)."""
    try:
        weights = PublicWeights(path, scheme)
    except UserError as e:
        return str(e).partition(": ")[2], {}
    partner = {}
    for name in weights.names():
        if weights.info(name).dtype is None:
            codes, scale, _ = weights.keys(name)
            partner.update({codes: scale, scale: codes})
    weights.close()
    return None, partner
