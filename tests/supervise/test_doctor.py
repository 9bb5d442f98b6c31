"""Start-up checks and the registry of runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toys import GUARD, gone_within, running

from fp4lab.supervise import doctor, registry
from fp4lab.supervise.tree import Process, descendants, session, signal_below
from fp4lab.telemetry.nvml import GpuProcess
from fp4lab.telemetry.reader import MemoryReader


@pytest.fixture
def own_registry(tmp_path, monkeypatch):
    monkeypatch.setattr(registry.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def found(guard=None, reader=None) -> dict[str, list[doctor.Finding]]:
    out: dict[str, list[doctor.Finding]] = {}
    for f in doctor.quick({**GUARD, **(guard or {})}, Path("outputs"), reader or MemoryReader()):
        out.setdefault(f.topic, []).append(f)
    return out


def test_a_machine_with_too_little_memory_is_refused(own_registry):
    assert found()["memory"][0].level == "ok"
    (finding,) = found({"host_available_min_gb": 1e5})["memory"]
    assert finding.level == "fail" and "host_available_min_gb=100000" in finding.text
    assert [f.level for f in found({"limit_gb": 1e5})["memory"]] == ["ok", "warn"]


def test_processes_on_the_gpu_are_named(own_registry):
    reader = MemoryReader()
    reader.others = lambda own: [GpuProcess(7, "vllm", "NVIDIA H200 (0)", 5120.0), GpuProcess(8, "x", "Orin (0)", None)]
    texts = [f.text for f in found(reader=reader)["gpu"]]
    assert texts[0] == "process 7 (vllm) holds 5120 MiB of NVIDIA H200 (0); it was not started here"
    assert "an unknown amount" in texts[1]


def test_what_a_dead_supervisor_left_is_found_and_ended(own_registry):
    left = subprocess.Popen(["sleep", "60"], start_new_session=True)
    supervisor = subprocess.Popen(["sleep", "60"])
    entry = registry.Entry(Process.of(supervisor.pid), None, Process.of(left.pid), "/runs/7", registry.folder() / "7.json")
    entry.path.write_text(json.dumps({k: registry._plain(v) for k, v in vars(entry).items() if k != "path"}))
    assert "stale" not in found()  # its supervisor lives
    assert doctor.end_stale() == [] and running(left.pid)
    supervisor.kill()
    supervisor.wait()
    (finding,) = found()["stale"]
    assert finding.level == "warn" and str(left.pid) in finding.text and "/runs/7" in finding.text
    assert doctor.end_stale() == [left.pid]
    left.wait()
    assert "stale" not in found() and registry.entries() == []


def test_a_pid_given_to_somebody_else_is_not_ours(own_registry):
    """The worker's pid is now another process: same number, another start time."""
    me = Process.of(os.getpid())
    dead, stranger = Process(me.pid, me.started - 5), Process(me.pid, me.started - 5)
    path = registry.folder() / "7.json"
    path.write_text(json.dumps({"supervisor": [dead.pid, dead.started], "server": None,
                                "worker": [stranger.pid, stranger.started], "out_dir": "/runs/7"}))  # fmt: skip
    assert "stale" not in found() and not path.exists()
    assert not stranger.send(signal.SIGKILL)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"supervisor": 3}', "\x00"])
def test_files_that_are_no_entries_are_left_alone(own_registry, text):
    (registry.folder() / "1.json").write_text(text)
    assert registry.entries() == [] and (registry.folder() / "1.json").exists()


def test_the_whole_examination(own_registry):
    findings = list(doctor.examine(dict(GUARD), Path("outputs")))
    assert {"versions", "cuda", "memory", "disk", "guard", "wandb"} <= {f.topic for f in findings}
    assert all(f.level in ("ok", "warn", "fail") and f.text for f in findings)


def test_signals_reach_a_whole_tree_and_nothing_else():
    code = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print('up', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"]
    root = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    other = subprocess.Popen(["sleep", "60"])
    root.stdout.readline()
    below = descendants(root.pid)
    assert len(below) == 2 and {p.pid for p in session(Process.of(root.pid))} == {root.pid, *(p.pid for p in below)}
    assert signal_below(root.pid, signal.SIGKILL) >= set(below)
    assert gone_within(2, *(p.pid for p in below)) and running(other.pid)
    other.kill()
    other.wait()
    root.wait()
