"""Memory readings of real processes."""

import os
import subprocess
import sys
import time

import pytest

from fp4lab.telemetry.host import MIB, _tree_by_parents, machine_mib, process_tree, proportional_mib, resident_mib

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
    value = resident_mib(process_tree(pid))
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


def test_a_dead_process_has_no_memory_and_no_tree():
    process = subprocess.Popen(["true"])
    process.wait()
    assert process_tree(process.pid) == []
    assert resident_mib([process.pid]) is None and proportional_mib([process.pid]) is None


def test_children_of_every_thread_are_found():
    code = """
import subprocess, threading, time
def child():
    p = subprocess.Popen(["sleep", "60"])
    print(p.pid, flush=True)
    time.sleep(60)
threading.Thread(target=child, daemon=True).start()
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        grandchild = int(process.stdout.readline())
        assert process_tree(process.pid) == [process.pid, grandchild]
        os.kill(grandchild, 9)
        process.kill()


def recorded(proc, pid: int, threads: dict[int, str], statm: str = "100 10 5"):
    for thread, children in threads.items():
        folder = proc / str(pid) / "task" / str(thread)
        folder.mkdir(parents=True)
        (folder / "children").write_text(children)
    (proc / str(pid) / "statm").write_text(statm)


def test_a_recorded_tree_with_a_child_that_died_meanwhile(tmp_path):
    recorded(tmp_path, 1, {1: "2 ", 7: "3 4 "})
    recorded(tmp_path, 2, {2: ""})
    recorded(tmp_path, 4, {4: "2 "})  # listed twice: counted once
    assert sorted(process_tree(1, str(tmp_path))) == [1, 2, 4]
    assert process_tree(9, str(tmp_path)) == []
    assert sorted(process_tree([4, 9, 1], str(tmp_path))) == [1, 2, 4]
    page = os.sysconf("SC_PAGE_SIZE")
    assert resident_mib([1, 2, 3, 4], str(tmp_path)) == 3 * 10 * page / MIB
    assert resident_mib([3], str(tmp_path)) is None


def test_a_child_that_a_reaped_sibling_hid_is_found(tmp_path, monkeypatch):
    """While the list of 1 is read, 2 is reaped and 3 takes its place in the list, unseen."""
    recorded(tmp_path, 1, {1: "2 "})
    recorded(tmp_path, 3, {3: ""})
    listdir = os.listdir

    def reap(folder):
        if folder == f"{tmp_path}/2/task":
            (tmp_path / "1" / "task" / "1" / "children").write_text("3 ")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", reap)
    assert process_tree(1, str(tmp_path)) == [1, 3]


def test_children_of_a_thread_that_ends_meanwhile_are_found(tmp_path, monkeypatch):
    """8 ends after the threads of 1 were listed, and its child goes to thread 1, whose list has been read."""
    recorded(tmp_path, 1, {1: "", 8: "3 "})
    recorded(tmp_path, 3, {3: ""})
    listdir = os.listdir

    def end(folder):
        names = listdir(folder)
        if folder == f"{tmp_path}/1/task" and "8" in names:
            (tmp_path / "1" / "task" / "8" / "children").unlink()
            (tmp_path / "1" / "task" / "8").rmdir()
            (tmp_path / "1" / "task" / "1" / "children").write_text("3 ")
            return ["8"]  # as if 1 had been read before
        return names

    monkeypatch.setattr(os, "listdir", end)
    assert process_tree(1, str(tmp_path)) == [1, 3]


def test_children_of_a_process_that_dies_meanwhile_are_found(tmp_path, monkeypatch):
    """2 becomes a zombie after the list of 1 was read, and its child goes to 1, a subreaper."""
    recorded(tmp_path, 1, {1: "2 "})
    recorded(tmp_path, 2, {2: ""})
    recorded(tmp_path, 3, {3: ""})
    (tmp_path / "2" / "stat").write_text("2 (a) b) Z 1 2")
    listdir = os.listdir

    def die(folder):
        if folder == f"{tmp_path}/2/task":
            (tmp_path / "1" / "task" / "1" / "children").write_text("2 3 ")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", die)
    assert sorted(process_tree(1, str(tmp_path))) == [1, 2, 3]


def test_a_kernel_without_children_files(tmp_path):
    for pid, parent in ((1, 0), (2, 1), (3, 2), (4, 1), (5, 9)):
        (tmp_path / str(pid) / "task" / str(pid)).mkdir(parents=True)
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a) b) S {parent} 2")
    assert sorted(process_tree(1, str(tmp_path))) == [1, 2, 3, 4]
    assert sorted(process_tree([2, 5, 7], str(tmp_path))) == [2, 3, 5]


def test_both_ways_to_the_tree_agree():
    with subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60 & wait"], start_new_session=True) as process:
        while len(tree := process_tree(process.pid)) < 3:
            time.sleep(0.01)
        assert sorted(_tree_by_parents([process.pid], "/proc")) == sorted(tree)
        assert _tree_by_parents([1 << 30], "/proc") == []
        os.killpg(process.pid, 9)


def test_a_process_that_may_not_be_read_makes_the_sum_unknown(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "smaps_rollup").write_text("0-1 ---p\nRss: 9 kB\nPss: 2048 kB\nPss_Dirty: 1 kB\n")
    assert proportional_mib([1, 2], str(tmp_path)) == 2  # 2 is gone
    (tmp_path / "2" / "smaps_rollup").mkdir(parents=True)  # cannot be opened
    assert proportional_mib([1, 2], str(tmp_path)) is None


def test_shared_pages_count_once_in_the_proportional_size():
    code = """
import os, time
x = b"1" * (64 << 20)
for _ in range(3):
    if os.fork() == 0:
        time.sleep(60)
print("up", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as process:
        process.stdout.readline()
        tree = process_tree(process.pid)
        assert len(tree) == 4
        assert resident_mib(tree) > 4 * 64 and 64 < proportional_mib(tree) < 2 * 64
        os.killpg(process.pid, 9)


def test_the_machine(tmp_path):
    available, total = machine_mib()
    assert 1 < available < total < 1.01 * os.sysconf("SC_PHYS_PAGES") * 4096 / MIB
    assert machine_mib(str(tmp_path)) == (None, None)  # not this machine's: unknown, and not ours instead
    (tmp_path / "meminfo").write_text("MemTotal: 2048 kB\nMemFree: 9 kB\nMemAvailable: 1024 kB\n")
    assert machine_mib(str(tmp_path)) == (1, 2)
