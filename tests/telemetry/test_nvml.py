"""Recorded answers of drivers, with their quirks, replayed to Nvml and MemoryReader."""

import os
from types import SimpleNamespace

import pytest

from fp4lab.supervise.guard import used
from fp4lab.telemetry.nvml import MIB, UNDECIDED, GpuProcess, Nvml
from fp4lab.telemetry.reader import MemoryReader

GIB = 1 << 30
ME, CHILD, STRANGER = 100, 101, 200


class NVMLError(Exception):
    def __init__(self, value):
        super().__init__({3: "Not Supported", 6: "Not Found", 15: "GPU is lost", 999: "Unknown Error"}[value])
        self.value = value


class Recording:
    """Answers like the module pynvml. A device is (name, memory, compute, graphics); an exception in it is raised.

    Processes are a dict pid -> bytes, or a list of (pid, bytes, slice of a MIG device).
    """

    NVMLError, NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NOT_FOUND, NVML_ERROR_FUNCTION_NOT_FOUND = NVMLError, 3, 6, 13

    def __init__(self, *devices):
        self.devices = [{**dict(zip(("name", "memory", "compute", "graphics"), d, strict=True)), "mps": {}} for d in devices]
        self.asked = []

    def nvmlInit(self): ...

    def nvmlDeviceGetCount(self):
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, i):
        return self._answer(self.devices[i].get("handle", self.devices[i]))

    def nvmlDeviceGetName(self, device):
        return self._answer(device["name"])

    def nvmlDeviceGetMemoryInfo(self, device):
        total, held = self._answer(device["memory"])
        return SimpleNamespace(total=total, used=held, free=total - held)

    def nvmlDeviceGetComputeRunningProcesses(self, device):
        return self._processes(device["compute"])

    def nvmlDeviceGetGraphicsRunningProcesses(self, device):
        return self._processes(device["graphics"])

    def nvmlDeviceGetMPSComputeRunningProcesses(self, device):
        return self._processes(device["mps"])

    def _processes(self, listed):
        self.asked.append(listed)
        listed = self._answer(listed)
        rows = [(pid, held, 0xFFFFFFFF) for pid, held in listed.items()] if isinstance(listed, dict) else listed
        return [SimpleNamespace(pid=pid, usedGpuMemory=held, gpuInstanceId=part) for pid, held, part in rows]

    def _answer(self, value):
        if isinstance(value, Exception):
            raise value
        return value


@pytest.fixture
def proc(tmp_path):
    """/proc of a machine with three processes of 10 MiB, 20 GiB of 100 free; not in a container."""
    pages = 10 * MIB // os.sysconf("SC_PAGE_SIZE")
    for pid, name in ((ME, "python"), (CHILD, "python"), (STRANGER, "vllm")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_text(f"{name}\n")
        (tmp_path / str(pid) / "statm").write_text(f"9 {pages} 1")
    (tmp_path / "meminfo").write_text(f"MemTotal: {100 * GIB // 1024} kB\nMemAvailable: {20 * GIB // 1024} kB\n")
    namespace(tmp_path, "pid:[4026531836]")
    return tmp_path


def namespace(proc, name):
    """Where the process that reads lives."""
    link = proc / "self" / "ns" / "pid"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(name)


@pytest.fixture
def container(proc):
    namespace(proc, "pid:[4026532300]")
    return proc


def reader(api, proc, **more):
    return MemoryReader(Nvml(api, proc), proc=str(proc), cgroups=[], **more)


def h200(compute=None, graphics=None, memory=(141 * GIB, 9 * GIB)):
    return Recording(("NVIDIA H200", memory, {ME: 2 * GIB, CHILD: GIB} if compute is None else compute, graphics or {}))


def test_h200_sums_over_the_tree(proc):
    memory = reader(h200(), proc).read([ME, CHILD])
    assert (memory.pid_mem_mib, memory.total_gpu_mem_mib) == (3 * 1024, 3 * 1024)
    assert (memory.cuda_used_mib, memory.cuda_total_mib) == (9 * 1024, 141 * 1024)
    assert memory.proc_rss_mib == pytest.approx(20, abs=0.1) and memory.mem_available_mib == 20 * 1024
    assert memory.unified is False and memory.source == "nvml+rss"


def test_leftovers_of_others_are_seen_and_named_and_never_ours(proc):
    look = reader(h200({ME: GIB, STRANGER: 5 * GIB}), proc)
    memory = look.read([ME])
    assert (memory.pid_mem_mib, memory.total_gpu_mem_mib) == (1024, 6 * 1024)
    assert look.others([ME]) == [GpuProcess(STRANGER, "vllm", "NVIDIA H200 (0)", 5 * 1024)]


def test_two_devices_and_a_process_on_both(proc):
    api = Recording(("A", (GIB, GIB // 2), {ME: 100 * MIB}, {}), ("B", (GIB, GIB // 2), {ME: 50 * MIB}, {}))
    memory = reader(api, proc).read([ME])
    assert memory.pid_mem_mib == 150 and (memory.cuda_used_mib, memory.cuda_total_mib) == (1024, 2048)


def test_a_process_that_computes_and_draws_counts_once(proc):
    assert reader(h200({ME: GIB}, {ME: GIB, STRANGER: MIB}), proc).read([ME]).pid_mem_mib == 1024


def test_no_process_on_the_device_is_none_held_and_not_unknown(proc):
    assert reader(h200({}), proc).read([ME]).pid_mem_mib == 0


@pytest.mark.parametrize("value", [None, 0xFFFFFFFFFFFFFFFF, "N/A", 0])
def test_a_process_without_a_figure_is_unknown(proc, value):
    memory = reader(h200({ME: value, CHILD: GIB}), proc).read([ME, CHILD])
    assert memory.pid_mem_mib is None
    assert memory.source == "nvml-device+rss (the driver lists our processes without their memory)"
    assert memory.cuda_used_mib == 9 * 1024  # the next source
    assert reader(h200({STRANGER: value, ME: GIB}), proc).read([ME]).pid_mem_mib == 1024  # another's gap is not ours


def test_one_process_on_two_slices_of_a_device_counts_twice_and_in_two_lists_once(proc):
    api = h200([(ME, GIB, 1), (ME, 2 * GIB, 2)], [(ME, 2 * GIB, 2)])
    assert reader(api, proc).read([ME]).pid_mem_mib == 3 * 1024


def test_pids_of_the_host_seen_from_a_container_are_unknown_and_not_zero(container):
    look = reader(h200({4242: 3 * GIB}), container)
    memory = look.read([ME])
    assert memory.pid_mem_mib is None and memory.total_gpu_mem_mib == 3 * 1024  # somebody holds it
    assert memory.source.startswith("nvml-device+rss (the driver lists pids of another namespace")
    assert look.others([ME])[0].name == "not visible from here"


def test_a_host_pid_that_equals_one_of_ours_is_not_ours(container):
    memory = reader(h200({4242: 3 * GIB, ME: GIB}), container).read([ME])
    assert memory.pid_mem_mib is None


def test_a_container_that_lists_nothing_is_unknown_until_it_lists_us(container):
    api = h200({})
    look = reader(api, container)
    memory = look.read([ME])
    assert memory.pid_mem_mib is memory.total_gpu_mem_mib is None and UNDECIDED in memory.source
    api.devices[0]["compute"] = {ME: GIB}  # a driver that translates pids
    assert look.read([ME]).pid_mem_mib == 1024
    api.devices[0]["compute"] = {}
    assert look.read([ME]).pid_mem_mib == 0  # now absence means something
    api.devices[0]["compute"] = {4242: GIB}
    assert look.read([ME]).pid_mem_mib == 0


def test_a_process_that_ended_after_it_was_listed_is_no_other_namespace(container):
    api = h200({ME: GIB, 4242: GIB})
    lists = iter([{ME: GIB, 4242: GIB}, {ME: GIB}])
    api.nvmlDeviceGetComputeRunningProcesses = lambda device: api._processes(next(lists))
    assert reader(api, container).read([ME]).pid_mem_mib == 1024


def test_on_the_host_pids_may_be_hidden(proc):
    """/proc mounted with hidepid: others' pids are not there, and ours count all the same."""
    memory = reader(h200({4242: 3 * GIB, ME: GIB}), proc).read([ME])
    assert memory.pid_mem_mib == 1024 and memory.source == "nvml+rss"


def test_memory_of_mps_clients(proc):
    api = h200({STRANGER: 3 * GIB})
    (proc / str(STRANGER) / "comm").write_text("nvidia-cuda-mps\n")
    look = reader(api, proc)
    memory = look.read([ME])
    assert memory.pid_mem_mib is None and "MPS server" in memory.source
    api.devices[0]["mps"] = {ME: GIB}  # a driver that lists clients
    assert look.read([ME]).pid_mem_mib == 1024


def test_a_device_that_cannot_be_opened_does_not_hide_the_others(proc):
    api = Recording(("A", (GIB, 0), {}, {}), ("B", (GIB, GIB // 2), {ME: 50 * MIB}, {}))
    api.devices[0]["handle"] = NVMLError(15)
    look = reader(api, proc)
    memory = look.read([ME])
    assert (memory.pid_mem_mib, memory.cuda_total_mib) == (50, 1024)
    assert look.others([])[0].device == "B (1)"


def test_what_a_driver_does_not_have_is_asked_once(proc):
    api = Recording(("NVIDIA GB10", NVMLError(3), {ME: GIB}, NVMLError(3)))
    look = reader(api, proc)
    for _ in range(5):
        look.read([ME])
    assert sum(isinstance(a, NVMLError) for a in api.asked) == 1
    assert look.read([ME]).pid_mem_mib == 1024


def test_gb10_has_no_framebuffer_but_lists_processes(proc):
    api = Recording(("NVIDIA GB10", NVMLError(3), {ME: 40 * GIB}, {}))
    memory = reader(api, proc).read([ME])
    assert memory.unified is True and memory.cuda_used_mib is memory.cuda_total_mib is None
    assert memory.pid_mem_mib == 40 * 1024 and memory.source == "nvml+rss"
    assert used(memory, memory, on_device=True).mib == pytest.approx(40 * 1024 + 10, abs=0.1)  # they share one memory


def test_jetson_lists_nothing_and_has_a_total_of_zero(proc):
    api = Recording(("Orin", (0, 0), NVMLError(3), NVMLError(3)))
    look = reader(api, proc)
    before = look.read([])
    (proc / "meminfo").write_text(f"MemTotal: {100 * GIB // 1024} kB\nMemAvailable: {12 * GIB // 1024} kB\n")
    memory = look.read([ME])
    assert memory.unified is True and memory.pid_mem_mib is memory.cuda_total_mib is None
    assert memory.source == "meminfo+rss (processes are not listed: Not Supported)"
    held = used(memory, before, on_device=True)
    assert held.mib == 8 * 1024 and "available" in held.source


def test_an_integrated_device_is_known_by_name_even_if_it_reports_a_framebuffer(proc):
    memory = reader(Recording(("NVIDIA GB10", (120 * GIB, 9 * GIB), {ME: GIB}, {})), proc).read([ME])
    assert memory.unified is True and memory.cuda_used_mib is None
    assert reader(Recording(("NVIDIA GB100", (9 * GIB, GIB), {}, {})), proc).read([ME]).unified is False


def test_a_jetson_without_nvml(proc):
    (proc / "device-tree").mkdir()
    (proc / "device-tree" / "compatible").write_bytes(b"nvidia,p3737-0000\0nvidia,tegra234\0")
    memory = MemoryReader(look_for_nvml=False, proc=str(proc), cgroups=[]).read([ME])
    assert memory.unified is True and memory.source == "meminfo+rss" and memory.mem_available_mib == 20 * 1024


def test_a_device_in_doubt_is_neither(proc):
    assert reader(h200(memory=NVMLError(999)), proc).read([ME]).unified is None


def test_a_driver_that_fails_mid_run_makes_values_unknown_and_is_told_once(proc):
    api, said = h200(), []
    look = reader(api, proc, on_change=said.append)
    assert look.read([ME]).pid_mem_mib == 2048
    api.devices[0]["compute"] = NVMLError(999)
    for _ in range(9):
        memory = look.read([ME])
    assert memory.pid_mem_mib is None and memory.cuda_used_mib == 9 * 1024
    now = "nvml-device+rss (processes are not listed: Unknown Error)"
    assert said == [f"memory was read from nvml+rss, now from {now}"]
    api.devices[0]["memory"] = NVMLError(999)
    for _ in range(9):
        memory = look.read([ME])
    assert memory.source == "rss (processes are not listed: Unknown Error)"
    assert memory.unified is False  # an error does not say that there is no framebuffer
    api.devices[0].update(compute={ME: GIB}, memory=(GIB, GIB))
    for _ in range(9):
        memory = look.read([ME])
    assert memory.pid_mem_mib == 1024 and len(said) == 3 and said[2].endswith("now from nvml+rss")


def test_a_hiccup_is_no_news(proc):
    api, said = h200(), []
    look = reader(api, proc, on_change=said.append)
    for i in range(12):
        api.devices[0]["compute"] = NVMLError(999) if i in (4, 5, 9) else {ME: GIB}
        assert look.read([ME]).pid_mem_mib == (None if i in (4, 5, 9) else 1024)
    assert said == []


def test_a_gpu_whose_processes_cannot_be_read_is_told_even_if_it_was_so_from_the_start(container):
    said = []
    look = reader(h200({4242: GIB}), container)
    look.read([])  # the supervisor looks before there is a worker, and before anybody listens
    look.on_change = said.append
    for _ in range(9):
        look.read([ME])
    assert len(said) == 1 and "cannot be read" in said[0] and "another namespace" in said[0]


def test_a_driver_without_its_library_is_told(proc):
    said = []
    for expected in (0, 1):
        look = MemoryReader(look_for_nvml=False, proc=str(proc), cgroups=[], on_change=said.append)
        for _ in range(5):
            look.read([ME])
        assert len(said) == expected  # no driver, nothing to tell
        (proc / "driver" / "nvidia").mkdir(parents=True, exist_ok=True)
        (proc / "driver" / "nvidia" / "version").write_text("NVRM version: 580.95.05")


def test_a_driver_without_devices_is_no_driver():
    with pytest.raises(NVMLError):
        Nvml(Recording())


def test_without_nvml_everything_of_the_device_is_unknown(proc):
    memory = MemoryReader(look_for_nvml=False, proc=str(proc), cgroups=[]).read([ME])
    assert memory.source == "rss" and memory.unified is memory.pid_mem_mib is memory.cuda_used_mib is None


def test_this_machine():
    memory = MemoryReader().read([os.getpid()])
    assert memory.proc_rss_mib > 1
    if memory.source.startswith("rss"):
        assert "no NVML: " in memory.source
        assert memory.pid_mem_mib is memory.total_gpu_mem_mib is memory.cuda_used_mib is None


def test_a_cgroup_with_a_limit_is_a_source(proc, tmp_path):
    (tmp_path / "memory.current").write_text(f"{30 * MIB}")
    (tmp_path / "memory.max").write_text(f"{40 * MIB}")
    memory = MemoryReader(look_for_nvml=False, proc=str(proc), cgroups=[tmp_path]).read([ME])
    assert (memory.cgroup_mib, memory.cgroup_max_mib, memory.source) == (30, 40, "rss+cgroup")


def test_detailed_adds_the_proportional_size_of_real_processes():
    memory = MemoryReader(look_for_nvml=False).read([os.getpid()], detailed=True)
    assert 1 < memory.proc_pss_mib <= memory.proc_rss_mib
