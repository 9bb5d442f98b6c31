"""The grid of conf/experiment/state_formats_*.yaml as many small sweeps side by side, and of their records what table.py reads.

python experiments/state-formats/grid.py --out FOLDER [--jobs 14] [--steps N] [--masters A,B] [--states A,B] [--seeds 1,2,3]
                                         [--regimes scratch,finetune] [--part 1/2] [--minutes M] [OVERRIDE ...]

A sweep is one pair of master and state with all its seeds, through the ordinary door: `python run.py -m +experiment=...
step.master=A step.state=B seed=1,2,3`. The tiny model leaves a GPU idle most of the time, so `--jobs` of them share it, one
CPU thread each. FOLDER gets REGIME/MASTER.STATE.SEED/events.jsonl; what is there already is not run again. After `--minutes`
no further sweep is started.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MASTERS = ("fp32", "bf16_stochastic", "packed_residual", "packed_stochastic", "packed")
STATES = ("fp32", "bf16", "int8_block", "int8", "nvfp4_two_level", "nvfp4")
REGIMES = ("scratch", "finetune")
KEPT = ("start", "loss", "state_health", "tensor_bytes", "failure", "end")
EVENTS = "events.jsonl"


class Cell(NamedTuple):
    regime: str
    master: str
    state: str

    def run(self, seed: str) -> str:
        return f"{self.master}.{self.state}.{seed}"


def sweep(cell: Cell, seeds: list[str], options: argparse.Namespace, work: Path) -> list[str]:
    """Runs one sweep and keeps its records; returns how the runs ended."""
    seeds = [s for s in seeds if not (options.out / cell.regime / cell.run(s) / EVENTS).exists()]
    if not seeds:
        return ["there already"]
    if options.minutes and time.monotonic() > options.stop_at:
        return ["not started"] * len(seeds)
    folder = work / f"{cell.regime}.{cell.master}.{cell.state}"
    command = [
        *(sys.executable, "run.py", "-m", f"+experiment=state_formats_{cell.regime}"),
        *(f"step.master={cell.master}", f"step.state={cell.state}", f"seed={','.join(seeds)}", "threads=1"),
        *(f"hydra.sweep.dir={folder}", *([f"steps={options.steps}"] if options.steps else []), *options.overrides),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    ended = []
    for job, seed in enumerate(seeds):
        source = folder / str(job) / EVENTS
        if not source.exists():
            print(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}", file=sys.stderr)
            ended.append("no records")
            continue
        lines = [line for line in source.read_text(encoding="utf-8").splitlines() if json.loads(line)["kind"] in KEPT]
        target = options.out / cell.regime / cell.run(seed)
        target.mkdir(parents=True, exist_ok=True)
        (target / EVENTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
        last = json.loads(lines[-1])
        ended.append(last["status"] if last["kind"] == "end" else "unfinished")
        if ended[-1] not in ("completed", "diverged"):
            print(f"{cell.run(seed)}: {ended[-1]}: {last.get('reason')}", file=sys.stderr)
    return ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=lambda p: Path(p).resolve(), required=True)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--part", default="1/1", help="the first of two halves: 1/2")
    parser.add_argument("--minutes", type=float)
    for name, choices in (("masters", MASTERS), ("states", STATES), ("regimes", REGIMES), ("seeds", ("1", "2", "3"))):
        parser.add_argument(f"--{name}", default=",".join(choices))
    parser.add_argument("overrides", nargs="*", help="of run.py, for every run, e.g. task.batch_size=8")
    o = parser.parse_intermixed_args()
    part, parts = map(int, o.part.split("/"))
    started = time.monotonic()
    o.stop_at = started + 60 * (o.minutes or 0)
    cells = [Cell(r, m, s) for s in o.states.split(",") for m in o.masters.split(",") for r in o.regimes.split(",")]
    cells = cells[part - 1 :: parts]
    counts: Counter[str] = Counter()

    def one(cell: Cell) -> None:
        begun = time.monotonic()
        ended = sweep(cell, o.seeds.split(","), o, Path(work))
        counts.update(ended)
        print(
            f"{time.monotonic() - started:6.0f} s  {' '.join(cell):<42} {', '.join(ended)}  ({time.monotonic() - begun:.0f} s)"
        )

    with tempfile.TemporaryDirectory(prefix="state-formats-") as work, ThreadPoolExecutor(o.jobs) as pool:
        list(pool.map(one, cells))
    print(f"{len(cells)} sweeps in {time.monotonic() - started:.0f} s with {o.jobs} at a time: {dict(counts)}")
    return int(bool(set(counts) - {"completed", "diverged", "there already"}))


if __name__ == "__main__":
    sys.exit(main())
