"""Whether the kernel's OOM killer was at work: its own counters, before and after."""

from dataclasses import dataclass

from fp4lab.events import Memory
from fp4lab.telemetry.cgroup import cgroup_oom_kills, kernel_oom_kills


@dataclass(frozen=True)
class OomCounts:
    """Processes killed so far, in our cgroup and on the machine. None: the kernel does not tell."""

    cgroup: int | None
    machine: int | None

    @classmethod
    def now(cls) -> "OomCounts":
        return cls(cgroup_oom_kills(), kernel_oom_kills())

    def since(self, last: Memory | None, signal: str) -> list[str]:
        """Sentences for a run that a signal ended: OOM kills since this count, and the last readings of memory."""
        said = []
        if signal == "SIGKILL":
            now = self.now()
            for where, before, after in (("cgroup", self.cgroup, now.cgroup), ("machine", self.machine, now.machine)):
                if before is None or after is None:
                    continue
                if after > before:
                    said.append(f"the kernel's OOM killer ended {after - before} process(es) of this {where} meanwhile")
                    break
            else:
                known = self.machine is not None or self.cgroup is not None
                said.append("no OOM kill was counted" if known else "the kernel's OOM counters cannot be read")
        if last is not None and (last.proc_rss_mib is not None or last.mem_available_mib is not None):
            held = "unknown" if last.proc_rss_mib is None else f"{last.proc_rss_mib:.0f} MiB"
            left = "unknown" if last.mem_available_mib is None else f"{last.mem_available_mib:.0f} MiB"
            said.append(f"last reading: {held} resident, {left} available")
        return said
