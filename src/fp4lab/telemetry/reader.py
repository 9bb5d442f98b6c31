"""One look at the memory of some processes, from the best sources that answer. No torch."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fp4lab.events import Memory
from fp4lab.telemetry import cgroup, host
from fp4lab.telemetry.nvml import UNDECIDED, GpuProcess, Nvml, open_nvml

_SETTLED = 3  # looks after which a change of source is one, not a driver's hiccup
_BEST = "nvml"


class MemoryReader:
    """`read(pids)` for the processes of one tree.

    `Memory.source` names what answered, and in brackets why nothing better did:
      nvml         device memory of each process
      nvml-device  the devices' total alone: processes are not listed, or by pids of another namespace
      meminfo      a device that shares the machine's memory and does not list processes: MemAvailable tells
      rss          resident sets of the processes
      cgroup       our cgroup, if it or one above it has a limit
    A device without memory of its own (GB10, Jetson) makes `unified` true; its used and total are None, since MemAvailable
    and MemTotal are what there is.
    `on_change` hears once when a GPU is there but its processes cannot be read, and when sources change for good.
    """

    def __init__(
        self,
        nvml: Nvml | None = None,
        *,
        look_for_nvml: bool = True,
        proc: str = host.PROC,
        cgroups: list[Path] | None = None,
        on_change: Callable[[str], None] | None = None,
    ):
        self.on_change, self._no_nvml = on_change, ""
        if nvml is None and look_for_nvml:
            nvml, why = open_nvml()
            self._no_nvml = f"no NVML: {why}" if nvml is None else ""
        self._nvml, self._proc = nvml, proc
        self._unified = True if host.is_tegra(proc) else None
        self._cgroups = cgroup.levels() if cgroups is None else cgroups
        self._limited = cgroup.limited(self._cgroups)
        self._told: tuple[str, str] | None = None  # the device's source, and all, that on_change knows of
        self._since = 0  # looks since another answers

    def read(self, pids: Sequence[int], detailed: bool = False) -> Memory:
        """Resident sets and device memory of `pids` together, and what the machine has left.

        `detailed` adds the proportional set size, which takes milliseconds, and the cgroup even if it has no limit.
        """
        available, total = host.machine_mib(self._proc)
        memory = Memory(proc_rss_mib=host.resident_mib(pids, self._proc), mem_available_mib=available, mem_total_mib=total)
        if detailed:
            memory.proc_pss_mib = host.proportional_mib(pids, self._proc)
        if self._limited or detailed or memory.proc_rss_mib is None:
            memory.cgroup_mib, memory.cgroup_max_mib = cgroup.usage(self._limited or self._cgroups)
        best, why = "", self._no_nvml
        if self._nvml is not None:
            best, why = self._read_devices(self._nvml, pids, memory)
        memory.unified = self._unified
        if self._unified and not best:
            best = "meminfo"
        sources = "+".join([*([best] if best else []), "rss", *(["cgroup"] if self._limited else [])])
        memory.source = f"{sources} ({why})" if why else sources
        if pids and why != UNDECIDED:
            self._tell(best, memory.source)
        return memory

    def devices(self) -> list[str] | None:
        """The GPUs that NVML shows; None without NVML."""
        return None if self._nvml is None else list(self._nvml.names.values())

    def others(self, pids: Sequence[int]) -> list[GpuProcess]:
        """Processes on the GPUs that are not among `pids`."""
        return [] if self._nvml is None else self._nvml.others(pids)

    def _read_devices(self, nvml: Nvml, pids: Sequence[int], memory: Memory) -> tuple[str, str]:
        """Puts what NVML knows into `memory`; returns the source's name and why it is not a better one."""
        devices, held = nvml.devices(), nvml.held(pids)
        if devices.unified is not None:
            self._unified = devices.unified  # and an error later does not unsay it
        memory.cuda_used_mib, memory.cuda_total_mib = devices.used_mib, devices.total_mib
        memory.total_gpu_mem_mib = held.all_mib
        if not held.why:
            memory.pid_mem_mib = held.own_mib if pids else None
            return _BEST, ""
        return "nvml-device" if devices.used_mib is not None else "", held.why

    def _tell(self, best: str, source: str) -> None:
        """Counts looks until a source has settled, then says so."""
        if self._told is None and best == _BEST:  # nothing to tell
            self._told = best, source
        if self._told is not None and best == self._told[0]:
            self._since = 0
            return
        self._since += 1
        if self.on_change is None or self._since < _SETTLED:
            return
        before, self._told, self._since = self._told, (best, source), 0
        if before is not None:
            self.on_change(f"memory was read from {before[1]}, now from {source}")
        elif best != _BEST and (self._nvml is not None or host.has_nvidia_driver(self._proc)):
            self.on_change(f"device memory of the processes cannot be read; memory is read from {source}")
