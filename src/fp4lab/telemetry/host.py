"""Processes and the machine's memory as /proc tells them. No torch.

`proc` is the folder to read, so that recorded trees can be read as well; where it does not exist, psutil is asked.
"""

import os
from collections.abc import Iterable

MIB = 1 << 20
PROC = "/proc"
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PASSES = 5  # over a tree that changes while it is read


def _read(path: str) -> bytes:
    """A whole file. A guard does this often, and Python's `open` takes two to three times as long."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, 1 << 16)
        while more := os.read(fd, 1 << 16):  # /proc gives long files in pieces
            data += more
        return data
    finally:
        os.close(fd)


class _NoChildrenFiles(Exception):
    """The kernel was built without CONFIG_PROC_CHILDREN."""


def process_tree(roots: int | Iterable[int], proc: str = PROC) -> list[int]:
    """The processes `roots` (or the one) and all their descendants, those that exist; empty if none of the roots does.

    /proc/PID/task/TID/children is no snapshot (proc(5)): a child that is reaped while its list is read can hide the next
    one, and who loses its parent, thread or process, moves to a list that may have been read already. Each of these leaves
    a process or thread that is gone or a zombie where the walk comes by, and then the tree is walked again.
    """
    start = [roots] if isinstance(roots, int) else list(roots)
    if not os.path.isdir(proc):
        return _psutil_tree(start)
    found: dict[int, None] = {}  # in the order of the walk
    ended: set[str] = set()
    try:
        for _ in range(_PASSES):
            known = len(ended)
            _walk(start, proc, found, ended)
            if len(ended) == known:
                break
    except _NoChildrenFiles:
        return _tree_by_parents(start, proc)
    return list(found)


def _walk(roots: list[int], proc: str, found: dict[int, None], ended: set[str]) -> None:
    """One pass: adds who exists to `found`, and folders of processes and threads that have ended to `ended`."""
    seen, waiting = set(roots), roots[::-1]
    while waiting:
        pid = waiting.pop()
        folder = f"{proc}/{pid}"
        try:
            threads = os.listdir(f"{folder}/task")
        except OSError:
            if pid not in roots:
                ended.add(folder)
            continue
        found[pid] = None
        children: set[int] = set()
        for thread in threads:
            try:
                children.update(map(int, _read(f"{folder}/task/{thread}/children").split()))
            except OSError as e:
                if isinstance(e, FileNotFoundError) and os.path.isdir(f"{folder}/task/{thread}"):
                    raise _NoChildrenFiles from e
                ended.add(f"{folder}/task/{thread}")
        if not children and _is_zombie(pid, proc):
            ended.add(folder)
        waiting += children - seen
        seen |= children


def _is_zombie(pid: int, proc: str) -> bool:
    stat = _stat(pid, proc)
    return stat is not None and stat[0] in (b"Z", b"X")


def _stat(pid: int, proc: str) -> list[bytes] | None:
    """/proc/PID/stat from its third field, the state, on."""
    try:
        return _read(f"{proc}/{pid}/stat").rpartition(b")")[2].split()  # the name before it may hold anything
    except OSError:
        return None


def _tree_by_parents(roots: list[int], proc: str) -> list[int]:
    """The same from every process's parent: milliseconds on a busy machine."""
    children: dict[int, list[int]] = {}
    alive = set()
    for name in filter(str.isdigit, os.listdir(proc)):
        stat = _stat(int(name), proc)
        if stat is not None:
            alive.add(int(name))
            children.setdefault(int(stat[1]), []).append(int(name))
    found = [pid for pid in dict.fromkeys(roots) if pid in alive]
    for pid in found:  # grows
        found += (child for child in children.get(pid, []) if child not in found)
    return found


def is_tegra(proc: str = PROC) -> bool:
    """A Jetson: one memory for CPU and GPU, and on older ones no NVML that could tell."""
    try:
        return b"nvidia,tegra" in _read(f"{proc}/device-tree/compatible")
    except OSError:
        return False


def has_nvidia_driver(proc: str = PROC) -> bool:
    """The kernel module is loaded and shown here, whether or not its libraries are."""
    return os.path.exists(f"{proc}/driver/nvidia/version")


def resident_mib(pids: Iterable[int], proc: str = PROC) -> float | None:
    """Sum of resident sets; shared pages count once for each process. None if none of them exists."""
    known = [r for r in (_resident_bytes(p, proc) for p in pids) if r is not None]
    return sum(known) / MIB if known else None


def proportional_mib(pids: Iterable[int], proc: str = PROC) -> float | None:
    """Sum of proportional set sizes: a page shared by n processes counts 1/n for each. Dear: the kernel walks page tables.

    None if none of them exists, or if one may not be read: a sum without it would be too small.
    """
    total: int | None = None
    for pid in pids:
        try:
            lines = _read(f"{proc}/{pid}/smaps_rollup").splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        except OSError:
            return None
        for line in lines:
            if line.startswith(b"Pss:"):
                total = (total or 0) + int(line.split()[1])
    return None if total is None else total / 1024


def machine_mib(proc: str = PROC) -> tuple[float | None, float | None]:
    """(MemAvailable, MemTotal)."""
    found: dict[bytes, float] = {}
    try:
        for line in _read(f"{proc}/meminfo").split(b"\n", 4)[:4]:  # MemAvailable is the third, where there is one
            key, _, value = line.partition(b":")
            if key in (b"MemAvailable", b"MemTotal"):
                found[key] = int(value.split()[0]) / 1024
    except OSError:
        if proc == PROC:
            import psutil

            memory = psutil.virtual_memory()
            return memory.available / MIB, memory.total / MIB
    return found.get(b"MemAvailable"), found.get(b"MemTotal")


def _resident_bytes(pid: int, proc: str) -> int | None:
    try:
        return int(_read(f"{proc}/{pid}/statm").split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return None if os.path.isdir(proc) else _psutil_resident(pid)


def _psutil_tree(roots: list[int]) -> list[int]:
    import psutil

    found: dict[int, None] = {}
    for pid in roots:
        try:
            found.update(dict.fromkeys([pid, *(c.pid for c in psutil.Process(pid).children(recursive=True))]))
        except psutil.Error:
            continue
    return list(found)


def _psutil_resident(pid: int) -> int | None:
    import psutil

    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return None
