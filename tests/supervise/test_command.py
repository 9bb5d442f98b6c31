"""`fp4lab guard -- COMMAND`, as a shell starts it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from toys import events, gone_within, of

MAIN = [sys.executable, "-c", "from fp4lab.cli import main; main()", "guard", "--poll-s", "0.02"]
BOMB = "x = []\nwhile True:\n    x.append(b'1' * (1 << 20)); import time; time.sleep(0.002)"
TREE = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def start(tmp_path):
    started = []

    def go(*args: str, **more) -> subprocess.Popen:
        command = [*MAIN, "--out", str(tmp_path), *args]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
        started.append(process)
        return process

    yield go
    for process in started:
        process.kill()
        process.wait()


def ended(process: subprocess.Popen, say: str = "") -> tuple[int, str, str]:
    out, err = process.communicate(say, timeout=30)
    return process.returncode, out, err


def test_the_command_keeps_its_streams_and_its_exit_code(start):
    code = "import sys; print(sys.stdin.read().upper()); print('oops', file=sys.stderr); sys.exit(7)"
    process = start("--", sys.executable, "-c", code, stdin=subprocess.PIPE)
    got, out, err = ended(process, "hello")
    assert (got, out) == (7, "HELLO\n") and "\noops\n" in err
    assert f"guard_pid={process.pid} child_pid=" in err


def test_a_command_over_the_limit_is_ended_with_124_and_leaves_records(start, tmp_path):
    code, _, err = ended(start("--limit-gb", "0.1", "--", sys.executable, "-c", BOMB))
    assert code == 124 and "over the limit of 102 MiB" in err
    records = events(tmp_path)
    assert [r["verdict"] for r in of(records, "guard")] == ["breach"]
    assert [r["status"] for r in of(records, "end")] == ["guard_killed"]
    assert json.loads((tmp_path / "result.json").read_text())["exit_code"] != 0


def test_wall_time_is_125_and_a_signal_128_and_its_number(start):
    assert ended(start("--wall-s", "0.2", "--", "sleep", "60"))[0] == 125
    assert ended(start("--", "sh", "-c", "kill -SEGV $$"))[0] == 128 + signal.SIGSEGV


def test_options_of_the_command_are_its_own(start):
    assert ended(start("--", "echo", "--limit-gb", "1"))[1] == "--limit-gb 1\n"
    assert ended(start("echo", "-n", "--quiet", "--help"))[1] == "--quiet --help"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--limit-gb", "0", "--", "true"], "--limit-gb"),
        (["--limit-gb", "nan", "--", "true"], "--limit-gb"),
        (["--poll-s", "0.001", "--", "true"], "--poll-s"),
        (["--over-s", "-1", "--", "true"], "--over-s"),
        (["--blind", "maybe", "--", "true"], "--blind"),
        (["--limit-gb", "1"], "ommand"),
        (["--", "no-such-command"], "no-such-command"),
        (["--", "/etc/passwd"], "/etc/passwd"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(start, tmp_path, args, words):
    code, _, err = ended(start(*args))
    assert code == 2 and words in err and "Traceback" not in err
    assert not (tmp_path / "events.jsonl").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_guard_leaves_no_child(start, tmp_path, number):
    default = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = start("--limit-gb", "4", "--", sys.executable, "-c", TREE, **default)
    pids = [int(p) for p in process.stdout.readline().split()]
    began = time.monotonic()
    process.send_signal(number)
    process.wait(timeout=10)
    assert gone_within(1.0, *pids), f"alive {time.monotonic() - began:.1f} s after"
    if number != signal.SIGKILL:
        assert process.returncode == 130 and "Traceback" not in process.stderr.read()
        assert [r["status"] for r in of(events(tmp_path), "end")] == ["interrupted"]


def test_the_guard_needs_no_torch(start, tmp_path):
    """A guard that takes 300 MiB itself would be part of the problem."""
    process = start("--", sys.executable, "-c", TREE)
    process.stdout.readline()
    with open(f"/proc/{process.pid}/maps") as maps:
        assert "libtorch" not in maps.read()
    os.kill(process.pid, signal.SIGTERM)
    process.wait(timeout=10)
