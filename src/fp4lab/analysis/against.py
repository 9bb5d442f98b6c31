"""Two sweeps run by run: what is different beyond tolerance. For two choices, two machines or two commits."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp4lab.analysis.rows import RESULTS
from fp4lab.analysis.select import column, missing
from fp4lab.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

EXACT = ("status", "first_token", "faults")  # compared where both runs know them
TOLERANCES = {"loss": 1e-3, "peak_mib": 0.05}  # relative, by default
_OF_PLACE = ("hydra.", "tracker", "sweep.")  # options that say where a run's records go, not what it is


@dataclass(frozen=True)
class Difference:
    run: str  # in the sweep, and in the other
    options: str
    what: str
    was: Any
    now: Any
    tolerance: float | None = None

    @property
    def change(self) -> float | None:
        """Relative, where both are finite numbers and the old one is not 0."""
        both = [x for x in (self.was, self.now) if isinstance(x, int | float) and math.isfinite(x)]
        return (both[1] - both[0]) / abs(both[0]) if len(both) == 2 and both[0] else None


def tolerances(given: list[str], runs: "pd.DataFrame") -> dict[str, float]:
    """TOLERANCES with `given` ("seconds=0.2", "loss=off") on top. Raises UserError."""
    found = dict(TOLERANCES)
    for text in given:
        name, _, value = text.partition("=")
        name = column(runs, name)
        if name not in RESULTS or name == "run":
            raise UserError(f"--tolerance {text}: {name} is an option of the runs, not a result")
        if value == "off":
            found.pop(name, None)
            continue
        try:
            found[name] = float(value)
            assert found[name] >= 0
        except (ValueError, AssertionError):
            raise UserError(f"--tolerance {text}: expected a number of at least 0 (0.05 is 5 %) or off") from None
    return found


def compare_sweeps(now: "pd.DataFrame", was: "pd.DataFrame", tolerance: dict[str, float]) -> tuple[int, list[Difference]]:
    """How many runs were compared, and what differs.

    Runs belong together whose swept options are the same; those that have the same options in their order. A number
    differs if it moved by more than its tolerance, relative to `was`, up or down; EXACT results if they are not equal.
    """
    keys = _keys(now, was)
    after, before = _by_options(now, keys), _by_options(was, keys)
    found, count = [], 0
    for key in dict.fromkeys([*before, *after]):
        options = " ".join(f"{k.removeprefix('option ')}={v}" for k, v in zip(keys, key[:-1], strict=True) if v)
        x, y = before.get(key), after.get(key)
        if x is None or y is None:
            there, absent = ("there", "missing") if y is None else ("missing", "there")
            found.append(Difference(str((x or y)["run"]), options, "run", there, absent))  # type: ignore[index]
            continue
        count += 1
        run = str(y["run"]) if x["run"] == y["run"] else f"{y['run']} ({x['run']})"
        for name in EXACT:
            if not missing(x[name]) and not missing(y[name]) and x[name] != y[name]:
                found.append(Difference(run, options, name, x[name], y[name]))
        for name, allowed in tolerance.items():
            if not _near(x[name], y[name], allowed):
                found.append(Difference(run, options, name, x[name], y[name], allowed))
    return count, found


def shared_differences(now: "pd.DataFrame", was: "pd.DataFrame") -> dict[str, tuple[str, str]]:
    """Options that each sweep holds fixed, at different values: option -> (was, now); "" where it is not given."""
    both = [{c: str(runs[c].iloc[0]) for c in _options(runs) if runs[c].nunique(dropna=False) == 1} for runs in (was, now)]
    names = {**both[0], **both[1]}
    swept = set(_keys(now, was))
    pairs = {k: (both[0].get(k, ""), both[1].get(k, "")) for k in names if k not in swept}
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}


def _options(runs: "pd.DataFrame") -> list[str]:
    return [c for c in runs.columns if c not in RESULTS and not c.startswith(_OF_PLACE)]


def _keys(now: "pd.DataFrame", was: "pd.DataFrame") -> list[str]:
    """What varies within either sweep."""
    return list(dict.fromkeys(c for runs in (was, now) for c in _options(runs) if runs[c].nunique(dropna=False) > 1))


def _by_options(runs: "pd.DataFrame", keys: list[str]) -> dict[tuple, dict[str, Any]]:
    """Values of `keys` and the how-manieth run that has them -> row."""
    found, seen = {}, Counter[tuple]()
    for row in runs.to_dict("records"):
        key = tuple("" if missing(row.get(k)) else str(row[k]) for k in keys)
        found[(*key, seen[key])] = row
        seen[key] += 1
    return found


def _near(was: Any, now: Any, allowed: float) -> bool:
    if missing(was) or missing(now):
        return missing(was) and missing(now)
    try:
        return was == now or abs(now - was) <= allowed * abs(was)
    except TypeError:
        return False
