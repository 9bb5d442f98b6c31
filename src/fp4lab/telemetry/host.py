"""Processes and the machine's memory as /proc tells them. No torch.

`proc` is the folder to read, so that recorded trees can be read as well; where it does not exist, psutil is asked.
"""

import os
from collections.abc import Iterable

import psutil

MIB = 1 << 20
PROC = "/proc"
_PAGE = os.sysconf("SC_PAGE_SIZE")


def process_tree(root: int, proc: str = PROC) -> list[int]:
    """`root` and its descendants, those that exist; empty if `root` does not."""
    if not os.path.isdir(proc):
        return _psutil_tree(root)
    found: list[int] = []
    seen, waiting = {root}, [root]
    while waiting:
        pid = waiting.pop()
        children = _children(pid, proc)
        if children is None:
            continue
        found.append(pid)
        waiting += children - seen
        seen |= children
    return found


def _children(pid: int, proc: str) -> set[int] | None:
    """Children of every thread of `pid`; None if it does not exist.

    A thread that ends meanwhile gives its children to another, which may have been read already: read again then.
    """
    found: set[int] = set()
    for _ in range(3):
        try:
            threads = os.listdir(f"{proc}/{pid}/task")
        except OSError:
            return None
        complete = True
        for thread in threads:
            try:
                with open(f"{proc}/{pid}/task/{thread}/children", "rb") as f:
                    found.update(map(int, f.read().split()))
            except OSError:
                complete = False
        if complete:
            break
    return found


def resident_mib(pids: Iterable[int], proc: str = PROC) -> float | None:
    """Sum of resident sets; shared pages count once for each process. None if none of them exists."""
    known = [r for r in (_resident_bytes(p, proc) for p in pids) if r is not None]
    return sum(known) / MIB if known else None


def proportional_mib(pids: Iterable[int], proc: str = PROC) -> float | None:
    """Sum of proportional set sizes: a page shared by n processes counts 1/n for each. Dear: the kernel walks page tables.

    None if none of them can be read.
    """
    known = [p for p in (_pss_kib(pid, proc) for pid in pids) if p is not None]
    return sum(known) / 1024 if known else None


def machine_mib(proc: str = PROC) -> tuple[float | None, float | None]:
    """(MemAvailable, MemTotal)."""
    found: dict[bytes, float] = {}
    try:
        with open(f"{proc}/meminfo", "rb") as f:
            for line in f:
                key, _, value = line.partition(b":")
                if key in (b"MemAvailable", b"MemTotal"):
                    found[key] = int(value.split()[0]) / 1024
                    if len(found) == 2:
                        break
    except OSError:
        if proc == PROC:
            memory = psutil.virtual_memory()
            return memory.available / MIB, memory.total / MIB
    return found.get(b"MemAvailable"), found.get(b"MemTotal")


def _resident_bytes(pid: int, proc: str) -> int | None:
    try:
        with open(f"{proc}/{pid}/statm", "rb") as f:
            return int(f.read().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return None if os.path.isdir(proc) else _psutil_resident(pid)


def _pss_kib(pid: int, proc: str) -> int | None:
    try:
        with open(f"{proc}/{pid}/smaps_rollup", "rb") as f:
            return next((int(line.split()[1]) for line in f if line.startswith(b"Pss:")), None)
    except OSError:
        return None


def _psutil_tree(pid: int) -> list[int]:
    try:
        return [pid, *(c.pid for c in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return []


def _psutil_resident(pid: int) -> int | None:
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return None
