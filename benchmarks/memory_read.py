"""What one look at memory costs, beside psutil and the tools that scripts call. Prints JSON: medians, microseconds.

python benchmarks/memory_read.py [--looks 2000] [--processes 8]

ours   MemoryReader.read of one process and of several; the same with the walk over their tree; proportional sizes
nvml   the driver's part of a look, where there is a GPU
peer   psutil: resident sets of the same processes, without and with its own walk; `ps`, `nvidia-smi`: a process for each look
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

from fp4lab.telemetry.host import process_tree
from fp4lab.telemetry.nvml import open_nvml
from fp4lab.telemetry.reader import MemoryReader

PARENT = """
import subprocess, sys
children = [subprocess.Popen(["sleep", "600"]) for _ in range(int(sys.argv[1]) - 1)]
print("up", flush=True)
sys.stdin.read()
for child in children:
    child.kill()
    child.wait()
"""


def cost(look: Callable[[], object], looks: int) -> float:
    """Median of `looks` calls, microseconds."""
    look()
    times = []
    for _ in range(looks):
        start = time.perf_counter()
        look()
        times.append(time.perf_counter() - start)
    return round(1e6 * statistics.median(times), 1)


def psutil_look(pids: list[int]) -> float:
    held = sum(psutil.Process(p).memory_info().rss for p in pids)
    return held + psutil.virtual_memory().available


def psutil_walk(root: int) -> float:
    process = psutil.Process(root)
    return psutil_look([root, *(c.pid for c in process.children(recursive=True))])


def tool(*command: str) -> Callable[[], object]:
    return lambda: subprocess.run(command, capture_output=True, check=True)


def measure(root: int, count: int, looks: int) -> dict[str, Any]:
    """Everything, for the tree of `count` processes below and with `root`."""
    reader, host = MemoryReader(), MemoryReader(look_for_nvml=False)
    nvml, _ = open_nvml()
    me, few, pids = os.getpid(), max(looks // 50, 1), process_tree(root)
    if len(pids) != count:
        raise SystemExit(f"expected {count} processes, found {len(pids)}")
    out: dict[str, Any] = {
        "source": reader.read([me]).source,
        "ours": {
            "one process": cost(lambda: reader.read([me]), looks),
            "one process, without NVML": cost(lambda: host.read([me]), looks),
            f"{count} processes": cost(lambda: reader.read(pids), looks),
            f"{count} processes and their tree": cost(lambda: reader.read(process_tree(root)), looks),
            f"{count} processes, proportional": cost(lambda: reader.read(pids, detailed=True), few),
        },
        "peer": {
            "psutil, one process": cost(lambda: psutil_look([me]), looks),
            f"psutil, {count} processes": cost(lambda: psutil_look(pids), looks),
            f"psutil, {count} processes and their tree": cost(lambda: psutil_walk(root), few),
            "ps": cost(tool("ps", "-o", "rss=", "-p", str(me)), few),
        },
    }
    if nvml is not None:
        out["nvml"] = {"devices": cost(nvml.devices, looks), "processes": cost(lambda: nvml.held([me]), looks)}
    if shutil.which("nvidia-smi"):
        query = ("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader")
        out["peer"]["nvidia-smi"] = cost(tool(*query), few)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--looks", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=8)
    args = parser.parse_args()
    command = [sys.executable, "-c", PARENT, str(args.processes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        out = measure(parent.pid, args.processes, args.looks)
        parent.communicate()  # closes its input: it ends its children
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
