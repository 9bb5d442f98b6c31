"""Who holds the bytes: tensors by kind, device and dtype, shared storage found by its address, not by object identity."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from fp4lab.events import TensorBytes
from fp4lab.telemetry.host import MIB

if TYPE_CHECKING:
    from torch import Tensor


def tensor_report(groups: "Mapping[str, Iterable[Tensor]]") -> list[TensorBytes]:
    """kind -> tensors, largest row first. Bytes of a storage seen in an earlier group (or tensor) count as duplicate.

    Views count their own elements; two views of different parts of one storage are no duplicates of each other.
    """
    rows: dict[tuple[str, str, str], TensorBytes] = {}
    seen: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for kind, tensors in groups.items():
        for t in tensors:
            device, dtype = str(t.device), str(t.dtype).removeprefix("torch.")
            row = rows.setdefault((kind, device, dtype), TensorBytes(tensor_kind=kind, device=device, dtype=dtype))
            size = t.numel() * t.element_size()
            start = t.data_ptr()
            spans = seen.setdefault((device, t.untyped_storage().data_ptr()), [])
            again = sum(max(0, min(start + size, b) - max(start, a)) for a, b in spans)
            if again < size:
                spans.append((start, start + size))
            row.count += 1
            row.mib += size / MIB
            row.duplicate_mib += min(again, size) / MIB
    return sorted(rows.values(), key=lambda r: -r.mib)
