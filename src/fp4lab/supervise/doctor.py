"""Start-up checks: what would make a run fail, or be blamed on it. `fp4lab doctor` runs all, every run the quick ones."""

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fp4lab.supervise import registry
from fp4lab.supervise.guard import GB_MIB
from fp4lab.supervise.manifest import manifest
from fp4lab.telemetry.cuda import check_cuda
from fp4lab.telemetry.reader import MemoryReader

_DISK_WARN, _DISK_FAIL = 2 << 30, 64 << 20


@dataclass(frozen=True)
class Finding:
    """`level` is ok, warn (a run can go on) or fail (it cannot, or not as asked)."""

    level: str
    topic: str
    text: str


def quick(guard: dict[str, Any], out_dir: Path, reader: MemoryReader) -> Iterator[Finding]:
    """What may change from run to run; a few milliseconds."""
    memory = reader.read([])
    left, least = memory.mem_available_mib, guard["host_available_min_gb"]
    if left is None:
        yield Finding("warn", "memory", "the machine does not tell how much memory is available")
    elif least is not None and left < least * GB_MIB:
        text = f"{left:.0f} MiB available; guard.host_available_min_gb={least:g} would end the run at once"
        yield Finding("fail", "memory", text)
    else:
        total = memory.mem_total_mib
        of = "" if total is None else f" of {total:.0f} MiB"
        yield Finding("ok", "memory", f"{left:.0f}{of} available" + (", one memory for CPU and GPU" if memory.unified else ""))
        limit = guard["limit_gb"]
        if limit is not None and left < limit * GB_MIB:
            text = (
                f"{left:.0f} MiB available, less than guard.limit_gb={limit:g}: the machine may run out before the guard acts"
            )
            yield Finding("warn", "memory", text)
    if memory.cgroup_max_mib is not None:
        yield Finding("ok", "cgroup", f"{memory.cgroup_mib or 0:.0f} of {memory.cgroup_max_mib:.0f} MiB used")
    for p in reader.others([]):
        holds = "an unknown amount" if p.mib is None else f"{p.mib:.0f} MiB"
        yield Finding("warn", "gpu", f"process {p.pid} ({p.name}) holds {holds} of {p.device}; it was not started here")
    yield from _stale()
    yield _disk(out_dir)


def _stale() -> Iterator[Finding]:
    for entry in registry.entries():
        if not entry.abandoned:
            continue
        alive = entry.survivors()
        if not alive:
            entry.leave()
            continue
        pids = ", ".join(str(p.pid) for p in alive)
        text = f"left by a supervisor that is gone ({entry.out_dir}): pid {pids}; end them with fp4lab doctor --end-stale"
        yield Finding("warn", "stale", text)


def _disk(folder: Path) -> Finding:
    folder = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    text = f"{free / (1 << 30):.1f} GiB free at {folder}"
    return Finding("fail" if free < _DISK_FAIL else "warn" if free < _DISK_WARN else "ok", "disk", text)


def examine(guard: dict[str, Any], out_dir: Path) -> Iterator[Finding]:
    """Everything; the CUDA check starts a process of its own and takes seconds."""
    versions = manifest()["versions"]
    text = "  ".join(f"{k} {v}" for k, v in versions.items())
    missing = [name for name in ("torch", "hydra-core", "tokenizers", "safetensors") if name not in versions]
    yield (
        Finding("fail", "versions", f"missing: {', '.join(missing)}; install with make")
        if missing
        else Finding("ok", "versions", text)
    )
    yield _cuda()
    yield from quick(guard, out_dir, MemoryReader())
    yield _guard_means()
    yield _wandb()


def _cuda() -> Finding:
    found = check_cuda()
    return Finding(found.level, "cuda", found.text)


def _guard_means() -> Finding:
    missing = [text for have, text in _means() if not have]
    if missing:
        return Finding("warn", "guard", "; ".join(missing))
    return Finding("ok", "guard", "process trees, pidfd, parent-death signals and resident sets can be used")


def _means() -> list[tuple[bool, str]]:
    return [
        (os.path.exists("/proc/self/task"), "no /proc: a worker's children cannot be seen"),
        (hasattr(os, "pidfd_open"), "no pidfd: signals go by pid"),
        (hasattr(signal, "pidfd_send_signal"), "no pidfd_send_signal: signals go by pid"),
    ]


def _wandb() -> Finding:
    try:
        found = version("wandb")
    except PackageNotFoundError:
        return Finding("warn", "wandb", "not installed: runs need tracker=off")
    mode = os.environ.get("WANDB_MODE")
    key = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").exists()
    text = f"{found}, " + (f"WANDB_MODE={mode}" if mode else "runs are recorded offline unless tracker=online")
    return Finding("ok", "wandb", text + ("" if key else "; no API key here, which tracker=online would need"))


def end_stale() -> list[int]:
    """SIGKILL to every process of runs whose supervisor is gone; returns their pids."""
    ended = []
    for entry in registry.entries():
        if entry.abandoned:
            ended += [p.pid for p in entry.survivors() if p.send(signal.SIGKILL)]
            entry.leave()
    return ended
