"""The `.dat` container (reference section 2.1): entries one after another, no magic, no index, no checksum.

file  := leb(entryCount) entry*
entry := leb(keyByteLen) utf8-key leb(elemType) leb(ndim) leb(dim)*ndim payload

Little-endian; leb is unsigned LEB128. The payload is prod(dims) elements, row-major, not aligned. A reader here scans the
headers once, and trusts nothing: every count is held against the bytes that are left.
"""

import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fp4lab.checkpoint.atomic import whole_file
from fp4lab.checkpoint.layout import FileWriter, Layout, Slot, read_tensor
from fp4lab.errors import UserError

FP4, FP8 = 100, 101
QDATA, SCALE = ".qdata", ".scale"
# An extension of ours: the second-level scale that the reference's format lacks. Files without one are plain.
MULTIPLY, DIVIDE = ".scale_2", ".global_scale"
# elemType: (torch dtype, bytes an element). 100 holds two FP4 codes a byte, dims being the packed ones.
ELEM_TYPES: dict[int, tuple[torch.dtype, int]] = {
    0: (torch.uint8, 1),
    1: (torch.int8, 1),
    2: (torch.int16, 2),
    3: (torch.int32, 4),
    4: (torch.int64, 8),
    5: (torch.float16, 2),
    6: (torch.float32, 4),
    7: (torch.float64, 8),
    11: (torch.bool, 1),
    15: (torch.bfloat16, 2),
    FP4: (torch.uint8, 1),
    FP8: (torch.float8_e4m3fn, 1),
}
TYPE_OF = {dtype: number for number, (dtype, _) in ELEM_TYPES.items() if number != FP4}
MAX_RANK = 8


class DatError(UserError):
    """A malformed `.dat` file. The message names file, entry number, byte offset and, where known, the key."""


@dataclass(frozen=True)
class DatEntry:
    """One tensor of the file: `offset` and `nbytes` locate its payload."""

    key: str
    elem_type: int
    dims: tuple[int, ...]
    offset: int
    nbytes: int
    number: int  # position in the file, from 0

    @property
    def dtype(self) -> torch.dtype:
        return ELEM_TYPES[self.elem_type][0]


class DatFile:
    """An open file. `entries` keeps the file's order. Tensors are copies, valid after `close`."""

    def __init__(self, path: Path, file: int, size: int, entries: dict[str, DatEntry]):
        self.path, self._file, self.size, self.entries = path, file, size, entries

    @classmethod
    def open(cls, path: str | Path) -> "DatFile":
        """Reads the headers. Raises DatError."""
        path = Path(path)
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as e:
            raise DatError(f"{path}: cannot read it ({e.strerror}); check weights.path") from e
        try:
            size = os.fstat(file).st_size
            if size == 0:
                raise DatError(f"{path}: the file is empty; expected a .dat checkpoint")
            with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as mapped:  # for the headers alone: payloads are read
                return cls(path, file, size, _scan(path, mapped, size))
        except OSError as e:
            os.close(file)
            raise DatError(f"{path}: cannot read it ({e.strerror}); check weights.path") from e
        except BaseException:
            os.close(file)
            raise

    def payload(self, key: str) -> bytes:
        """The raw bytes of one entry."""
        return self.piece(key, 0, self.entries[key].nbytes)

    def piece(self, key: str, start: int, most: int) -> bytes:
        """At most `most` bytes of one entry from byte `start` of it."""
        e = self.entries[key]
        return os.pread(self._file, min(most, e.nbytes - start), e.offset + start)

    def tensor(self, key: str) -> Tensor:
        """One entry as a tensor of its own dtype and dims. Raises DatError when the file has been cut since."""
        e = self.entries[key]
        try:
            return read_tensor(self._file, Slot(key, e.dtype, e.dims, e.offset))
        except EOFError as error:
            raise DatError(f"{self.path}: {error}") from error

    def layout(self, name: str) -> Layout:
        """A layout whose file is this one, byte for byte, when it gets the same tensors."""
        literals, at = [], 0
        for e in self.entries.values():
            literals.append((at, os.pread(self._file, e.offset - at, at)))
            at = e.offset + e.nbytes
        if at < self.size:  # no entries: the count alone
            literals.append((at, os.pread(self._file, self.size - at, at)))
        slots = {e.key: Slot(e.key, e.dtype, e.dims, e.offset) for e in self.entries.values()}
        return Layout(name, self.size, tuple(literals), slots)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "DatFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Scanner:
    """A cursor over the map that knows where it is, for the errors."""

    def __init__(self, path: Path, data: mmap.mmap, size: int):
        self.path, self.data, self.size = path, data, size
        self.at, self.entry, self.key = 0, -1, ""

    def fail(self, what: str) -> DatError:
        key = f" ({self.key})" if self.key else ""
        where = f"entry {self.entry}{key}, " if self.entry >= 0 else ""
        return DatError(f"{self.path}: {where}byte {self.at}: {what}")

    def leb(self, what: str) -> int:
        value = shift = 0
        start = self.at
        while True:
            if self.at >= self.size:
                raise self.fail(f"the file ends inside {what}; it is truncated")
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
            if shift > 63:
                self.at = start
                raise self.fail(f"{what} is longer than 64 bits; this is no .dat file, or it is damaged")
        if value >= 1 << 63:
            self.at = start
            raise self.fail(f"{what} is {value}, beyond any file")
        return value

    def take(self, n: int, what: str) -> int:
        """Moves over n bytes and returns where they start."""
        if n > self.size - self.at:
            raise self.fail(f"{what} needs {n} bytes, {self.size - self.at} are left; the file is truncated")
        start = self.at
        self.at += n
        return start


def _scan(path: Path, data: mmap.mmap, size: int) -> dict[str, DatEntry]:
    s = _Scanner(path, data, size)
    count = s.leb("the entry count")
    if count > size // 3:  # an entry has at least a key length, a type and a rank
        raise s.fail(f"{count} entries cannot fit into {size} bytes; this is no .dat file, or it is damaged")
    entries: dict[str, DatEntry] = {}
    for s.entry in range(count):
        s.key = ""
        length = s.leb("the key length")
        start = s.take(length, "the key")
        try:
            s.key = data[start : s.at].decode("utf-8")
        except UnicodeDecodeError as e:
            s.at = start
            raise s.fail(f"the key is not UTF-8 ({e.reason})") from None
        if s.key in entries:
            raise s.fail(f"the key was already used by entry {entries[s.key].number}")
        elem_type = s.leb("the element type")
        if elem_type not in ELEM_TYPES:
            raise s.fail(f"element type {elem_type} is unknown; expected one of {sorted(ELEM_TYPES)}")
        rank = s.leb("the number of dimensions")
        if rank > MAX_RANK:
            raise s.fail(f"{rank} dimensions; expected at most {MAX_RANK}")
        dims = tuple(s.leb("a dimension") for _ in range(rank))
        nbytes = math.prod(dims) * ELEM_TYPES[elem_type][1]
        if nbytes == 0 and math.prod(d or 1 for d in dims) >= 1 << 60:
            raise s.fail(f"the dimensions {list(dims)} are beyond any tensor")
        entries[s.key] = DatEntry(s.key, elem_type, dims, s.take(nbytes, f"the payload {list(dims)}"), nbytes, s.entry)
    s.entry = -1
    if s.at != size:
        raise s.fail(f"{size - s.at} bytes follow the last of {count} entries")
    return entries


def leb128(value: int) -> bytes:
    """Unsigned LEB128, shortest form."""
    out = bytearray()
    while True:
        byte = value & 0x7F
        value >>= 7
        out.append(byte | (0x80 if value else 0))
        if not value:
            return bytes(out)


def plan(name: str, entries: Mapping[str, tuple[int, tuple[int, ...]]]) -> Layout:
    """The layout of a file with these (element type, dims), in their order. Raises ValueError for an unknown type."""
    literals, slots = [], {}
    header, start, at = leb128(len(entries)), 0, 0
    for key, (elem_type, dims) in entries.items():
        if elem_type not in ELEM_TYPES:
            raise ValueError(f"{key}: there is no element type {elem_type}")
        encoded = key.encode("utf-8")
        header += leb128(len(encoded)) + encoded + leb128(elem_type) + leb128(len(dims)) + b"".join(map(leb128, dims))
        literals.append((start, header))
        slots[key] = slot = Slot(key, ELEM_TYPES[elem_type][0], tuple(dims), start + len(header))
        start = at = slot.offset + slot.nbytes
        header = b""
    if header:
        literals.append((0, header))
        at = len(header)
    return Layout(name, at, tuple(literals), slots)


def write_dat(path: str | Path, entries: Iterable[tuple[str, Tensor, int | None]]) -> None:
    """Writes (key, tensor, elemType or None for the dtype's own) to `path`, whole or not at all.

    Raises ValueError for a dtype that the format lacks, a type of another size, and a key given twice.
    """
    types: dict[str, tuple[int, tuple[int, ...]]] = {}
    values = {}
    for key, t, elem_type in entries:
        number = TYPE_OF.get(t.dtype) if elem_type is None else elem_type
        if number is None or ELEM_TYPES.get(number, (None, 0))[1] != t.element_size():
            raise ValueError(f"{key}: {t.dtype} cannot be written as element type {number}")
        if key in types:
            raise ValueError(f"{key}: given twice")
        types[key], values[key] = (number, tuple(t.shape)), t
    with whole_file(path) as part, FileWriter(part, plan(Path(path).name, types)) as writer:
        for key, t in values.items():
            writer.put(key, t)
