"""A supervisor over toy workers: real processes, no torch."""

import functools
import json
import os
import subprocess
import sys
import time

import pytest
from toys import HERE, SUPERVISOR, events, running, settings, text_of

from fp4lab.events import STATUSES
from fp4lab.supervise import client
from fp4lab.supervise.run import supervise
from fp4lab.tracking.jsonl import JsonlTracker


@pytest.fixture(scope="module", autouse=True)
def toy_server():
    """The real `client.server()`, but its servers preload the toy instead of torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", HERE, prepend=os.pathsep)
        patch.setattr(client, "WorkerServer", functools.partial(client.WorkerServer, modules=("toy_worker",)))
        patch.setattr(client, "_server", None)
        yield
        client.server().close()


@pytest.fixture
def go(tmp_path):
    """go("good", wall_s=1) -> (result, records); extra trackers come before the file."""

    def start(toy: str, trackers=(), **guard):
        files = JsonlTracker(tmp_path / "events.jsonl")
        config = settings(toy, **guard)
        result = supervise(
            config,
            tmp_path,
            overrides=["seq_len=8"],
            choices={"step": "dense"},
            trackers=[*trackers, files],
            entry="toy_worker:main",
        )
        assert result["status"] in STATUSES
        return result, events(tmp_path)

    return start


@pytest.fixture
def supervisor(tmp_path):
    """supervisor("sleep") -> (process, worker pid, server pid) of a supervisor in a process of its own."""
    started = []

    def start(toy: str, **guard):
        arguments = [json.dumps(settings(toy, **guard)), str(tmp_path)]
        process = subprocess.Popen([sys.executable, "-c", SUPERVISOR, *arguments], stderr=subprocess.DEVNULL)
        started.append(process)
        deadline = time.monotonic() + 15
        while True:
            assert process.poll() is None and time.monotonic() < deadline, "the supervisor did not come up"
            path = tmp_path / "events.jsonl"
            if path.exists() and '"pids"' in path.read_text():
                worker, server = map(int, text_of(events(tmp_path), "pids").split())
                assert running(worker) and running(server)
                return process, worker, server
            time.sleep(0.02)

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
