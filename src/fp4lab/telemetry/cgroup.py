"""This process's cgroup (v2): what it holds, what it may hold, and how often the OOM killer came. No torch.

Without cgroup v2, or without its memory controller, everything is None.
"""

from pathlib import Path

MIB = 1 << 20
_MOUNT, _SELF = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def levels(mount: Path = _MOUNT, membership: Path = _SELF) -> list[Path]:
    """The folders of our cgroup and those above it that have a memory controller, innermost first."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    folder = mount / own.strip("/")
    chain = [folder, *(p for p in folder.parents if p == mount or mount in p.parents)]
    return [p for p in chain if (p / "memory.current").is_file()]


def limited(chain: list[Path]) -> list[Path]:
    """The levels that have a limit."""
    return [p for p in chain if _number(p / "memory.max") is not None]


def usage(chain: list[Path]) -> tuple[float | None, float | None]:
    """MiB held and MiB allowed at the level that is nearest to its limit; our own level and None if none has one."""
    found = []
    for folder in chain:
        held, most = _number(folder / "memory.current"), _number(folder / "memory.max")
        if held is not None and most is not None:
            found.append((most - held, held / MIB, most / MIB))
    if found:
        return min(found)[1:]
    held = _number(chain[0] / "memory.current") if chain else None
    return (None if held is None else held / MIB), None


def cgroup_oom_kills(chain: list[Path] | None = None) -> int | None:
    """Processes of our cgroup that the OOM killer has ended so far."""
    chain = levels() if chain is None else chain
    return _field(chain[0] / "memory.events", "oom_kill") if chain else None


def kernel_oom_kills(vmstat: Path = Path("/proc/vmstat")) -> int | None:
    """Processes of this machine that the OOM killer has ended since boot."""
    return _field(vmstat, "oom_kill")


def _field(path: Path, name: str) -> int | None:
    try:
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return None


def _number(path: Path) -> int | None:
    """None for "max" and for what cannot be read."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
