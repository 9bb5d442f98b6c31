"""Device memory as the driver tells it, through NVML. No torch.

What NVML does not know is None, never 0: GB10 and Jetson report no framebuffer ("Not Supported", or a total of 0), some
drivers list a process without its memory, one call may fail while others answer, and inside a container the pids listed may
be the host's.
"""

import functools
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
_NOT_AVAILABLE = 0xFFFFFFFFFFFFFFFF  # NVML_VALUE_NOT_AVAILABLE, where the binding does not turn it into None
_INTEGRATED = re.compile(r"\b(GB10|Orin|Xavier|Thor|Tegra|Jetson)\b|nvgpu", re.I)
_INITIAL_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of the kernel: the namespace that the driver counts in
_MPS_SERVER = "nvidia-cuda-mps"  # a process's name is cut off at 15 characters
_LISTS = (
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGraphicsRunningProcesses",
    "nvmlDeviceGetMPSComputeRunningProcesses",
)
UNDECIDED = "a container: until the driver lists a process of ours, its pids may be the host's"


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a device. mib None: the driver does not say how much."""

    pid: int
    name: str
    device: str
    mib: float | None


@dataclass(frozen=True)
class Devices:
    """All devices together, MiB. None where one of them does not tell."""

    used_mib: float | None
    total_mib: float | None
    unified: bool | None  # they have no memory of their own; None: cannot be told


@dataclass(frozen=True)
class Held:
    """Device memory of processes, over all devices, MiB. `why` says why `own_mib` is None."""

    own_mib: float | None
    all_mib: float | None
    why: str = ""


class Nvml:
    """`api` is the module pynvml, or something that answers like it. Raises api.NVMLError if no device can be opened.

    Devices are all that NVML shows, whatever CUDA_VISIBLE_DEVICES says. `error` is what the driver said the last time that
    it did not answer.
    """

    def __init__(self, api: Any, proc: Path = Path("/proc")):
        self._api, self._proc, self.error = api, proc, ""
        self._never: set[tuple[str, int]] = set()  # (function, device) that the driver does not have
        api.nvmlInit()
        self._handles: dict[int, Any] = {}
        for i in range(api.nvmlDeviceGetCount()):
            try:
                self._handles[i] = api.nvmlDeviceGetHandleByIndex(i)
            except api.NVMLError as e:  # it fell off the bus, or is another's: CUDA cannot use it either
                self.error = str(e)
        if not self._handles:
            raise api.NVMLError(api.NVML_ERROR_NOT_FOUND)
        self.names = {i: f"{self._device_name(i)} ({i})" for i in self._handles}
        self._namespace_known = _namespace(proc) == _INITIAL_NAMESPACE

    def devices(self) -> Devices:
        """Memory of the devices. One that shares the machine's memory is not asked."""
        used, total = 0, 0
        unified: list[bool | None] = []
        for i in self._handles:
            integrated = _INTEGRATED.search(self.names[i]) is not None
            info = None if integrated else self._ask("nvmlDeviceGetMemoryInfo", i)
            if info is not None and info.total:
                used, total = used + info.used, total + info.total
                unified.append(False)
            else:
                absent = integrated or info is not None or ("nvmlDeviceGetMemoryInfo", i) in self._never
                unified.append(True if absent else None)
        shared = False if False in unified else None if None in unified else True
        if any(one is not False for one in unified):
            return Devices(None, None, shared)
        return Devices(used / MIB, total / MIB, shared)

    def held(self, pids: Collection[int]) -> Held:
        """What `pids` hold together and what all processes hold.

        A pid that is not listed holds nothing, if the list is in our pids. It is where this process lives in the initial
        pid namespace. In another (a container) drivers differ: some translate, some list the host's pids, some list nothing.
        Then one of ours among pids that all exist here proves a translated list; before that, absence is unknown.
        """
        listed = self._listed()
        if listed is None:
            return Held(None, None, f"processes are not listed: {self.error}")
        own = [mib for (pid, _), mib in listed.items() if pid in pids]
        everybody = None if not listed and not self._namespace_known else _sum(listed.values())
        if not self._namespace_known:
            strange = self._strange(listed)
            # One that ended between the list and the look at /proc is no sign: it is not listed again.
            if strange and strange & self._strange(self._listed() or {}):
                return Held(None, everybody, "the driver lists pids of another namespace (a container)")
            if not own:
                return Held(None, everybody, UNDECIDED)
            self._namespace_known = True
        if None in own:
            return Held(None, everybody, "the driver lists our processes without their memory")
        if not own and any(self._name(pid) == _MPS_SERVER for pid, _ in listed):
            return Held(None, everybody, "an MPS server holds the memory of its clients")
        return Held(_sum(own), everybody)

    def others(self, own: Iterable[int]) -> list[GpuProcess]:
        """Processes on the devices that are not among `own`, by device."""
        mine = set(own)
        listed = self._listed() or {}
        return [GpuProcess(pid, self._name(pid), self.names[i], mib) for (pid, i), mib in listed.items() if pid not in mine]

    def _listed(self) -> dict[tuple[int, int], float | None] | None:
        """(pid, device) -> MiB; None if a device does not list its computing processes.

        A process that computes and draws is in two lists with the same figure; one on two slices of a MIG device is twice in
        the same list, with one figure for each.
        """
        found: dict[tuple[int, int], dict[Any, float | None]] = {}
        for i in self._handles:
            for question in _LISTS:
                answer = self._ask(question, i)
                if answer is None and question == _LISTS[0]:
                    return None
                for p in answer or []:
                    part = (getattr(p, "gpuInstanceId", None), getattr(p, "computeInstanceId", None))
                    parts, mib = found.setdefault((p.pid, i), {}), _mib(p.usedGpuMemory)
                    known = parts.get(part)
                    parts[part] = mib if known is None else max(known, mib or 0.0)
        return {key: _sum(parts.values()) for key, parts in found.items()}

    def _strange(self, listed: Iterable[tuple[int, int]]) -> set[int]:
        """Pids that do not exist here."""
        return {pid for pid, _ in listed if not (self._proc / str(pid)).exists()}

    def _name(self, pid: int) -> str:
        try:
            return (self._proc / str(pid) / "comm").read_text().strip()
        except OSError:
            return "not visible from here"

    def _device_name(self, i: int) -> str:
        name = self._ask("nvmlDeviceGetName", i) or "GPU"
        return name.decode() if isinstance(name, bytes) else name

    def _ask(self, question: str, i: int) -> Any:
        """The driver's answer for device `i`; None if it has none."""
        if (question, i) in self._never:
            return None
        try:
            return getattr(self._api, question)(self._handles[i])
        except self._api.NVMLError as e:
            self.error = str(e)
            if getattr(e, "value", None) in (self._api.NVML_ERROR_NOT_SUPPORTED, self._api.NVML_ERROR_FUNCTION_NOT_FOUND):
                self._never.add((question, i))
            return None


def _mib(value: Any) -> float | None:
    """A process's figure. One that is listed has a context, which is never 0 bytes."""
    return value / MIB if isinstance(value, int) and 0 < value < _NOT_AVAILABLE else None


def _sum(values: Iterable[float | None]) -> float | None:
    """None if one is unknown."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _namespace(proc: Path) -> str:
    try:
        return os.readlink(proc / "self" / "ns" / "pid")
    except OSError:
        return "unknown"


@functools.cache
def open_nvml() -> tuple[Nvml | None, str]:
    """NVML, or None and why there is none. Opened once a process."""
    import pynvml

    try:
        return Nvml(pynvml), ""
    except pynvml.NVMLError as e:
        return None, str(e)
