"""How long it takes to read many runs. Prints JSON: seconds, MB/s and peak memory of each way.

python benchmarks/analysis.py [--runs 5000] [--events 200] [--folder DIR]

ours   load_runs: twelve typed frames and a row a run
peer   pandas.read_json(lines=True) of each file, then one concat: a single frame with every field of every kind, untyped
bare   json.loads of each line, nothing kept: the floor of any reader that uses Python's json

Each in a process of its own, one after the other, on the same files (read once before, so that none pays for the disk).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fp4lab.config import PHASES
from fp4lab.encoding import encode
from fp4lab.events import End, Event, FirstToken, FirstTokenDiff, Loss, Phase, Sample, Start, to_record


def events(number: int, count: int) -> list[Event]:
    """A run's records in about the mix of a training run: 13 phases, three paths, a third samples, the rest losses."""
    memory: dict[str, Any] = {"proc_rss_mib": 250.5 + number % 7, "mem_available_mib": 20000.25, "mem_total_mib": 24105.5}
    tops = [(i, 10.5 - i, f" token{i}") for i in range(10)]
    found: list[Event] = [Start(overrides=[f"lr=1e-{number % 5}", f"seed={number}"], versions={"torch": "2.13.0"})]
    found += [Phase(name=p, ms=12.5, proc_peak_rss_mib=300.0, source="rss (no NVML)", **memory) for p in PHASES]
    found += [
        FirstToken(path=p, prompt="hi", top10=tops, layer_rms=[1.5] * 8) for p in ("A.infer", "B.fp2_ste", "C.noste_graph")
    ]
    found += [FirstTokenDiff(pair=p, top1_equal=True, kl=1e-9, prompt="hi", why="rounding") for p in ("A-B", "A-C", "B-C")]
    for i in range(count - len(found) - 1):
        loss = Loss(step=i, loss=5.0 / (1 + i), grad_norm=1.25, tokens=256, lr=1e-4, ms=81.5)
        found.append(Sample(source="rss (no NVML)", **memory) if i % 3 == 0 else loss)
    peaks: dict[str, float | None] = {"proc_rss_mib": 256.0, "proc_peak_rss_mib": 300.0}
    return [*found, End(status="completed", seconds=float(count), peaks=peaks)]


def write(folder: Path, runs: int, count: int) -> int:
    """Makes the sweep; returns its bytes."""
    size = 0
    for n in range(runs):
        run = folder / str(n)
        run.mkdir()
        wall = "2026-11-23T22:41:11.150+00:00"
        lines = [encode({"t": i + 0.25, "wall": wall, **to_record(e)}) for i, e in enumerate(events(n, count))]
        size += (run / "events.jsonl").write_bytes(("\n".join(lines) + "\n").encode())
    return size


def ours(folder: Path) -> int:
    from fp4lab.analysis.frames import load_runs

    return len(load_runs(folder).losses)


def peer(folder: Path) -> int:
    import pandas as pd

    frames = [pd.read_json(p, lines=True).assign(run=p.parent.name) for p in sorted(folder.glob("*/events.jsonl"))]
    return int((pd.concat(frames, ignore_index=True)["kind"] == "loss").sum())


def bare(folder: Path) -> int:
    found = 0
    for path in folder.glob("*/events.jsonl"):
        with path.open(encoding="utf-8") as f:
            found += sum(json.loads(line)["kind"] == "loss" for line in f)
    return found


WAYS: dict[str, Callable[[Path], int]] = {"ours": ours, "peer": peer, "bare": bare}


def timed(way: str, folder: Path) -> dict[str, Any]:
    """One way, in this process: what it imports is not timed."""
    import pandas  # noqa: F401

    start = time.perf_counter()
    losses = WAYS[way](folder)
    seconds = time.perf_counter() - start
    return {"losses": losses, "s": round(seconds, 2), "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where to make the files; default a temporary folder")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(timed(given.way, given.folder)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        size = write(Path(name), given.runs, given.events)
        result: dict[str, Any] = {"runs": given.runs, "events": given.events, "mb": round(size / 1e6)}
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way, "--folder", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result[way] = json.loads(done.stdout)
            result[way]["mb_s"] = round(size / 1e6 / result[way]["s"])
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
