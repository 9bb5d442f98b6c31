"""The safetensors container: 8 bytes of header length, a JSON header, tensors back to back.

Read without mapping, so that what is in memory is what was asked for; written through a `Layout`, with the bytes that the
safetensors library itself writes (tensors by alignment, then name; header padded with spaces to 8 bytes).
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4lab.checkpoint.layout import Layout, Slot, read_tensor
from fp4lab.errors import UserError

METADATA = "__metadata__"
MAX_HEADER = 100_000_000  # bytes, as the library has it
# In the order that the library sorts by: types of the later rows come first in a file.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


class SafetensorsFile:
    """An open file. Tensors are copies, valid after `close`."""

    def __init__(self, path: str | Path):
        """Reads and checks the header. Raises UserError naming the file and what is wrong."""
        self.path = Path(path)
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except OSError as e:
            raise self._fail(e.strerror or str(e)) from e
        try:
            self._size = os.fstat(self._file).st_size
            self._head, self.metadata, self.slots = self._read_header()
        except BaseException:
            os.close(self._file)
            raise

    def tensor(self, key: str) -> Tensor:
        """One tensor. Raises UserError when the file has been cut since it was opened."""
        try:
            return read_tensor(self._file, self.slots[key])
        except EOFError as e:
            raise self._fail(str(e)) from e

    def layout(self, name: str) -> Layout:
        """A layout whose file is this one, byte for byte, when it gets the same tensors."""
        return Layout(name, self._size, ((0, self._head),), self.slots)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _fail(self, what: str) -> UserError:
        return UserError(f"{self.path}: not a readable safetensors file ({what})")

    def _read_header(self) -> tuple[bytes, dict[str, str], dict[str, Slot]]:
        start = os.pread(self._file, 8, 0)
        if len(start) < 8:
            raise self._fail(f"{self._size} bytes, too few for a header")
        (length,) = struct.unpack("<Q", start)
        if length > min(self._size - 8, MAX_HEADER):
            raise self._fail(f"a header of {length} bytes cannot be in {self._size} bytes")
        raw = os.pread(self._file, length, 8)
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as e:
            raise self._fail(f"its header is no JSON: {e}") from e
        if not isinstance(header, dict):
            raise self._fail("its header is no JSON object")
        metadata = header.pop(METADATA, {})
        if not isinstance(metadata, dict):
            raise self._fail(f"{METADATA} is no object")
        slots = {key: self._slot(key, entry, 8 + length) for key, entry in header.items()}
        at = 8 + length
        for slot in sorted(slots.values(), key=lambda s: (s.offset, s.nbytes)):
            if slot.offset != at:
                raise self._fail(f"{slot.key} begins at byte {slot.offset}; expected {at}, where the one before it ends")
            at += slot.nbytes
        if at != self._size:
            raise self._fail(f"its tensors end at byte {at}, the file at {self._size}")
        return start + raw, metadata, slots

    def _slot(self, key: str, entry: Any, data: int) -> Slot:
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if dtype not in DTYPES:
                raise self._fail(f"{key} is of type {dtype!r}; expected one of {', '.join(DTYPES)}")
            if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, begin, end)):
                raise ValueError("dimensions and offsets are integers from 0 on")
        except (KeyError, TypeError, ValueError) as e:
            raise self._fail(f"{key}: expected dtype, shape and data_offsets ({e})") from e
        slot = Slot(key, DTYPES[dtype], tuple(shape), data + begin)
        if len(shape) > 64 or slot.nbytes != end - begin:
            raise self._fail(f"{key}: {dtype} {shape} does not fill bytes {begin} to {end}")
        return slot


def plan(name: str, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None = None) -> Layout:
    """The layout of a new file, as the library would order it. Raises ValueError for a dtype that the format lacks."""
    for key, (dtype, _) in tensors.items():
        if dtype not in NAMES:
            raise ValueError(f"{key}: safetensors has no type for {dtype}")
    order = sorted(tensors, key=lambda key: (-_RANK[tensors[key][0]], key))
    header: dict[str, Any] = {METADATA: {"format": "pt"} if metadata is None else metadata}
    at, slots = 0, {}
    for key in order:
        dtype, shape = tensors[key]
        slots[key] = Slot(key, dtype, tuple(shape), at)
        end = at + slots[key].nbytes
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    data = 8 + len(raw)
    placed = {k: Slot(k, s.dtype, s.shape, s.offset + data) for k, s in slots.items()}
    return Layout(name, data + at, ((0, struct.pack("<Q", len(raw)) + raw),), placed)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
