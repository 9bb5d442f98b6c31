"""Memory as the worker sees its own: torch's allocator, cudaMemGetInfo, resident set with its peak since the last look."""

import os
import re

from fp4lab.events import Memory
from fp4lab.telemetry.host import MIB, process_tree
from fp4lab.telemetry.reader import MemoryReader


class PhaseMeter:
    """`read()` gives memory now and the peaks since the previous `read()`.

    `device` is "cpu", "cuda" or "auto". The resident peak is VmHWM, reset through /proc/self/clear_refs where the
    kernel permits; where it does not, the peak is None rather than that of the whole process. On a device that shares the
    machine's memory cudaMemGetInfo is not asked: what it calls free leaves out pages that the system would give back.
    """

    def __init__(self, device: str):
        import torch

        self._cuda = torch.cuda if device != "cpu" and torch.cuda.is_available() else None
        self._can_reset = _reset_peak()
        self._reader = MemoryReader()
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
            memory.torch_allocated_mib = self._cuda.memory_allocated() / MIB
            memory.torch_reserved_mib = self._cuda.memory_reserved() / MIB
            memory.torch_peak_mib = self._cuda.max_memory_allocated() / MIB
            self._cuda.reset_peak_memory_stats()
            memory.unified = self._unified
            if self._unified:
                memory.cuda_used_mib = memory.cuda_total_mib = None
            else:
                free, total = self._cuda.mem_get_info()
                memory.cuda_used_mib, memory.cuda_total_mib = (total - free) / MIB, total / MIB
            memory.source = "torch+" + memory.source
        return memory


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
