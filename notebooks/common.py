"""What the notebooks share: where they are, how a run is made and read, and how figures look."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "experiments/results/cpu"
os.chdir(ROOT)  # configurations name files by their place in the repository
sys.path.insert(0, str(ROOT / "src"))

from fp4lab.analysis.frames import read_events

# Okabe and Ito's colours, which stay apart for every kind of colour vision.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#6f7680"


def style() -> None:
    plt.rcParams.update(
        {
            "figure.figsize": (9, 3.6),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
        }
    )
    pd.set_option("display.width", 140, "display.max_colwidth", 80)


def records(run: Path, kind: str) -> pd.DataFrame:
    """The records of one kind, a row each."""
    return pd.DataFrame([r for r in read_events(run) if r["kind"] == kind])


def options(run: Path) -> dict[str, str]:
    """The overrides a run was given."""
    start = records(run, "start").iloc[0]
    return dict(o.lstrip("+").split("=", 1) for o in start.overrides)


def sweep(folder: Path, *overrides: str) -> list[Path]:
    """`python run.py -m` into `folder`; its runs. Raises RuntimeError with what it said if it failed."""
    command = [sys.executable, "run.py", "-m", *overrides, "tracker=off", "threads=1", f"hydra.sweep.dir={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))
