"""The grid of conf/experiment/identity_grid.yaml in several formats, sweeps side by side; of its records what the table reads.

python experiments/identity/run_mixes.py --out FOLDER [--jobs 2] [--mixes A,B] [--formats MASTER.STATE,...] [--rates A,B]
                                         [--seeds 1] [--minutes M] [OVERRIDE ...]

A sweep is one mix in one format with all its learning rates and seeds, through the ordinary door: `python run.py -m
+experiment=identity_grid ...`, one CPU thread each. FOLDER gets MIX/MASTER.STATE.RATE.SEED/events.jsonl; what is there already
is not run again. After `--minutes` no further sweep is started. The cells that answer most come first.
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
MIXES = ("mix-30-70", "pure", "mix-1-1", "mix-1-99", "curriculum", "disambiguate")
FORMATS = (
    "packed_stochastic.nvfp4_two_level",
    "fp32.fp32",
    "packed.nvfp4",  # the log's
    "packed_residual.nvfp4_two_level",
    "packed.nvfp4_two_level",
)
RATES = ("1e-4", "3e-4", "1e-3")
IN_ORDER = ("curriculum",)
KEPT = ("start", "goal", "controls", "tensor_bytes", "failure", "end")
ENDINGS = ("completed", "goals_missed", "diverged")
EVENTS = "events.jsonl"


class Cell(NamedTuple):
    mix: str
    format: str

    def run(self, rate: str, seed: str) -> str:
        return f"{self.format}.{rate}.{seed}"

    def overrides(self) -> list[str]:
        master, state = self.format.split(".")
        suffix = "tsv" if (ROOT / f"data/identity/{self.mix}.tsv").exists() else "jsonl"
        order = "sequential" if self.mix in IN_ORDER else "random"
        return [
            *(f"data.path=data/identity/{self.mix}.{suffix}", f"data.order={order}"),
            *(f"step.master={master}", f"step.state={state}"),
        ]


def kept(lines: list[str]) -> list[str]:
    """What the table reads: all of some kinds, held-out losses, the last health; the manifest without its diff."""
    records = [json.loads(line) for line in lines]
    last = max((n for n, r in enumerate(records) if r["kind"] == "state_health"), default=-1)
    out = []
    for n, record in enumerate(records):
        if record["kind"] in KEPT or n == last or (record["kind"] == "loss" and record["split"] == "eval"):
            if record["kind"] == "start":
                record["git_diff"] = None
            out.append(json.dumps(record, ensure_ascii=False))
    return out


def sweep(cell: Cell, options: argparse.Namespace, work: Path) -> list[str]:
    """Runs one sweep and keeps its records; returns how the runs ended."""
    wanted = [(rate, seed) for rate in options.rates.split(",") for seed in options.seeds.split(",")]
    target = {pair: options.out / cell.mix / cell.run(*pair) for pair in wanted}
    if all((folder / EVENTS).exists() for folder in target.values()):
        return ["there already"]
    if options.minutes and time.monotonic() > options.stop_at:
        return ["not started"] * len(wanted)
    folder = work / f"{cell.mix}.{cell.format}"
    command = [
        *(sys.executable, "run.py", "-m", "+experiment=identity_grid", *cell.overrides()),
        *(f"lr={options.rates}", f"seed={options.seeds}", "threads=1", "tracker=off"),
        *(f"hydra.sweep.dir={folder}", *options.overrides),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    ended = []
    for job, pair in enumerate(wanted):  # the order in which Hydra numbers them: the last option varies fastest
        source = folder / str(job) / EVENTS
        if not source.exists():
            print(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}", file=sys.stderr)
            ended.append("no records")
            continue
        lines = kept(source.read_text(encoding="utf-8").splitlines())
        target[pair].mkdir(parents=True, exist_ok=True)
        (target[pair] / EVENTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
        last = json.loads(lines[-1])
        ended.append(last["status"] if last["kind"] == "end" else "unfinished")
        if ended[-1] not in ENDINGS:
            print(f"{cell.mix} {cell.run(*pair)}: {ended[-1]}: {last.get('reason')}", file=sys.stderr)
    return ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=lambda p: Path(p).resolve(), required=True)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float)
    for name, choices in (("mixes", MIXES), ("formats", FORMATS), ("rates", RATES), ("seeds", ("1",))):
        parser.add_argument(f"--{name}", default=",".join(choices))
    parser.add_argument("overrides", nargs="*", help="of run.py, for every run, e.g. steps=100")
    o = parser.parse_intermixed_args()
    started = time.monotonic()
    o.stop_at = started + 60 * (o.minutes or 0)
    cells = [Cell(mix, form) for form in o.formats.split(",") for mix in o.mixes.split(",")]
    counts: Counter[str] = Counter()

    def one(cell: Cell) -> None:
        begun = time.monotonic()
        ended = sweep(cell, o, Path(work))
        counts.update(ended)
        spent = f"{time.monotonic() - begun:.0f} s"
        print(f"{time.monotonic() - started:6.0f} s  {' '.join(cell):<50} {', '.join(ended)}  ({spent})", flush=True)

    with tempfile.TemporaryDirectory(prefix="identity-") as work, ThreadPoolExecutor(o.jobs) as pool:
        list(pool.map(one, cells))
    print(f"{len(cells)} sweeps in {time.monotonic() - started:.0f} s with {o.jobs} at a time: {dict(counts)}")
    return int(bool(set(counts) - {*ENDINGS, "there already"}))


if __name__ == "__main__":
    sys.exit(main())
