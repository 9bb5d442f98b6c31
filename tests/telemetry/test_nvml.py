"""Recorded answers of drivers, with their quirks, replayed to Nvml and MemoryReader."""

import os
from types import SimpleNamespace

import pytest

from fp4lab.supervise.guard import used
from fp4lab.telemetry.nvml import MIB, GpuProcess, Nvml
from fp4lab.telemetry.reader import MemoryReader

GIB = 1 << 30
ME, CHILD, STRANGER = 100, 101, 200


class NVMLError(Exception):
    def __init__(self, value):
        super().__init__({3: "Not Supported", 6: "Not Found", 999: "Unknown Error"}[value])
        self.value = value


class Recording:
    """Answers like the module pynvml. A device is (name, memory, compute, graphics); an exception in it is raised."""

    NVMLError, NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NOT_FOUND = NVMLError, 3, 6

    def __init__(self, *devices):
        self.devices = [dict(zip(("name", "memory", "compute", "graphics"), d, strict=True)) for d in devices]

    def nvmlInit(self): ...

    def nvmlDeviceGetCount(self):
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, i):
        return self.devices[i]

    def nvmlDeviceGetName(self, device):
        return self._answer(device["name"])

    def nvmlDeviceGetMemoryInfo(self, device):
        total, held = self._answer(device["memory"])
        return SimpleNamespace(total=total, used=held, free=total - held)

    def nvmlDeviceGetComputeRunningProcesses(self, device):
        return self._processes(device["compute"])

    def nvmlDeviceGetGraphicsRunningProcesses(self, device):
        return self._processes(device["graphics"])

    def _processes(self, listed):
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in self._answer(listed).items()]

    def _answer(self, value):
        if isinstance(value, Exception):
            raise value
        return value


@pytest.fixture
def proc(tmp_path):
    """/proc of a machine with three processes of 10 MiB, 20 GiB of 100 free."""
    pages = 10 * MIB // os.sysconf("SC_PAGE_SIZE")
    for pid, name in ((ME, "python"), (CHILD, "python"), (STRANGER, "vllm")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_text(f"{name}\n")
        (tmp_path / str(pid) / "statm").write_text(f"9 {pages} 1")
    (tmp_path / "meminfo").write_text(f"MemTotal: {100 * GIB // 1024} kB\nMemAvailable: {20 * GIB // 1024} kB\n")
    return tmp_path


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


@pytest.mark.parametrize("value", [None, 0xFFFFFFFFFFFFFFFF])
def test_a_process_without_a_figure_is_unknown(proc, value):
    memory = reader(h200({ME: value, CHILD: GIB}), proc).read([ME, CHILD])
    assert memory.pid_mem_mib is None and memory.source == "nvml-device+rss"
    assert memory.cuda_used_mib == 9 * 1024  # the next source
    assert reader(h200({STRANGER: value, ME: GIB}), proc).read([ME]).pid_mem_mib == 1024  # another's gap is not ours


def test_pids_of_another_namespace_are_unknown_and_not_zero(proc):
    look = reader(h200({4242: 3 * GIB}), proc)
    memory = look.read([ME])
    assert memory.pid_mem_mib is None and memory.total_gpu_mem_mib is None and memory.source == "nvml-device+rss"
    assert look.others([ME])[0].name == "not visible from here"


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
    assert memory.unified is True and memory.pid_mem_mib is memory.cuda_total_mib is None and memory.source == "rss"
    held = used(memory, before, on_device=True)
    assert held.mib == 8 * 1024 and "available" in held.source


def test_a_driver_that_fails_mid_run_makes_values_unknown_and_is_told_once(proc):
    api, said = h200(), []
    look = reader(api, proc, on_change=said.append)
    assert look.read([ME]).pid_mem_mib == 2048
    api.devices[0]["compute"] = NVMLError(999)
    for _ in range(3):
        memory = look.read([ME])
    assert memory.pid_mem_mib is None and memory.cuda_used_mib == 9 * 1024
    assert said == ["memory was read from nvml+rss, now from nvml-device+rss (Unknown Error)"]
    api.devices[0]["memory"] = NVMLError(999)
    memory = look.read([ME])
    assert memory.source == "rss" and memory.unified is False  # an error does not say that there is no framebuffer
    api.devices[0].update(compute={ME: GIB}, memory=(GIB, GIB))
    assert look.read([ME]).pid_mem_mib == 1024 and len(said) == 3


def test_a_driver_without_devices_is_no_driver():
    with pytest.raises(NVMLError):
        Nvml(Recording())


def test_without_nvml_everything_of_the_device_is_unknown(proc):
    memory = MemoryReader(look_for_nvml=False, proc=str(proc), cgroups=[]).read([ME])
    assert memory.source == "rss" and memory.unified is memory.pid_mem_mib is memory.cuda_used_mib is None


def test_detailed_adds_the_proportional_size_of_real_processes():
    memory = MemoryReader(look_for_nvml=False).read([os.getpid()], detailed=True)
    assert 1 < memory.proc_pss_mib <= memory.proc_rss_mib
