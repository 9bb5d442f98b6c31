"""The worker's own readings: peaks that belong to a phase, and a recorded torch.cuda."""

import mmap
from types import SimpleNamespace

import pytest

from fp4lab.telemetry.device import PhaseMeter
from fp4lab.telemetry.host import MIB
from fp4lab.telemetry.reader import MemoryReader

GIB = 1 << 30


class Cuda:
    """Answers like torch.cuda with 3 GiB allocated, 5 at most, 6 reserved, 9 of 100 used on the device."""

    def __init__(self, **properties):
        self.properties, self.peak = SimpleNamespace(**properties), 5 * GIB

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def get_device_properties(self, device):
        return self.properties

    def memory_stats_as_nested_dict(self):
        allocated = {"all": {"current": 3 * GIB, "peak": self.peak}, "large_pool": {"current": 0, "peak": 0}}
        return {"allocated_bytes": allocated, "reserved_bytes": {"all": {"current": 6 * GIB, "peak": 6 * GIB}}}

    def reset_peak_memory_stats(self):
        self.peak = 3 * GIB

    def mem_get_info(self):
        return 91 * GIB, 100 * GIB


def meter(cuda, device="cuda"):
    return PhaseMeter(device, cuda, MemoryReader(look_for_nvml=False))


def test_the_allocator_and_its_peak_since_the_last_look():
    cuda = Cuda(is_integrated=0)
    look = meter(cuda)
    cuda.peak = 5 * GIB
    first, second = look.read(), look.read()
    assert (first.torch_allocated_mib, first.torch_reserved_mib) == (3 * 1024, 6 * 1024)
    assert (first.torch_peak_mib, second.torch_peak_mib) == (5 * 1024, 3 * 1024)
    assert (first.cuda_used_mib, first.cuda_total_mib, first.unified) == (9 * 1024, 100 * 1024, False)
    assert first.source.startswith("torch+rss")


def test_unified_memory_is_not_asked_how_much_is_free():
    memory = meter(Cuda(is_integrated=1)).read()
    assert memory.unified is True and memory.cuda_used_mib is memory.cuda_total_mib is None
    assert memory.torch_allocated_mib == 3 * 1024 and memory.mem_available_mib is not None


def test_a_torch_that_does_not_say_what_it_runs_on():
    assert meter(Cuda()).read().unified is False


def test_a_device_that_has_failed_is_unknown():
    cuda = Cuda()
    look = meter(cuda)

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    cuda.memory_stats_as_nested_dict = cuda.mem_get_info = fail
    memory = look.read()
    assert memory.torch_allocated_mib is memory.torch_peak_mib is memory.cuda_used_mib is None
    assert memory.proc_rss_mib > 1 and "illegal memory access" in memory.source and "more" not in memory.source


def test_the_cpu_has_no_device_values():
    memory = meter(Cuda(), "cpu").read()
    assert memory.torch_allocated_mib is memory.cuda_used_mib is memory.unified is None
    assert not memory.source.startswith("torch")


def test_phase_meter_sees_a_peak_that_is_over():
    meter = PhaseMeter("cpu")
    first = meter.read()
    if first.proc_peak_rss_mib is None:
        pytest.skip("/proc/self/clear_refs is not writable here")
    meter.read()
    held = mmap.mmap(-1, 80 * MIB)  # a mapping of its own: no allocator keeps it, or had it before
    for _ in range(80):
        held.write(b"1" * MIB)
    held.close()
    second, third = meter.read(), meter.read()
    assert third.proc_peak_rss_mib < second.proc_peak_rss_mib - 60  # the peak belongs to its phase
