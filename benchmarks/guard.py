"""How fast the guard is, and what it costs, beside the reference's way: a loop around a tool. Prints JSON.

python benchmarks/guard.py [--device cpu|cuda] [--tries 200] [--peer-tries 40]

kill      a worker takes memory at a steady rate and notes when it crosses the limit and when SIGTERM reaches it; a thread
          here waits on its pidfd, which the kernel signals once its memory is returned. Milliseconds from the crossing.
peer      the same worker under `while sleep poll; nvidia-smi (on the CPU: ps); kill` (reference section 6)
load      CPU time of the supervising process as a share of one core: far from the limit, just below it, without a limit
sampling  a training step of the worker with and without a guard that looks every 5 ms just below its limit
"""

import argparse
import contextlib
import functools
import json
import os
import resource
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])

from fp4lab.config import GuardConfig  # noqa: E402
from fp4lab.supervise.client import WorkerServer  # noqa: E402
from fp4lab.supervise.ledger import Ledger  # noqa: E402
from fp4lab.supervise.run import watch  # noqa: E402

MIB = 1 << 20
GUARD = {**vars(GuardConfig()), "blind": "warn", "host_available_min_gb": None, "sample_s": 1.0}


# in the worker


def _write(config: dict, **values: float) -> None:
    Path(config["notes"]).write_text(json.dumps(values))


def bomb(config: dict, emit: Any) -> None:
    """Takes memory until it is told to end."""
    times: dict[str, float] = {}

    def told(*_: Any) -> None:
        times["term"] = time.monotonic()
        times.setdefault("cross", times["term"])  # the guard saw the crossing before this loop did
        _write(config, **times)
        os._exit(0)

    signal.signal(signal.SIGTERM, told)
    limit = config["limit_mib"] * MIB
    held: list[Any] = []
    page = os.sysconf("SC_PAGE_SIZE")
    if config["device"] == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        while True:
            held.append(torch.empty(32 * MIB, dtype=torch.uint8, device="cuda"))
            free, total = torch.cuda.mem_get_info()
            if "cross" not in times and total - free > limit:
                times["cross"] = time.monotonic()
            time.sleep(0.001)
    with open("/proc/self/statm", "rb", buffering=0) as statm:
        while True:
            held.append(b"1" * MIB)
            if "cross" not in times and int(os.pread(statm.fileno(), 99, 0).split()[1]) * page > limit:
                times["cross"] = time.monotonic()
            time.sleep(0.0005)


def hold(config: dict, emit: Any) -> None:
    """Holds `hold_mib` for `seconds`."""
    x = b"1" * (config["hold_mib"] * MIB)
    time.sleep(config["seconds"] + 0 * len(x))


def train(config: dict, emit: Any) -> None:
    """AdamW steps of a stack of linears; notes the median step."""
    import torch

    device, size = config["device"], 4096 if config["device"] == "cuda" else 256
    if device == "cpu":
        torch.set_num_threads(1)
    model = torch.nn.Sequential(*(torch.nn.Linear(size, size, device=device) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(256, size, device=device)
    times = []
    for _ in range(config["steps"]):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    steady = times[len(times) // 5 :]
    _write(config, median_ms=1e3 * statistics.median(steady), mean_ms=1e3 * statistics.fmean(steady))


# here


class Bench:
    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device
        self.notes = folder / "notes.json"
        self.server = WorkerServer(modules=("guard", *(("torch",) if device == "cuda" else ())))
        self.gone: dict[int, float] = {}

    def config(self, **more: Any) -> dict[str, Any]:
        return {"device": self.device, "notes": str(self.notes), **more}

    def guarded(self, entry: str, config: dict, **guard: Any) -> tuple[dict, int]:
        """The result of a run, and the worker's pid."""
        pids = []

        def launch(server: WorkerServer, events: int) -> int:
            pids.append(self.spawn(entry, config, events))
            return pids[0]

        whole = {"task": {"name": "bench"}, "guard": {**GUARD, **guard}, **config}
        return watch(Ledger(whole, self.folder / "run", [], []), lambda: self.server, launch), pids[0]

    def spawn(self, entry: str, config: dict, events: int) -> int:
        with (self.folder / "worker.log").open("wb") as log:
            pid = self.server.spawn(f"guard:{entry}", config, events, log.fileno())
        threading.Thread(target=self._wait, args=(pid,), daemon=True).start()
        return pid

    def _wait(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll()
            os.close(fd)
        self.gone[pid] = time.monotonic()

    def unguarded(self, entry: str, config: dict, until: Any = None) -> int:
        """The same worker without a guard; `until(pid)` may end it. Returns its pid."""
        read, write = os.pipe()
        pid = self.spawn(entry, config, write)
        os.close(write)
        if until is not None:
            until(pid)
        while pid not in self.server.exits:
            self.server.listen()
        del self.server.exits[pid]
        os.close(read)
        return pid

    def latency(self, pid: int) -> tuple[float, float]:
        """(to SIGTERM, to memory returned), ms after the crossing."""
        while pid not in self.gone:
            time.sleep(0.001)
        times = json.loads(self.notes.read_text())
        self.notes.unlink()
        return 1e3 * (times["term"] - times["cross"]), 1e3 * (self.gone[pid] - times["cross"])


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {q: ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in (0.5, 0.99)}
    return {"p50": round(at[0.5], 2), "p99": round(at[0.99], 2), "max": round(ordered[-1], 2)}


def both(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    term, gone = zip(*pairs, strict=True)
    return {"tries": len(pairs), "to_sigterm_ms": spread(list(term)), "to_memory_returned_ms": spread(list(gone))}


def kills(bench: Bench, limit_mib: int, polls: list[float], tries: int) -> dict[str, Any]:
    found = {}
    for poll in polls:
        pairs = []
        for _ in range(tries):
            config = bench.config(limit_mib=limit_mib)
            result, pid = bench.guarded("bomb", config, limit_gb=limit_mib / 1024, poll_s=poll)
            if result["status"] != "guard_killed":
                raise SystemExit(f"the guard did not end the worker: {result['status']} {result['reason']}")
            pairs.append(bench.latency(pid))
        found[str(poll)] = both(pairs) | {"source": result["guard"]["source"], "look_ms": result["guard"]["cost_ms_per_look"]}
    return found


def _held_by_tool(pid: int, device: str) -> float:
    if device == "cuda":
        command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        listed = [tuple(map(int, line.split(","))) for line in lines if line.strip()]
        return sum(mib for _, mib in listed)  # the only process on the device
    out = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return int(out or 0) / 1024


def peers(bench: Bench, limit_mib: int, polls: list[float], tries: int) -> dict[str, Any]:
    """The reference's script: a look with a tool every `poll` seconds, SIGTERM when over."""

    def loop(pid: int, poll: float) -> None:
        while _held_by_tool(pid, bench.device) <= limit_mib:
            time.sleep(poll)
        os.kill(pid, signal.SIGTERM)

    found = {}
    for poll in polls:
        config = bench.config(limit_mib=limit_mib)
        pairs = [bench.latency(bench.unguarded("bomb", config, functools.partial(loop, poll=poll))) for _ in range(tries)]
        found[str(poll)] = both(pairs)
    return found


def load(bench: Bench) -> dict[str, Any]:
    """CPU share of this process while it supervises."""
    found = {}
    held = bench.guarded("hold", bench.config(hold_mib=256, seconds=0.5))[0]["max_rss_mib"]
    for name, poll, limit_mib in (
        ("far, poll 0.1", 0.1, 1 << 17),
        ("far, poll 0.005", 0.005, 1 << 17),
        ("near, poll 0.1", 0.1, held + 32),
        ("near, poll 0.005", 0.005, held + 32),
    ):
        config = bench.config(hold_mib=256, seconds=4.0)
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        result, _ = bench.guarded("hold", config, limit_gb=limit_mib / 1024, poll_s=poll)
        after, wall = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - start
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        looks = result["guard"]["looks"]
        found[name] = {"cpu_percent": round(100 * used / wall, 2), "looks_per_s": round(looks / wall, 1)}
        if result["status"] != "completed":
            raise SystemExit(f"load: {result['status']} {result['reason']}")
    return found


def sampling(bench: Bench, steps: int, repeat: int) -> dict[str, Any]:
    """Median and mean step, ms: without a guard, under the default one, and under one that looks every 5 ms."""
    rows: dict[str, list[dict]] = {"off": [], "default": [], "every 5 ms": []}
    for _ in range(repeat):
        for name, taken in rows.items():
            config = bench.config(steps=steps)
            if name == "off":
                bench.unguarded("train", config)
            else:
                # over a limit that it may be over for ever: nearer than near, so that poll_s is the period
                near = {} if name == "default" else {"poll_s": 0.005, "limit_gb": 1e-9, "over_s": 1e9}
                result, _ = bench.guarded("train", config, **near)
                if result["status"] != "completed":
                    raise SystemExit(f"sampling: {result['status']} {result['reason']}")
            taken.append(json.loads(bench.notes.read_text()))
    best = {name: {k: round(statistics.median(t[k] for t in taken), 4) for k in taken[0]} for name, taken in rows.items()}
    for name in ("default", "every 5 ms"):
        best[name]["cost_percent"] = round(100 * (best[name]["mean_ms"] / best["off"]["mean_ms"] - 1), 2)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--peer-tries", type=int, default=40)
    parser.add_argument("--limit-mib", type=int, default=0, help="default 192 on the CPU, 4096 on a GPU")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    limit = args.limit_mib or (192 if args.device == "cpu" else 4096)
    polls = [0.5, 0.05, 0.005]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.device)
        try:
            out = {
                "device": args.device,
                "limit_mib": limit,
                "kill": kills(bench, limit, polls, args.tries),
                "peer": peers(bench, limit, polls, args.peer_tries),
                "load": load(bench),
                "sampling": sampling(bench, args.steps, args.repeat),
            }
        finally:
            bench.server.close()
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
