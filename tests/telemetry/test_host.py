"""Memory readings of real processes."""

import mmap
import os
import subprocess
import sys

import pytest

from fp4lab.telemetry.device import PhaseMeter
from fp4lab.telemetry.host import MIB, process_memory, process_tree

CHILD = """
import subprocess, sys
print("up", flush=True)
sys.stdin.readline()
held = b"1" * (60 << 20)
print("holding", flush=True)
sys.stdin.readline()
code = "import time; x = b'1' * (30 << 20); print('up', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.readline()
child.kill()
child.wait()
"""


@pytest.fixture
def child():
    """A process that goes on to its next step with every `step()`, which returns what it says."""
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def step() -> str:
            process.stdin.write("\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        assert process.stdout.readline() == "up\n"
        yield process.pid, step
        process.stdin.close()


def rss(pid: int) -> float:
    value = process_memory(pid).proc_rss_mib
    assert value is not None
    return value


def test_resident_set_follows_allocation_and_counts_grandchildren(child):
    pid, step = child
    before = rss(pid)
    assert process_tree(pid) == [pid]
    assert step() == "holding"
    held = rss(pid)
    assert 58 < held - before < 70
    grandchild = int(step())
    assert sorted(process_tree(pid)) == sorted([pid, grandchild])
    own = rss(grandchild)
    assert own > 30
    assert rss(pid) == pytest.approx(held + own, abs=5)
    assert grandchild in process_tree(os.getpid())  # two levels down from here


def test_a_dead_process_has_no_memory():
    process = subprocess.Popen(["true"])
    process.wait()
    memory = process_memory(process.pid)
    assert memory.proc_rss_mib is None


def test_what_every_reading_has():
    memory = process_memory(os.getpid())
    assert memory.source in ("rss", "nvml+rss")
    assert memory.mem_available_mib is None or 1 < memory.mem_available_mib < os.sysconf("SC_PHYS_PAGES") * 4096 / MIB
    assert memory.torch_allocated_mib is None  # no torch here
    if memory.source == "rss":
        assert memory.pid_mem_mib is None and memory.cuda_used_mib is None  # unknown is not 0


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
    assert second.proc_peak_rss_mib > second.proc_rss_mib + 60
    assert third.proc_peak_rss_mib < second.proc_peak_rss_mib - 60  # the peak belongs to its phase
