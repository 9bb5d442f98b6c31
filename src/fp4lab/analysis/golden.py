"""Golden comparisons: what a task=compare run saw, kept in a file, and held against a later run or another machine's."""

import json
import math
from pathlib import Path
from typing import Any

from fp4lab.analysis.frames import read_events, read_result, run_folders
from fp4lab.errors import UserError

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
    files = [f for f in read_result(runs[0]).get("files") or [] if f["role"] == "weights"]
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

    Tolerance is what the rounding of the compute dtypes explains, of both runs the larger (tasks/tolerance.py).
    Raises UserError for a file that is no golden comparison, or one of other weights or prompts.
    """
    try:
        golden = json.loads(path.read_text(encoding="utf-8"))
        assert golden["schema"] == 1
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
    mine = {(r["prompt"], r["path"]): r for r in now["first_tokens"]}
    for was in golden["first_tokens"]:
        key = was["prompt"], was["path"]
        if key not in mine:
            found.append((*key, "first token", "there", "missing"))
            continue
        found += [(*key, *what) for what in _tokens(was, mine[key], *_rounding(golden, now, was["prompt"]))]
    others = {(r["prompt"], r["pair"]): r for r in now["pairs"]}
    for was in golden["pairs"]:
        is_ = others.get((was["prompt"], was["pair"]))
        if is_ is not None and is_["fault"] != was["fault"]:
            found.append((was["prompt"], was["pair"], "fault", str(was["fault"]), str(is_["fault"])))
    return found


def _rounding(golden: dict[str, Any], now: dict[str, Any], prompt: str) -> tuple[float, float]:
    """(of logits, relative of hidden states) that rounding alone may change: in each run that of its closest pair."""
    both = []
    for run in (golden, now):
        pairs = [p for p in run["pairs"] if p["prompt"] == prompt]
        both.append(min((p["expected_relative"], p["expected_max_abs_logit"]) for p in pairs))
    hidden, logit = max(both)
    return logit, hidden


def _tokens(was: dict[str, Any], now: dict[str, Any], logit: float, hidden: float) -> list[tuple[str, str, str]]:
    if was["prompt_ids"] != now["prompt_ids"]:
        return [("prompt ids", str(was["prompt_ids"]), str(now["prompt_ids"]))]
    out = []
    logits = dict(map(tuple, now["top10"]))
    lowest = min(_number(x) for x in logits.values())
    for rank, (token, value) in enumerate(was["top10"]):
        before, after = _number(value), _number(logits.get(token))
        if token in logits and not abs(after - before) <= logit:
            out.append((f"logit of id {token}", f"{before:.6g}", f"{after:.6g}"))
        elif token not in logits and not before - lowest <= 2 * logit:  # it may have changed places with the eleventh
            out.append((f"id {token}, place {rank + 1}", f"{before:.6g}", "not in the ten likeliest"))
    for layer, (x, y) in enumerate(zip(was["layer_rms"], now["layer_rms"], strict=False)):
        if not abs(_number(y) - _number(x)) <= hidden * abs(_number(x)):
            out.append((f"size of layer {layer}", f"{_number(x):.6g}", f"{_number(y):.6g}"))
            break
    return out


def _plain(x: Any) -> Any:
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def _number(x: Any) -> float:
    return math.nan if x is None else float(x)
