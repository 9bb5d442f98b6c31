"""The guard's first stage, inside the worker: refuse what cannot fit, and turn a breach into a Python error.

The second stage, which does not depend on the worker's good will, is `supervise.sentinel`.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fp4lab.errors import UserError
from fp4lab.events import Emit, File, MemoryEstimate, Note
from fp4lab.model.config import Qwen3Config
from fp4lab.telemetry.host import machine_mib, resident_mib
from fp4lab.train.estimate import cheaper, estimate

GB_MIB = 1024  # the guard's GB, see supervise.guard
_CONTEXT_MIB = 527.0  # CUDA context and torch's kernels, measured on an H200 with driver 580
SNAPSHOT = "memory_snapshot.pickle"


def preflight(shape: Qwen3Config, config: dict[str, Any], device: torch.device, dtype: torch.dtype, emit: Emit) -> None:
    """Reports what the run will need. Raises UserError, with the arithmetic, if that is more than there may be.

    Compared with guard.limit_gb, and with the device's memory (on the CPU and on unified memory: with what is available).
    `guard.force=true` turns the refusal into a note.
    """
    cuda = device.type == "cuda"
    unified = cuda and bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))
    name = str(dtype).removeprefix("torch.")
    resident = resident_mib([os.getpid()]) or 0.0
    found = estimate(shape, config, name, device.type, _CONTEXT_MIB if cuda else resident)
    place = None if unified or not cuda else False  # one memory, or the device's alone
    phase, need = found.peak(place)
    available = machine_mib()[0]
    room: float | None
    if cuda and not unified:
        room, of = torch.cuda.get_device_properties(device).total_memory / (1 << 20), "memory of the device"
    else:
        room, of = None if available is None else available + resident, "memory available here"
    limit = config["guard"]["limit_gb"]
    bounds = [(limit * GB_MIB, f"guard.limit_gb={limit:g}")] if limit is not None else []
    bounds += [(room, of)] if room is not None else []
    emit(
        MemoryEstimate(
            phase=phase,
            total_mib=need,
            limit_mib=min((b for b, _ in bounds), default=None),
            rows={r.what: r.mib for r in found.rows},
            formulas={r.what: r.formula for r in found.rows},
            phases={r.what: list(r.phases) for r in found.rows},
        )
    )
    for bound, text in bounds:
        if need <= bound:
            continue
        said = f"this run needs at least {need:.0f} MiB, more than the {bound:.0f} MiB of {text}"
        if config["guard"]["force"]:
            emit(Note(topic="estimate", text=f"{said}; started all the same (guard.force=true)"))
            return
        levers = cheaper(shape, config, name, device.type, place)
        advice = ", ".join(f"{option} saves {mib:.0f} MiB" for option, mib in levers[:4])
        raise UserError(
            f"{said}:\n{found.table(phase, place)}\n"
            + (f"  What would help: {advice}.\n" if advice else "")
            + "  guard.force=true starts it all the same."
        )


def fraction(limit_gb: float, total_bytes: int) -> float:
    """The share of the device that `limit_gb` is, at most 1."""
    return min(1.0, limit_gb * GB_MIB * (1 << 20) / total_bytes)


@contextlib.contextmanager
def soft_limit(config: dict[str, Any], emit: Emit) -> Iterator[None]:
    """Around a task: torch itself refuses to allocate beyond guard.limit_gb, and says where it stood (guard.snapshot).

    CUDA alone has such a limit in torch: elsewhere a note says that the guard from outside is the only one.
    """
    guard = config["guard"]
    wanted = [k for k in ("limit_gb", "snapshot") if guard[k]]
    if config["device"] == "cpu" or not torch.cuda.is_available():
        if guard["snapshot"]:
            emit(Note(topic="guard", text="guard.snapshot=true has no effect on the CPU: torch keeps no such history there"))
        yield
        return
    if wanted and guard["limit_gb"] is not None:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(fraction(guard["limit_gb"], total))
    if guard["snapshot"]:
        torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        yield
    except torch.OutOfMemoryError:
        if guard["snapshot"]:
            path = Path(config["out_dir"]) / SNAPSHOT
            torch.cuda.memory._dump_snapshot(str(path))
            emit(File(role="snapshot", path=str(path), format="pickle", bytes=path.stat().st_size))
        raise
