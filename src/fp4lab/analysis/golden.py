"""Golden comparisons: what a task=compare run saw, kept in a file, and held against a later run or another machine's."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4lab.analysis.records import read_events, run_folders
from fp4lab.errors import UserError

_TOKEN = ("prompt", "path", "prompt_ids", "top10", "layer_rms")
_PAIR = ("kl", "max_abs_logit", "fault", "top1_equal", "first_divergent_layer")
_ALLOWED = ("expected_kl", "expected_max_abs_logit", "expected_relative")


def observed(folder: Path) -> dict[str, Any]:
    """First tokens, layer sizes and pair differences of one run with prompts. Raises UserError if it has none."""
    runs = run_folders(folder)
    if len(runs) != 1:
        raise UserError(f"{folder}: {len(runs)} runs; a golden comparison is of one run, give its own folder")
    records = read_events(runs[0])
    tokens = [r for r in records if r["kind"] == "first_token" and r["when"] == "before"]
    pairs = [r for r in records if r["kind"] == "first_token_diff" and r["when"] == "before"]
    if not tokens or not pairs:
        raise UserError(f"{folder}: no first tokens of two paths in it; expected a finished run of task=compare")
    files = [r for r in records if r["kind"] == "file" and r["role"] == "weights"]
    return {
        "schema": 1,
        "weights": [f["sha256"] for f in files],
        "first_tokens": [
            {
                "prompt": r["prompt"],
                "path": r["path"],
                "prompt_ids": r["prompt_ids"],
                "top10": [[i, _plain(x)] for i, x, _ in r["top10"]],
                "layer_rms": [_plain(x) for x in r["layer_rms"]],
            }
            for r in tokens
        ],
        "pairs": [{"prompt": r["prompt"], "pair": r["pair"]} | {k: _plain(r[k]) for k in (*_PAIR, *_ALLOWED)} for r in pairs],
    }


def save(folder: Path, path: Path) -> None:
    """Writes `observed` as JSON, one line a list entry so that changes can be read."""
    seen = observed(folder)
    lists = {k: v for k, v in seen.items() if k in ("first_tokens", "pairs")}
    head = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in seen.items() if k not in lists)
    body = ",\n".join(
        f" {json.dumps(k)}: [\n" + ",\n".join(f"  {json.dumps(x, ensure_ascii=False)}" for x in v) + "\n ]"
        for k, v in lists.items()
    )
    path.write_text(f"{{\n{head},\n{body}\n}}\n", encoding="utf-8")


def differences(folder: Path, path: Path) -> list[tuple[str, str, str, str, str]]:
    """(prompt, path or pair, what, golden, now) of everything beyond tolerance; empty if the run is as it was.

    Tolerance is what the rounding of the compute dtypes explains, of both runs the larger (tasks/tolerance.py): the dtypes may
    differ. But weights=random draws other weights in another dtype.
    Raises UserError for a file that is no golden comparison, or one of other weights or prompts.
    """
    try:
        golden = json.loads(path.read_text(encoding="utf-8"))
        assert golden["schema"] == 1
        assert all(set(_TOKEN) <= set(r) for r in golden["first_tokens"])
        assert all({"prompt", "pair", *_PAIR, *_ALLOWED} <= set(r) for r in golden["pairs"])
    except (OSError, ValueError, KeyError, AssertionError, TypeError) as e:
        raise UserError(
            f"{path}: not a golden comparison ({e!r}); make one with `fp4lab compare RUN --golden {path} --save`"
        ) from e
    now = observed(folder)
    if golden["weights"] != now["weights"]:
        raise UserError(
            f"{path}: made of weights with sha256 {golden['weights']}, {folder} of {now['weights']}; "
            "compare runs of one file, or save it anew"
        )
    found: list[tuple[str, str, str, str, str]] = []
    for group, name, compare in (("first_tokens", "path", _tokens), ("pairs", "pair", _pairs)):
        before = {(r["prompt"], r[name]): r for r in golden[group]}
        after = {(r["prompt"], r[name]): r for r in now[group]}
        for key in before | after:
            if key in before and key in after:
                found += [(*key, *what) for what in compare(before[key], after[key], _rounding(golden, now, key[0]))]
            else:
                found.append((*key, "comparison", *(("there", "missing") if key in before else ("missing", "there"))))
    return found


@dataclass(frozen=True)
class Rounding:
    """What rounding alone may change between two runs."""

    hidden: float  # relative, of hidden states
    logit: float
    kl: float  # nats


def _rounding(golden: dict[str, Any], now: dict[str, Any], prompt: str) -> Rounding:
    """In each run that of its closest pair, and of both runs the larger."""
    both = []
    for run in (golden, now):
        pairs = [p for p in run["pairs"] if p["prompt"] == prompt]
        both.append(
            min(((p["expected_relative"], p["expected_max_abs_logit"], p["expected_kl"]) for p in pairs), default=(0.0,) * 3)
        )
    return Rounding(*max(both))


def _pairs(was: dict[str, Any], now: dict[str, Any], allowed: Rounding) -> list[tuple[str, str, str]]:
    """A pair's numbers may move by what both of its paths may move; the root of a small KL is a distance."""
    out = [(k, str(was[k]), str(now[k])) for k in ("fault",) if was[k] != now[k]]
    for key, tolerance, scale in (("max_abs_logit", 2 * allowed.logit, float), ("kl", 2 * math.sqrt(allowed.kl), _root)):
        x, y = _number(was[key]), _number(now[key])
        if not _near(scale(x), scale(y), tolerance):
            out.append((key, f"{x:.6g}", f"{y:.6g}"))
    return out


def _tokens(was: dict[str, Any], now: dict[str, Any], allowed: Rounding) -> list[tuple[str, str, str]]:
    if was["prompt_ids"] != now["prompt_ids"]:
        return [("prompt ids", str(was["prompt_ids"]), str(now["prompt_ids"]))]
    out, logit = [], allowed.logit
    logits = dict(map(tuple, now["top10"]))
    lowest = min((_number(x) for x in logits.values()), default=math.nan)
    for rank, (token, value) in enumerate(was["top10"]):
        before, after = _number(value), _number(logits.get(token))
        if token in logits and not _near(before, after, logit):
            out.append((f"logit of id {token}", f"{before:.6g}", f"{after:.6g}"))
        elif token not in logits and not before - lowest <= 2 * logit:  # it may have changed places with the eleventh
            out.append((f"id {token}, place {rank + 1}", f"{before:.6g}", "not in the ten likeliest"))
    sizes = [[_number(x) for x in run["layer_rms"]] for run in (was, now)]
    if len(sizes[0]) != len(sizes[1]):
        return [*out, ("layers", str(len(sizes[0])), str(len(sizes[1])))]
    for layer, (x, y) in enumerate(zip(*sizes, strict=True)):
        if not _near(x, y, allowed.hidden * abs(x)):
            out.append((f"size of layer {layer}", f"{x:.6g}", f"{y:.6g}"))
            break  # what follows it follows from it
    return out


def _near(x: float, y: float, tolerance: float) -> bool:
    """A run that was broken is near itself: not-a-number and infinities are equal to their like."""
    return x == y or (math.isnan(x) and math.isnan(y)) or (math.isfinite(x - y) and abs(x - y) <= tolerance)


def _root(x: float) -> float:
    return math.sqrt(x) if x >= 0 else x


def _plain(x: Any) -> Any:
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def _number(x: Any) -> float:
    return math.nan if x is None else float(x)
