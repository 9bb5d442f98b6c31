"""Device memory as the driver tells it, through NVML. No torch.

What NVML does not know is None, never 0: GB10 and Jetson report no framebuffer ("Not Supported", or a total of 0), some
drivers list a process without its memory, and inside a container the listed pids may be the host's.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

MIB = 1 << 20
_NOT_AVAILABLE = 0xFFFFFFFFFFFFFFFF  # NVML_VALUE_NOT_AVAILABLE, where the binding does not turn it into None
T = TypeVar("T")


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a device. mib None: the driver does not say how much."""

    pid: int
    name: str
    device: str
    mib: float | None


@dataclass(frozen=True)
class Devices:
    """All devices together, MiB."""

    used_mib: float | None
    total_mib: float | None
    no_framebuffer: bool  # every device says that it has no memory of its own


class Nvml:
    """`api` is the module pynvml, or something that answers like it. Raises api.NVMLError if there is no driver.

    `error` is what the driver said the last time it did not answer.
    """

    def __init__(self, api: Any, proc: Path = Path("/proc")):
        self._api, self._proc, self.error = api, proc, ""
        api.nvmlInit()
        self._handles = [api.nvmlDeviceGetHandleByIndex(i) for i in range(api.nvmlDeviceGetCount())]
        names = [self._ask(functools.partial(api.nvmlDeviceGetName, h)) or "GPU" for h in self._handles]
        self.names = [f"{n.decode() if isinstance(n, bytes) else n} ({i})" for i, n in enumerate(names)]
        if not self._handles:
            raise api.NVMLError(api.NVML_ERROR_NOT_FOUND)

    def devices(self) -> Devices:
        """Used and total of all devices; None where one of them does not tell."""
        used, total, without = 0, 0, 0
        for handle in self._handles:
            try:
                info = self._api.nvmlDeviceGetMemoryInfo(handle)
            except self._api.NVMLError as e:
                self.error = str(e)
                without += getattr(e, "value", None) == self._api.NVML_ERROR_NOT_SUPPORTED
                continue
            if not info.total:
                without += 1
                continue
            used, total = used + info.used, total + info.total
        everywhere = without == len(self._handles)
        if without or not total:
            return Devices(None, None, everywhere)
        return Devices(used / MIB, total / MIB, False)

    def processes(self) -> dict[int, float | None] | None:
        """pid -> MiB on all devices together. None: the driver does not list processes, or by foreign pids."""
        listed = self._listed()
        if listed is None:
            return None
        if not self._of_our_namespace(pid for pid, _ in listed):
            again = self._listed()  # a process that ended between the list and the look at /proc is no sign
            if again is None or not self._of_our_namespace(pid for pid, _ in again):
                self.error = "the driver lists pids of another namespace (a container?)"
                return None
            listed = again
        held: dict[int, float | None] = {}
        for (pid, _), mib in listed.items():
            before = held.get(pid, 0.0)
            held[pid] = None if mib is None or before is None else before + mib
        return held

    def others(self, own: Iterable[int]) -> list[GpuProcess]:
        """Processes on the devices that are not among `own`, by device."""
        mine = set(own)
        listed = self._listed() or {}
        return [GpuProcess(pid, self._name(pid), self.names[i], mib) for (pid, i), mib in listed.items() if pid not in mine]

    def _listed(self) -> dict[tuple[int, int], float | None] | None:
        """(pid, device) -> MiB. One that computes and draws is in both lists, with the same figure."""
        found: dict[tuple[int, int], float | None] = {}
        for i, handle in enumerate(self._handles):
            computing = self._ask(functools.partial(self._api.nvmlDeviceGetComputeRunningProcesses, handle))
            if computing is None:
                return None
            drawing = self._ask(functools.partial(self._api.nvmlDeviceGetGraphicsRunningProcesses, handle))
            for p in [*computing, *(drawing or [])]:
                mib = None if p.usedGpuMemory in (None, _NOT_AVAILABLE) else p.usedGpuMemory / MIB
                known = found.get((p.pid, i))
                found[p.pid, i] = mib if known is None else max(known, mib or 0.0)
        return found

    def _of_our_namespace(self, pids: Iterable[int]) -> bool:
        return all((self._proc / str(pid)).exists() for pid in pids)

    def _name(self, pid: int) -> str:
        try:
            return (self._proc / str(pid) / "comm").read_text().strip()
        except OSError:
            return "not visible from here"

    def _ask(self, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except self._api.NVMLError as e:
            self.error = str(e)
            return None


@functools.cache
def open_nvml() -> tuple[Nvml | None, str]:
    """NVML, or None and why there is none. Opened once a process."""
    import pynvml

    try:
        return Nvml(pynvml), ""
    except pynvml.NVMLError as e:
        return None, str(e)
