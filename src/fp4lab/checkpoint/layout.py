"""Where the bytes of a file go, decided before the first is written, and a writer that fills the places in any order.

So a checkpoint can be streamed, one tensor in memory at a time, into formats whose header names every tensor first.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_PIECE = 1 << 22  # elements that are cast at a time


@dataclass(frozen=True)
class Slot:
    """The place of one tensor: row-major little-endian elements from byte `offset` on."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """One file: its name in the checkpoint, its size, the bytes between tensors as (offset, bytes), the tensors by key."""

    name: str
    size: int
    literals: tuple[tuple[int, bytes], ...]
    slots: dict[str, Slot]


class FileWriter:
    """Fills a layout. Raises ValueError for a tensor that is not the announced one, and on closing when one is missing."""

    def __init__(self, path: Path, layout: Layout):
        self.path, self.layout, self._missing = path, layout, set(layout.slots)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if layout.size:
                os.posix_fallocate(self._file, 0, layout.size)  # a full disk is found now, not halfway
            for offset, data in layout.literals:
                _write(self._file, data, offset)
        except BaseException:
            os.close(self._file)
            raise

    def put(self, key: str, value: Tensor, cast: bool = False) -> None:
        """Writes one tensor, from whatever device. `cast`: floats of another dtype become the slot's, without a copy of all."""
        slot = self.layout.slots[key]
        if cast and value.dtype != slot.dtype and value.is_floating_point() and slot.dtype.is_floating_point:
            self._put_cast(slot, value)
            return
        if value.dtype.itemsize != slot.dtype.itemsize or tuple(value.shape) != slot.shape:
            raise ValueError(f"{key}: {value.dtype} {list(value.shape)}; announced as {slot.dtype} {list(slot.shape)}")
        if value.numel():
            data = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
            _write(self._file, memoryview(data), slot.offset)  # type: ignore[arg-type]
        self._missing.discard(key)

    def _put_cast(self, slot: Slot, value: Tensor) -> None:
        if tuple(value.shape) != slot.shape:
            raise ValueError(f"{slot.key}: {list(value.shape)}; announced as {list(slot.shape)}")
        flat, at = value.detach().reshape(-1), slot.offset
        for piece in flat.split(_PIECE):
            data = piece.to(slot.dtype).cpu().view(torch.uint8).numpy()
            _write(self._file, memoryview(data), at)
            at += data.nbytes
        self._missing.discard(slot.key)

    def close(self) -> None:
        """Brings the file to the disk. Raises ValueError when a tensor was never written."""
        try:
            os.fsync(self._file)
        finally:
            self.abandon()
        if self._missing:
            raise ValueError(f"{self.path.name}: never written: {', '.join(sorted(self._missing)[:3])}")

    def abandon(self) -> None:
        """Closes the file as it is."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abandon() if kind is not None else self.close()


def _write(file: int, data: "bytes | memoryview", offset: int) -> None:
    """All of `data`; one call of the kernel writes 2 GiB at most."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(file, view[done : done + (1 << 30)], offset + done)


def read_tensor(file: int, slot: Slot) -> Tensor:
    """One tensor of an open file, in memory of its own. Raises EOFError when the file has become shorter."""
    out = torch.empty(slot.nbytes, dtype=torch.uint8)
    view, done = memoryview(out.numpy()), 0  # type: ignore[arg-type]
    while done < slot.nbytes:
        got = os.preadv(file, [view[done : done + (1 << 30)]], slot.offset + done)
        if not got:
            raise EOFError(f"{slot.key}: the file ends {slot.nbytes - done} bytes early")
        done += got
    return out.view(slot.dtype).reshape(slot.shape) if out.numel() else torch.empty(slot.shape, dtype=slot.dtype)
