"""What supervision, isolation and records cost a run, beside plain Hydra + wandb in one process. Prints JSON.

python benchmarks/run_overhead.py [--repeat 3]

ours   the six-run sweep; a run's overhead is its whole time less the worker's own time between its first and last record
plain  the peer: one process that has torch imported, six Hydra jobs, `with wandb.init(mode="offline")` and one log in each
empty  six runs of ours that stop at their first phase: what the machinery alone takes
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GRID = ["step.chunk_rows=16,32,64", "seq_len=8,32"]
PEER = """
import hydra, torch, wandb
@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    with wandb.init(mode="offline", project="peer", settings=wandb.Settings(silent=True)) as run:
        run.log({"loss": 1.0})
main()
"""


def timed(command: list[str], **kwargs) -> float:
    """Seconds of a command. Raises CalledProcessError with its output if it fails."""
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, text=True, **kwargs)
    return time.monotonic() - start


def sweep(folder: Path, *extra: str) -> dict[str, float]:
    """Seconds of the whole sweep, and a run's overhead in the median: its time outside the worker's own work."""
    total = timed([sys.executable, "run.py", "-m", *GRID, f"hydra.sweep.dir={folder}", *extra])
    overheads, works = [], []
    for run in sorted(folder.iterdir()):
        if not (run / "events.jsonl").is_file():
            continue
        records = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        phases = [r["t"] for r in records if r["kind"] == "phase"]
        end = next(r for r in records if r["kind"] == "end")
        work = phases[-1] - phases[0]
        works.append(work)
        overheads.append(end["t"] - work)
    count = len(works)
    return {
        "runs": count,
        "sweep_s": total,
        "worker_s_a_run": statistics.median(works),
        "recorded_overhead_s_a_run": statistics.median(overheads[1:]),  # the first waits for torch's import
        "first_run_overhead_s": overheads[0],
        "all_overhead_s_a_run": (total - sum(works)) / count,
    }


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    return {k: round(statistics.median(r[k] for r in rows), 3) for k in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    ours, empty, no_wandb, peer = [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "peer.py"
        script.write_text(PEER)
        for i in range(repeat):
            ours.append(sweep(folder / f"ours{i}"))
            empty.append(sweep(folder / f"empty{i}", "stop_after=start"))
            no_wandb.append(sweep(folder / f"off{i}", "stop_after=start", "tracker=off"))
            jobs = [f"hydra.sweep.dir={folder / f'peer{i}'}", "+a=1,2,3", "+b=1,2"]
            total = timed([sys.executable, str(script), "-m", *jobs], cwd=folder)
            peer.append({"runs": 6, "sweep_s": total, "all_overhead_s_a_run": total / 6})
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", lines)
    rows = {"ours": ours, "empty": empty, "empty_tracker_off": no_wandb, "plain_hydra_wandb": peer}
    result = {"cpu": found.group(1) if found else "?", "repeat": repeat, **{k: median(v) for k, v in rows.items()}}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
