"""A worker without torch: `main` does whatever `config["toy"]` names, the bad things included."""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from fp4lab.errors import Collapsed, Diverged, PlannedStop, UserError
from fp4lab.events import FirstTokenDiff, Loss, Note, Phase

Emit = Callable[[Any], None]
MIB = 1 << 20


def main(config: dict, emit: Emit) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    globals()[config["toy"]](emit)


def pids(emit: Emit) -> None:
    emit(Note(topic="pids", text=f"{os.getpid()} {os.getppid()}"))


def pipe_of(emit: Any) -> int:
    """The file descriptor that `emit` writes to."""
    names, cells = emit.__code__.co_freevars, emit.__closure__
    return dict(zip(names, (c.cell_contents for c in cells), strict=True))["event_fd"]


def good(emit: Emit) -> None:
    print("hello from the worker")
    emit(Phase(name="start", ms=1.0, proc_rss_mib=7.0))
    emit(Loss(step=0, loss=2.5))
    emit(Loss(step=1, loss=2.25))
    emit(FirstTokenDiff(pair="A-C", top1_equal=True, kl=0.5, rank_correlation=float("nan")))
    emit(Phase(name="cleanup_done", ms=3.0, proc_rss_mib=5.0))


def many(emit: Emit) -> None:
    for i in range(4000):
        emit(Note(topic="many", text=str(i)))


def slow(emit: Emit) -> None:
    time.sleep(0.5)


def done_when_asked(emit: Emit) -> None:
    """A SIGTERM in the very moment in which the task ends."""
    with contextlib.suppress(Exception):
        time.sleep(60)


def sleep(emit: Emit) -> None:
    pids(emit)
    time.sleep(60)


def stubborn(emit: Emit) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep(emit)


def raises(emit: Emit) -> None:
    emit(Note(topic="toy", text="so far so good"))
    raise ValueError("first line\nsecond line")


def user_error(emit: Emit) -> None:
    raise UserError("data.path=nowhere: no such file")


def collapsed(emit: Emit) -> None:
    raise Collapsed("non-finite logits")


def diverged(emit: Emit) -> None:
    raise Diverged("loss is nan")


def planned(emit: Emit) -> None:
    raise PlannedStop("stop_after=start")


def sys_exit(emit: Emit) -> None:
    sys.exit(3)


def hard_exit(emit: Emit) -> None:
    print("about to leave", flush=True)
    os._exit(7)


def abort(emit: Emit) -> None:
    os.abort()


def segfault(emit: Emit) -> None:
    ctypes.string_at(0)


def kills_itself(emit: Emit) -> None:
    emit(Note(topic="toy", text="last words"))
    os.kill(os.getpid(), signal.SIGKILL)


def no_memory(emit: Emit) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (400 * MIB, resource.RLIM_INFINITY))
    bytearray(1024 * MIB)


def bomb(emit: Emit) -> None:
    held = []
    for _ in range(50):  # 1000 MiB, then it gives up
        held.append(b"\x01" * (20 * MIB))
        time.sleep(0.03)


def child_bomb(emit: Emit) -> None:
    code = "import time; x = b'1' * (200 << 20); time.sleep(60)"
    subprocess.run([sys.executable, "-c", code], check=False)


def one_allocation(emit: Emit) -> None:
    x = b"\x01" * (300 * MIB)
    time.sleep(60)
    del x


def leak(emit: Emit) -> None:
    held = []
    while True:
        held.append(b"\x01" * MIB)
        time.sleep(0.002)


def fork_tree(emit: Emit) -> None:
    """Six grandchildren hold 40 MiB each; the worker and its children nothing."""
    for _ in range(2):
        if os.fork() == 0:
            for _ in range(3):
                if os.fork() == 0:
                    x = b"\x01" * (40 * MIB)
                    time.sleep(60 + len(x) % 2)
                    os._exit(0)
            time.sleep(60)
            os._exit(0)
    time.sleep(60)


def shared(emit: Emit) -> None:
    """Ten children that share 60 MiB with the worker and hold nothing of their own."""
    x = b"\x01" * (60 * MIB)
    for _ in range(10):
        if os.fork() == 0:
            time.sleep(0.5)
            os._exit(0)
    time.sleep(0.4 + len(x) % 2)


def dies_at_once(emit: Emit) -> None:
    os._exit(0)


def daemon(emit: Emit) -> None:
    """Leaves a process in a session of its own whose parent is gone: neither a child nor of the worker's group."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.write(write, str(os.getpid()).encode())
        time.sleep(60)
        os._exit(0)
    emit(Note(topic="child", text=os.read(read, 20).decode()))
    time.sleep(0.2)


def daemon_bomb(emit: Emit) -> None:
    """The same, and that process takes the memory."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            x = b"\x01" * (200 * MIB)
            time.sleep(60 + len(x) % 2)
        os._exit(0)
    os.wait()
    time.sleep(60)


def grows_after_term(emit: Emit) -> None:
    """Answers SIGTERM by taking more memory."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    leak(emit)


def chatters(emit: Emit) -> None:
    """Shows progress for a second, then stalls."""
    for i in range(10):
        emit(Loss(step=i, loss=1.0))
        time.sleep(0.1)
    emit(Phase(name="forward_done", ms=1.0))
    time.sleep(60)


def leaves_child(emit: Emit) -> None:
    child = subprocess.Popen(["sleep", "1000"])
    emit(Note(topic="child", text=str(child.pid)))


def half_line(emit: Emit) -> None:
    emit(Note(topic="toy", text="whole"))
    os.write(pipe_of(emit), b'{"t": 1.0, "kind": "no')
    os.kill(os.getpid(), signal.SIGKILL)


def garbage(emit: Emit) -> None:
    os.write(pipe_of(emit), b"Segmentation fault\n\xff\xfe\n[1, 2]\n")
    emit(Note(topic="toy", text="after"))


def kills_server(emit: Emit) -> None:
    pids(emit)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def child_then_kills_server(emit: Emit) -> None:
    leaves_child(emit)
    kills_server(emit)
