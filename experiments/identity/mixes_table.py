"""Which data, learning rate and format reach the identity, from the records of run_mixes.py: runs.csv, table.md and mixes.png.

python experiments/identity/mixes_table.py FOLDER [--out FOLDER]     FOLDER/MIX/MASTER.STATE.RATE.SEED/events.jsonl

goals      met on the worst of A, B and C after training
kept       control answers that are the untuned model's, token by token, and the rise of their loss, nats a token (worst path)
state MiB  weights and moments that the optimizer keeps, with the 4-bit image where the master is another tensor
codes kept slope of the change that the stored weights made on the change asked for in the last step: 0 is inertia
verdict    reached: all goals and the experiment's bounds on controls. forgot: all goals, controls beyond a bound. missed: goals
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from mixes_picture import save

from fp4lab.analysis.frames import load_runs
from fp4lab.analysis.records import read_events, run_folders
from fp4lab.errors import UserError

MIXES = ("pure", "mix-30-70", "mix-1-1", "mix-1-99", "curriculum", "disambiguate")
KEYS = ["master", "state", "mix", "lr", "seed"]


def rows_of(folder: Path, mix: str) -> list[dict[str, Any]]:
    """One row a run."""
    frames = load_runs(folder / mix)
    rows = []
    for run, result in zip(run_folders(folder / mix), frames.runs.to_dict("records"), strict=True):
        master, state, rate, seed = run.name.split(".")
        records = read_events(run)
        health = [r for r in records if r["kind"] == "state_health"]
        moved = health[-1]["update_kept"] if health else None
        rows.append(
            {
                **{"master": master, "state": state, "mix": mix, "lr": float(rate), "seed": int(seed)},
                **{k: result[k] for k in ("status", "goals_met", "goals", "controls_kept", "controls_loss_rise", "loss")},
                "update_kept": moved,
                "state_mib": state_mib([r for r in records if r["kind"] == "tensor_bytes"], master),
                "verdict": verdict(result),
            }
        )
    return rows


def verdict(result: dict[str, Any]) -> str:
    if result["status"] == "completed":
        return "reached"
    if result["status"] != "goals_missed":
        return str(result["status"])
    return "forgot" if result["goals_met"] == result["goals"] else "missed"


def state_mib(report: list[dict[str, Any]], master: str) -> float:
    """Of the byte report."""
    own = sum(r["mib"] for r in report if r["tensor_kind"].startswith("state_"))
    image = sum(r["mib"] for r in report if r["tensor_kind"].startswith("packed_"))
    parameters = sum(r["mib"] for r in report if r["tensor_kind"] == "model_param")
    raw = sum(r["mib"] for r in report if r["tensor_kind"] == "raw_param")
    if master.startswith("packed"):
        return own
    joined = any(r["tensor_kind"] == "state_w_data" and r["mib"] > raw for r in report)  # the masters lie with the state
    return own + image + (0 if joined else parameters)


def markdown(runs: pd.DataFrame) -> str:
    header = ["master", "moments", "state MiB", "data", "lr", "goals", "controls kept", "loss rise", "held-out loss", "verdict"]
    lines = ["| " + " | ".join(header) + " |", "|---|---|---:|---|---:|---:|---:|---:|---:|---|"]
    for r in runs.to_dict("records"):
        bold = "**" if r["verdict"] == "reached" else ""
        lines.append(
            f"| {r['master']} | {r['state']} | {r['state_mib']:.1f} | {r['mix']} | {r['lr']:.0e} "
            f"| {r['goals_met']:.0f}/{r['goals']:.0f} | {r['controls_kept']:.0%} | {r['controls_loss_rise']:+.3f} "
            f"| {r['loss']:.3f} | {bold}{r['verdict']}{bold} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or options.folder
    try:
        found = [row for mix in MIXES if (options.folder / mix).is_dir() for row in rows_of(options.folder, mix)]
        if not found:
            raise UserError(f"{options.folder}: no runs; expected MIX/MASTER.STATE.RATE.SEED/events.jsonl of run_mixes.py")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    runs = pd.DataFrame(found)
    runs["mix"] = pd.Categorical(runs["mix"], MIXES, ordered=True)
    runs = runs.sort_values(["state_mib", "master", "state", "mix", "lr", "seed"]).reset_index(drop=True)
    runs.to_csv(out / "runs.csv", index=False, float_format="%.6g")
    text = markdown(runs)
    (out / "table.md").write_text(text, encoding="utf-8")
    save(runs, out / "mixes.png")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
