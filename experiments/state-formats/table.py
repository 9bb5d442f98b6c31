"""The trade-off of state formats from the records of grid.py: cells.csv, readings.csv, table.md and trade-off.png.

python experiments/state-formats/table.py FOLDER [--out FOLDER]     FOLDER/{scratch,finetune}/MASTER.STATE.SEED/events.jsonl

bits      of master, its 4-bit image where that is another tensor, m and v, for a weight that is not kept in fp32 anyway
gap       held-out loss over that of fp32 master and moments with the same seed, minus 1
verdict   as good: gap at most 1 %. diverged: not finite, or above the start. Under half of the fall of fp32 / fp32: stands
          still where the weights made less than half of the change asked for (median of update_kept), else unstable. The rest
          is behind
early     readings of StateHealth in the first fifth of the steps
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from picture import save

from fp4lab.analysis.frames import load_events
from fp4lab.errors import UserError
from fp4lab.train.checks import adam_bound

REGIMES = ("scratch", "finetune")
MIB = 1 << 20
SIZES = {"uint8": 1, "float32": 4, "bfloat16": 2, "float16": 2}
REFERENCE = ("fp32", "fp32")
AS_GOOD, HALF = 0.01, 0.5
ORDER = ("as good", "behind", "stands still", "unstable", "diverged")
OUTCOMES = {"stands still": ("stands still",), "blows up": ("unstable", "diverged")}
EARLY = 0.2
NVFP4_BITS = 4.5
READINGS = ("update_kept", "code_changed", "over_bound", "dead_v")  # the first two are low where it fails, the others high
KEYS = ["regime", "master", "state"]


def runs_of(folder: Path, regime: str) -> pd.DataFrame:
    """One row a run: its cell, seed, bits, first and held-out loss, status, and the early readings."""
    frames = {kind: load_events(folder, kind) for kind in ("loss", "state_health", "tensor_bytes", "end")}
    by_run = {kind: dict(tuple(frame.groupby("run"))) for kind, frame in frames.items()}
    rows = []
    for run, losses in by_run["loss"].items():
        master, state, seed = str(run).split(".")
        held = losses[losses["split"] == "eval"]
        train = losses[losses["split"] == "train"]
        end = by_run["end"].get(run)
        rows.append(
            {
                "regime": regime,
                **{"master": master, "state": state, "seed": int(seed)},
                "bits": bits(by_run["tensor_bytes"][run], master),
                "status": "unfinished" if end is None else end["status"].iloc[-1],
                "first_loss": float(train["loss"].iloc[0]),
                "train_loss": float(train["loss"].tail(3).mean()),
                "loss": float(held["loss"].iloc[-1]) if len(held) else np.nan,
                **early(by_run["state_health"][run], train["step"].max()),
                "kept": float(by_run["state_health"][run]["update_kept"].median()),
            }
        )
    return pd.DataFrame(rows)


def bits(kinds: pd.DataFrame, master: str) -> float:
    """Stored bits of a weight that follows the master, from the byte report without what is fp32 whatever the formats are."""
    wanted = ("model_param", "raw_param", "state_w_codes")
    count = {k: elements(rows) for k, rows in kinds.groupby("tensor_kind") if k in wanted}
    high = count["raw_param"]
    low = 2 * count["state_w_codes"] if "state_w_codes" in count else count["model_param"] - high
    state = kinds[kinds["tensor_kind"].str.startswith("state_")]["mib"].sum() * MIB
    own = (state - 12 * high) / low * 8  # fp32 master, m and v of embedding and norms
    return own + (0 if master.startswith("packed") else NVFP4_BITS)


def elements(rows: pd.DataFrame) -> float:
    return sum(mib * MIB / SIZES[dtype] for mib, dtype in zip(rows["mib"], rows["dtype"], strict=True))


def early(health: pd.DataFrame, steps: int) -> dict[str, float]:
    """The worst of each reading in the first fifth of the run."""
    seen = health[health["step"] <= max(EARLY * steps, health["step"].min())]
    bounds = [adam_bound(0.9, 0.999, int(step)) for step in seen["step"]]
    return {
        "update_kept": float(seen["update_kept"].min()),
        "code_changed": float(seen["code_changed"].mean()),
        "over_bound": float((seen["max_update_over_lr"] / bounds).replace(np.nan, np.inf).max()),
        "dead_v": float(max(z.get("v", 0.0) for z in seen["zero_scale"])),
    }


def judge(runs: pd.DataFrame) -> pd.DataFrame:
    """Adds gap, fall (share of the reference's) and verdict to each run. Raises UserError where there is no reference."""
    reference = runs[(runs["master"] == REFERENCE[0]) & (runs["state"] == REFERENCE[1])].set_index(["regime", "seed"])["loss"]
    wanted = pd.MultiIndex.from_frame(runs[["regime", "seed"]])
    if not set(wanted) <= set(reference.index):
        raise UserError("some seeds have no run with fp32 master and fp32 moments to be compared with")
    goal = reference.loc[list(wanted)].to_numpy()
    gap = runs["loss"] / goal - 1
    fall = (runs["first_loss"] - runs["loss"]) / (runs["first_loss"] - goal).where(runs["first_loss"] > goal)
    lost = (
        (runs["status"] == "diverged") | ~np.isfinite(runs["loss"]) | ((runs["loss"] >= runs["first_loss"]) & (gap > AS_GOOD))
    )
    short = fall < HALF
    verdict = np.select(
        [lost, short & (runs["kept"] < HALF), short, gap <= AS_GOOD], ["diverged", *ORDER[2:4], "as good"], "behind"
    )
    return runs.assign(gap=gap, fall=fall, verdict=verdict)


def cells_of(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: means over seeds, the spread of the held-out loss, the worst seed's verdict."""
    grouped = runs.groupby(KEYS, sort=False)
    table = grouped.agg(
        seeds=("seed", "count"),
        bits=("bits", "mean"),
        loss=("loss", "mean"),
        sd=("loss", "std"),
        train_loss=("train_loss", "mean"),
        gap=("gap", "mean"),
        gap_sd=("gap", "std"),
        **{reading: (reading, "median") for reading in READINGS},
    )
    table["verdict"] = grouped["verdict"].agg(lambda v: max(v, key=ORDER.index))
    lost = table["verdict"] == "diverged"
    table.loc[lost, "gap"] = np.nan  # a mean over the seeds that survived would mislead
    mean = table["gap"].where((table["verdict"] == "behind") & (table["gap"] <= AS_GOOD))
    table.loc[mean.notna(), "verdict"] = "as good"  # a seed may lie outside, the mean does not
    return table.reset_index().sort_values(["regime", "bits", "loss"], ascending=[False, True, True])


def readings_of(runs: pd.DataFrame) -> pd.DataFrame:
    """How well each early reading tells runs that will end so from the others: area under the ROC curve (0.5: not at all),
    and the threshold with the fewest errors. `update_kept` and `code_changed` count as alarms when low."""
    rows = []
    for regime, some in [*runs.groupby("regime"), ("both", runs)]:
        for outcome, verdicts in OUTCOMES.items():
            hit = some["verdict"].isin(verdicts).to_numpy()
            for reading in READINGS:
                alarm = some[reading].fillna(some[reading].median()).to_numpy() * (1 if reading in READINGS[2:] else -1)
                if hit.any() and not hit.all():
                    threshold, wrong = best_threshold(alarm, hit)
                    sign = 1 if reading in READINGS[2:] else -1
                    rows.append((regime, outcome, reading, int(hit.sum()), area(alarm, hit), sign * threshold, wrong, len(hit)))
    columns = ["regime", "outcome", "reading", "runs_so", "auc", "threshold", "wrong", "runs"]
    return pd.DataFrame(rows, columns=columns).sort_values(["outcome", "regime", "auc"], ascending=[True, True, False])


def area(alarm: np.ndarray, hit: np.ndarray) -> float:
    """Probability that a run that ends so reads more alarming than one that does not, ties half."""
    yes, no = alarm[hit][:, None], alarm[~hit][None, :]
    return float(((yes > no) + 0.5 * (yes == no)).mean())


def best_threshold(alarm: np.ndarray, hit: np.ndarray) -> tuple[float, int]:
    """(t, runs that `alarm >= t` gets wrong) for the best t among the values."""
    found = [(int(((alarm >= t) != hit).sum()), -t) for t in np.unique(alarm)]
    wrong, negative = min(found)
    return -negative, wrong


def markdown(cells: pd.DataFrame, readings: pd.DataFrame) -> str:
    lines = []
    for regime in REGIMES:
        rows = cells[cells["regime"] == regime]
        if not len(rows):
            continue
        lines += [f"### {regime}", "", "| master | moments | bits | held-out loss | ± | gap | max step | kept | verdict |"]
        lines += ["|---|---|---:|---:|---:|---:|---:|---:|---|"]
        for r in rows.to_dict("records"):
            gap = "" if np.isnan(r["gap"]) else f"{100 * r['gap']:+.1f} %"
            sd = "" if np.isnan(r["sd"]) else f"{r['sd']:.3f}"
            b = "**" if r["front"] else ""
            lines.append(
                f"| {b}{r['master']}{b} | {b}{r['state']}{b} | {r['bits']:.1f} | {r['loss']:.3f} | {sd} | {gap} "
                f"| {r['over_bound']:.1f} | {r['update_kept']:.2f} | {r['verdict']} |"
            )
        lines.append("")
    lines += [
        "bits: a weight with its moments. gap: to fp32 / fp32, same seed. max step: largest update over what exact moments"
    ]
    lines += ["allow, kept: slope of the change made on the change asked for, both the worst of the first fifth of the steps."]
    lines += ["Bold: nothing with as few bits is better.", "", "### What shows it beforehand", ""]
    lines += ["| outcome | regime | reading, first fifth | alarm if | area under ROC | wrong |", "|---|---|---|---:|---:|---:|"]
    for r in readings.to_dict("records"):
        side = "≥" if r["reading"] in READINGS[2:] else "≤"
        lines.append(
            f"| {r['outcome']} ({r['runs_so']}) | {r['regime']} | {r['reading']} | {side} {r['threshold']:.3g} "
            f"| {r['auc']:.2f} | {r['wrong']} of {r['runs']} |"
        )
    return "\n".join(lines) + "\n"


def front(cells: pd.DataFrame) -> pd.Series:
    """bool: it learns, and no other cell of the regime that does has at most its bits and a lower loss."""
    learns = cells[cells["verdict"].isin(ORDER[:2])]
    keep = []
    for r in cells.to_dict("records"):
        rivals = learns[(learns["regime"] == r["regime"]) & (learns["bits"] <= r["bits"] + 1e-6)]
        keep.append(r["verdict"] in ORDER[:2] and not (rivals["loss"] < r["loss"]).any())
    return pd.Series(keep, index=cells.index)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or options.folder
    out.mkdir(parents=True, exist_ok=True)
    try:
        found = [runs_of(options.folder / r, r) for r in REGIMES if (options.folder / r).is_dir()]
        if not found:
            raise UserError(
                f"{options.folder}: neither scratch/ nor finetune/ in it; grid.py --out {options.folder} makes them"
            )
        runs = judge(pd.concat(found, ignore_index=True))
    except UserError as e:
        print(f"table.py: {e}", file=sys.stderr)
        return 1
    cells = cells_of(runs)
    cells["front"] = front(cells)
    readings = readings_of(runs)
    cells.to_csv(out / "cells.csv", index=False, float_format="%.6g")
    readings.to_csv(out / "readings.csv", index=False, float_format="%.6g")
    text = markdown(cells, readings)
    (out / "table.md").write_text(text, encoding="utf-8")
    save(cells, out / "trade-off.png")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
