"""Memory as the worker sees its own: torch's allocator, cudaMemGetInfo, resident set with its peak since the last look."""

import os
import re
from typing import Any

from fp4lab.events import Memory
from fp4lab.telemetry.host import MIB, process_tree
from fp4lab.telemetry.reader import MemoryReader


class PhaseMeter:
    """`read()` gives memory now and the peaks since the previous `read()`.

    `device` is "cpu", "cuda" or "auto"; `cuda` the module torch.cuda, or something that answers like it. The resident peak is
    VmHWM, reset through /proc/self/clear_refs where the kernel permits; where it does not, the peak is None rather than that
    of the whole process. On a device that shares the machine's memory cudaMemGetInfo is not asked: what it calls free leaves
    out pages that the system would give back. A device that has failed makes its values None; it raises nothing here, because
    the last phase of a failed run is reported too.
    """

    def __init__(self, device: str, cuda: Any = None, reader: MemoryReader | None = None):
        if cuda is None:
            import torch

            cuda = torch.cuda
        self._cuda = cuda if device != "cpu" and cuda.is_available() else None
        self._can_reset = _reset_peak()
        self._reader = reader or MemoryReader()
        self._unified = False
        if self._cuda is not None:
            properties = self._cuda.get_device_properties(self._cuda.current_device())
            self._unified = bool(getattr(properties, "is_integrated", False))
            self._cuda.reset_peak_memory_stats()

    def read(self) -> Memory:
        memory = self._reader.read(process_tree(os.getpid()))
        if self._can_reset:
            memory.proc_peak_rss_mib = _peak_rss_mib()
            _reset_peak()
        if self._cuda is not None:
            self._read_device(self._cuda, memory)
        return memory

    def _read_device(self, cuda: Any, memory: Memory) -> None:
        memory.unified = self._unified
        memory.cuda_used_mib = memory.cuda_total_mib = None
        try:
            counts = cuda.memory_stats_as_nested_dict()  # one question; memory_allocated() and its like ask it each time
            for name, counter, when in (
                ("torch_allocated_mib", "allocated_bytes", "current"),
                ("torch_reserved_mib", "reserved_bytes", "current"),
                ("torch_peak_mib", "allocated_bytes", "peak"),
            ):
                setattr(memory, name, counts[counter]["all"][when] / MIB)
            cuda.reset_peak_memory_stats()
            memory.source = f"torch+{memory.source}"
            if not self._unified:
                free, total = cuda.mem_get_info()
                memory.cuda_used_mib, memory.cuda_total_mib = (total - free) / MIB, total / MIB
        except RuntimeError as e:
            memory.source += f" (CUDA does not answer: {str(e).splitlines()[0]})"


def _peak_rss_mib() -> float | None:
    try:
        with open("/proc/self/status") as f:
            found = re.search(r"^VmHWM:\s+(\d+) kB", f.read(), re.M)
    except OSError:
        return None
    return int(found.group(1)) / 1024 if found else None


def _reset_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
        return True
    except OSError:
        return False
