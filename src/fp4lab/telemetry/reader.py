"""One look at the memory of some processes, from the best sources that answer. No torch."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fp4lab.events import Memory
from fp4lab.telemetry import cgroup, host
from fp4lab.telemetry.nvml import GpuProcess, Nvml, open_nvml


class MemoryReader:
    """`read(pids)` for the processes of one tree.

    `Memory.source` names what answered, best first:
      nvml         device memory of each process
      nvml-device  the devices' total alone: processes are not listed, or by pids of another namespace
      rss          resident sets of the processes
    A device without a framebuffer of its own (GB10, Jetson) shares the machine's memory: `unified` is true, the device's
    used and total are None, and MemAvailable and the resident sets tell instead.
    `on_change` hears when another source has to be used than before.
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
        self.on_change, self.why = on_change, ""
        if nvml is None and look_for_nvml:
            nvml, self.why = open_nvml()
        self._nvml, self._proc = nvml, proc
        self._cgroups = cgroup.levels() if cgroups is None else cgroups
        self._limited = cgroup.limited(self._cgroups)
        self._source: str | None = None

    def read(self, pids: Sequence[int], detailed: bool = False) -> Memory:
        """Resident sets and device memory of `pids` together, and what the machine has left.

        `detailed` adds the proportional set size, which takes milliseconds.
        """
        available, total = host.machine_mib(self._proc)
        memory = Memory(
            proc_rss_mib=host.resident_mib(pids, self._proc), mem_available_mib=available, mem_total_mib=total, source="rss"
        )
        if detailed:
            memory.proc_pss_mib = host.proportional_mib(pids, self._proc)
        if self._limited or detailed or memory.proc_rss_mib is None:
            memory.cgroup_mib, memory.cgroup_max_mib = cgroup.usage(self._limited or self._cgroups)
        if self._nvml is not None:
            self._read_devices(self._nvml, pids, memory)
        if self._source not in (None, memory.source) and self.on_change is not None:
            why = f" ({self._nvml.error})" if self._nvml is not None and self._nvml.error else ""
            self.on_change(f"memory was read from {self._source}, now from {memory.source}{why}")
        self._source = memory.source
        return memory

    def others(self, pids: Sequence[int]) -> list[GpuProcess]:
        """Processes on the GPUs that are not among `pids`."""
        return [] if self._nvml is None else self._nvml.others(pids)

    def _read_devices(self, nvml: Nvml, pids: Sequence[int], memory: Memory) -> None:
        devices, held = nvml.devices(), nvml.processes()
        memory.unified = devices.no_framebuffer
        memory.cuda_used_mib, memory.cuda_total_mib = devices.used_mib, devices.total_mib
        if held is not None:
            own = [held[p] for p in pids if p in held]
            memory.pid_mem_mib = _sum(own)
            memory.total_gpu_mem_mib = _sum(list(held.values()))
        if held is not None and None not in (held[p] for p in pids if p in held):
            memory.source = "nvml+rss"
        elif devices.used_mib is not None:
            memory.source = "nvml-device+rss"


def _sum(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None
