"""run.py as a user runs it: real processes, real sweep, real kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fp4lab.supervise import registry

ROOT = Path(__file__).parent.parent

QUIET = ["tracker=off", "threads=1"]


def hears_ctrl_c() -> None:
    """A background job of a shell starts with SIGINT ignored, and what it starts too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*args: str, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "run.py", *args, *QUIET]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=hears_ctrl_c, **pipes, **kwargs)


def run(*args: str) -> tuple[int, str]:
    process = start(*args)
    out, _ = process.communicate(timeout=120)
    return process.returncode, out


def result(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_sweep_goes_on_past_a_bad_run_and_ends_with_a_table(tmp_path):
    """One run is refused, one killed by the guard, one completes; the exit code is the first failure's; resume skips."""
    grid = [
        "-m",
        "seq_len=8,0",
        "guard.limit_gb=0.01,8",
        f"hydra.sweep.dir={tmp_path}",
        "sweep.resume=true",
        "guard.poll_s=0.02",
    ]
    code, out = run(*grid)
    assert [result(tmp_path / str(i))["status"] for i in range(4)] == ["guard_killed", "completed", "failed", "failed"]
    assert code == 124
    assert "seq_len=0: expected a number of at least 1" in out and "Traceback" not in out
    assert out.count("A=B=C") == 1 and (tmp_path / "summary.csv").is_file()
    killed = records(tmp_path / "0")
    assert [r["kind"] for r in killed if r["kind"] in ("guard", "end")] == ["guard", "end"] and killed[-1]["kind"] == "end"
    code, out = run(*grid)
    assert "skipped: already completed" in out


def test_records_of_a_run_with_wandb(tmp_path):
    """Everything asked for is there, and one offline wandb run."""
    args = [sys.executable, "run.py", "seq_len=8", "threads=1", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b[" not in done.stdout, "no colours where there is no terminal"
    kinds = {r["kind"] for r in records(tmp_path)}
    assert kinds >= {"start", "file", "phase", "first_token", "first_token_diff", "loss", "state_health", "tensor_bytes", "end"}
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    assert result(tmp_path)["first_token"]["A-C"]["top1_equal"] is True


@pytest.mark.parametrize(
    "args, code, words",
    [
        (["stop_after=model_loaded"], 0, "stopped: stop_after=model_loaded"),
        (["stop_after=bogus"], 1, "Invalid value 'bogus', expected one of"),
        (["step.chunk_row=1"], 1, "step.chunk_row"),
        (["weights=dat", "weights.path=models/tiny/config.json"], 1, "models/tiny/config.json"),
        (["guard.wall_s=0.05"], 125, "timeout"),
    ],
)
def test_exit_codes(tmp_path, args, code, words):
    got, out = run(*args, f"hydra.run.dir={tmp_path}")
    assert got == code and words in out and "Traceback" not in out, out


def test_dry_run_lists_the_grid_and_leaves_nothing(tmp_path):
    code, out = run("-m", "seq_len=8,16", "dry_run=true", f"hydra.sweep.dir={tmp_path}")
    assert code == 0 and out.count("would run") == 2 and "seq_len=16" in out
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def long_run(folder):
    """A run that takes a while; returns the process and the worker's pid once there is one."""
    process = start("steps=100000", f"hydra.run.dir={folder}", "guard.term_grace_s=1", start_new_session=True)
    found = []

    def registered() -> bool:
        found[:] = [e.worker for e in registry.entries() if e.out_dir == str(folder.resolve())]
        return bool(found)

    assert wait_for(registered)
    return process, found[0].pid


def test_a_worker_killed_by_another_hand_is_told_as_such(tmp_path):
    process, worker = long_run(tmp_path)
    assert wait_for(lambda: "optimizer_step_done" in (tmp_path / "events.jsonl").read_text())
    os.kill(worker, signal.SIGKILL)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 137 and "SIGKILL, which fp4lab did not send" in out
    assert result(tmp_path)["last_phase"], "what it had measured is kept"


def test_no_orphan_when_the_supervisor_is_killed(tmp_path):
    process, worker = long_run(tmp_path)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any(c.pid == worker for c in children)
    process.kill()
    process.wait()
    assert wait_for(lambda: not any(alive(c.pid) for c in children), 5)


def test_ctrl_c_ends_the_run_and_records_it(tmp_path):
    process, worker = long_run(tmp_path)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in out and not alive(worker)
    assert result(tmp_path)["status"] == "interrupted"


def test_chaos(tmp_path):
    """Sixty short runs whose workers, servers and supervisor are killed at random moments: nothing is lost or done twice."""
    rng = random.Random(20261123)
    count, kills, done_at = 60, {"worker": 9, "server": 3, "supervisor": 2}, {}
    grid = ["-m", f"seed=range({count})", "stop_after=post_load_compacted", "sweep.resume=true", f"hydra.sweep.dir={tmp_path}"]
    for _ in range(100):
        process = start(*grid, stdin=subprocess.DEVNULL)
        for line in process.stdout:  # one title a run: a kill in the middle of some of them
            if kills and "seed=" in line and "skipped" not in line and rng.random() < 0.5:
                time.sleep(rng.random() * 0.15)
                kind = rng.choice(sorted(kills))
                entries = [e for e in registry.entries() if e.out_dir.startswith(str(tmp_path)) and not e.abandoned]
                victim = getattr(entries[0], kind) if entries else None
                if victim is not None and victim.send(signal.SIGKILL):
                    kills[kind] -= 1
                    kills = {k: n for k, n in kills.items() if n}
        process.wait(timeout=30)
        for folder in tmp_path.glob("[0-9]*"):
            done = folder / "result.json"
            if done.is_file() and result(folder)["status"] == "stopped":
                stamp = done.stat().st_mtime_ns
                assert done_at.setdefault(folder.name, stamp) == stamp, f"run {folder.name} was done twice"
        if process.returncode == 0 and not kills:
            break
    assert not kills and len(done_at) == count
    for i in range(count):
        ends = [r["status"] for r in records(tmp_path / str(i)) if r["kind"] == "end"]
        assert ends == [result(tmp_path / str(i))["status"]] == ["stopped"]
    assert [e for e in registry.entries() if e.out_dir.startswith(str(tmp_path)) and not e.abandoned] == []
    assert not [p for e in registry.entries() if e.out_dir.startswith(str(tmp_path)) for p in e.survivors()]
