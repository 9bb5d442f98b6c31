"""The whole catalogue of the reference log's comparisons, within a time budget, in small files that can be committed.

python experiments/run_devlog.py --out experiments/results/cpu                                   the shipped model
python experiments/run_devlog.py --out experiments/results/h200 --model qwen3_4b --minutes 8.5   Qwen3-4B's shapes on a GPU
python experiments/run_devlog.py --out outputs/offload --model qwen3_4b --only chunk_grid --minutes 9 -- step.offload_mv=true

Each comparison is one `python run.py -m +experiment=devlog_NAME`. What is left of the time is shared by the runs of a sweep
(guard.wall_s): a run that takes longer ends as a timeout, with its records. A second call into the same folder skips what is
done; another choice of runs needs another folder, and `fp4lab report --devlog` takes several. It is printed at the end, and
written to OUT/report.md.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from fp4lab.analysis import devlog, devlog_report  # noqa: E402
from fp4lab.analysis.devlog import Comparison  # noqa: E402
from fp4lab.analysis.measures import peak_mib  # noqa: E402
from fp4lab.errors import UserError  # noqa: E402

PACKAGES = sysconfig.get_paths()["purelib"]  # tracebacks name its files
EXACT = {
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}  # freed memory goes back at once: resident = held
KEPT = ("events.jsonl", "result.json")
LAST = "chunk_grid"  # its runs take all the time they get
START_S = 12.0  # of a sweep: Python, Hydra, torch, a first CUDA context
QUIET = ("tracker=off", "hydra.output_subdir=null", "sweep.resume=true")


def main() -> int:
    args = arguments()
    os.chdir(ROOT)
    chosen = [c for c in devlog.catalogue() if c.command and (not args.only or c.name in args.only)]
    unknown = set(args.only) - {c.name for c in chosen}
    if unknown:
        names = ", ".join(c.name for c in devlog.catalogue() if c.command)
        raise UserError(f"--only {sorted(unknown)[0]}: expected one of {names}")
    deadline = time.monotonic() + args.minutes * 60
    out = args.out.resolve()
    for c in sorted(chosen, key=lambda c: c.name == LAST):
        run_sweep(c, args.model, out / c.name, args.extra, deadline)
    devlog_report.report([out])
    devlog_report.report([out], out / "report.md")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--model", choices=("tiny", devlog.LOGS_MODEL), default="tiny")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="comparisons, e.g. guard chunk_grid")
    parser.add_argument("extra", nargs="*", help="after --: more overrides for every run")
    return parser.parse_args()


def run_sweep(c: Comparison, model: str, folder: Path, extra: list[str], deadline: float) -> None:
    """One comparison; says so and returns where no time is left."""
    overrides = [*c.gpu] if model == devlog.LOGS_MODEL else calibrated(c)
    overrides += extra
    count = cells(c, overrides)
    left = deadline - time.monotonic() - START_S
    if left < 2 * count:
        print(f"\n== {c.name}: skipped, {max(left, 0):.0f} s left for {count} runs", flush=True)
        return
    print(f"\n== {c.name}: {count} runs, {left:.0f} s left\n   {c.question}", flush=True)
    started = time.monotonic()
    code = call(c, [*overrides, f"guard.wall_s={left / count:.0f}", f"hydra.sweep.dir={folder}"], left + START_S)
    size = slim(folder)
    print(f"== {c.name}: {time.monotonic() - started:.0f} s, exit code {code}, {size / 1024:.0f} KiB of records", flush=True)


def call(c: Comparison, overrides: list[str], seconds: float) -> int | None:
    """`python run.py -m`; None if it had to be ended. A run that fails or is killed is a row, so any exit code will do."""
    command = [sys.executable, "run.py", "-m", f"+experiment={c.experiment}", *QUIET, *overrides]
    exact = EXACT if c.calibrate and f"model={devlog.LOGS_MODEL}" not in overrides else {}
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **exact}
    process = subprocess.Popen(command, env=environment)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # run.py records it as interrupted
        process.wait()
        return None
    except KeyboardInterrupt:
        process.wait()
        raise


def cells(c: Comparison, overrides: list[str]) -> int:
    """How many runs the sweep has: the experiment's own lists, and those that `overrides` replace."""
    import yaml

    path = ROOT / f"conf/experiment/{c.experiment}.yaml"
    lists = dict(yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]["sweeper"]["params"])
    lists |= dict(o.split("=", 1) for o in overrides)
    return math.prod(len(str(v).split(",")) for v in lists.values())


def calibrated(c: Comparison) -> list[str]:
    """The limit for this machine, where the comparison asks for one: what its smallest runs need here, and a little."""
    if not c.calibrate:
        return []
    with tempfile.TemporaryDirectory() as folder:
        call(c, [*c.calibrate["run"], f"hydra.sweep.dir={folder}"], 120.0)
        peaks = [peak_mib(run) for run in devlog.load([Path(folder)])]
    known = [p for p in peaks if p is not None]
    if not known:
        raise UserError(f"experiments/devlog/{c.name}.yaml: its calibration ended without a reading of memory")
    return [f"guard.limit_gb={statistics.median(known) / 1024 + c.calibrate['above_gb']:.4f}"]


def slim(folder: Path) -> int:
    """Leaves the records alone, without this machine's paths; returns their bytes."""
    size = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name not in KEPT:
            path.unlink()
            continue
        text = path.read_text(encoding="utf-8")
        for known, shown in ((f"{ROOT}/", ""), (str(folder), folder.name), (f"{PACKAGES}/", ""), (f"{sys.base_prefix}/", "")):
            text = text.replace(known, shown)
        if path.name == "events.jsonl":
            text = "".join(slim_record(line) for line in text.splitlines())
        path.write_text(text, encoding="utf-8")
        size += path.stat().st_size
    return size


def slim_record(line: str) -> str:
    """The line as it is kept, or "": no checks of single weights that found nothing, no changes beside the commit's name."""
    try:
        record = json.loads(line)
    except ValueError:  # cut off by a kill
        return ""
    if record["kind"] == "weight_diff" and record["relative_error"] == 0:
        return ""
    if record.get("git_diff"):
        record["git_diff"] = None
        line = json.dumps(record, ensure_ascii=False)
    return line + "\n"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        sys.exit(f"run_devlog: {e}")
