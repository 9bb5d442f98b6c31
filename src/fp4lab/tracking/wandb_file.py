"""The .wandb file of an offline run, read back: a 7-byte header, then blocks of 32 KiB as in LevelDB's log.

A record is in one piece or several; each piece has checksum (4 bytes), length (2) and kind (1: whole, 2: first, 3: middle,
4: last) before it, and none starts in the last 6 bytes of a block.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK, _PIECE = 7, 32768, struct.Struct("<IHB")


def read_records(path: Path) -> Iterator[Any]:
    """wandb's Record messages in order, until the file ends or a piece is cut off."""
    from wandb.proto import wandb_internal_pb2

    message: Any = vars(wandb_internal_pb2)["Record"]

    data, at, gathered = path.read_bytes(), _HEADER, b""
    while at + _PIECE.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _PIECE.size:
            at += left
            continue
        _, size, kind = _PIECE.unpack_from(data, at)
        at += _PIECE.size
        if kind == 0 or at + size > len(data):
            return
        gathered += data[at : at + size]
        at += size
        if kind in (1, 4):
            yield message.FromString(gathered)
            gathered = b""


def finished(path: Path) -> bool:
    """The file holds its run's end."""
    return any(r.WhichOneof("record_type") == "exit" for r in read_records(path))
