from fp4lab.telemetry import host
from fp4lab.telemetry.host import process_memory


class MemoryReader:
    def __init__(self, on_change=None):
        self.on_change = on_change

    def read(self, roots, detailed=False):
        from fp4lab.events import Memory

        ms = [process_memory(r) for r in roots] or [Memory(mem_available_mib=host._mem_available_mib())]
        m = ms[0]
        m.proc_rss_mib = sum(x.proc_rss_mib or 0 for x in ms) or None
        m.mem_total_mib = None
        m.cgroup_mib = None
        m.cgroup_max_mib = None
        m.unified = None
        m.proc_pss_mib = None
        if detailed:
            t = 0
            for r in roots:
                try:
                    t += sum(int(l.split()[1]) for l in open(f"/proc/{r}/smaps_rollup") if l.startswith("Pss:"))
                except OSError:
                    pass
            m.proc_pss_mib = t / 1024
        return m

    def others(self, roots):
        return []
