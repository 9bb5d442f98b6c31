"""Memory of a process tree as another process sees it: /proc and, where there is a driver, NVML. No torch."""

import functools
import os
from collections.abc import Iterable

import psutil

from fp4lab.events import Memory

MIB = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")


def process_memory(pid: int) -> Memory:
    """One reading for `pid` and all its descendants. A process that is gone counts nothing; if all are, values are None."""
    tree = process_tree(pid)
    rss = [r for r in map(_rss_bytes, tree) if r is not None]
    memory = Memory(
        proc_rss_mib=sum(rss) / MIB if rss else None,
        mem_available_mib=_mem_available_mib(),
        source="rss",
    )
    device = gpu_processes()
    if device is not None:
        known = [b for b in device.values() if b is not None]
        own = [device[p] for p in tree if p in device]
        memory.source = "nvml+rss"
        if len(known) == len(device):
            memory.total_gpu_mem_mib = sum(known) / MIB
        if all(b is not None for b in own):
            memory.pid_mem_mib = sum(b for b in own if b is not None) / MIB
        memory.cuda_used_mib, memory.cuda_total_mib = _gpu_used_total_mib()
    return memory


def process_tree(pid: int) -> list[int]:
    """The pid and its descendants, those that exist."""
    out, waiting = [], [pid]
    while waiting:
        p = waiting.pop()
        out.append(p)
        try:
            for task in os.listdir(f"/proc/{p}/task"):
                with open(f"/proc/{p}/task/{task}/children") as f:
                    waiting += map(int, f.read().split())
        except FileNotFoundError:
            if p == pid and not os.path.isdir("/proc/self"):  # no procfs: ask the library
                return _psutil_tree(pid)
        except OSError:
            pass
    return out


def _psutil_tree(pid: int) -> list[int]:
    try:
        return [pid, *(c.pid for c in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return []


def _rss_bytes(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/statm") as f:
            return int(f.read().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return None


def _mem_available_mib() -> float | None:
    try:
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


@functools.cache
def _nvml():
    """pynvml with its handles, or None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml, [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return None


def gpu_processes() -> dict[int, int | None] | None:
    """pid -> bytes on all devices (None where the driver will not say); None without NVML."""
    found = _nvml()
    if found is None:
        return None
    pynvml, handles = found
    used: dict[int, int | None] = {}
    try:
        for handle in handles:
            for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                before = used.get(p.pid, 0)
                unknown = p.usedGpuMemory is None or before is None
                used[p.pid] = None if unknown else before + p.usedGpuMemory
    except pynvml.NVMLError:
        return None
    return used


def _gpu_used_total_mib() -> tuple[float | None, float | None]:
    found = _nvml()
    if found is None:
        return None, None
    pynvml, handles = found
    try:
        infos: Iterable = [pynvml.nvmlDeviceGetMemoryInfo(h) for h in handles]
    except pynvml.NVMLError:
        return None, None
    total = sum(i.total for i in infos)
    if not total:  # unified memory on some drivers
        return None, None
    return sum(i.used for i in infos) / MIB, total / MIB
