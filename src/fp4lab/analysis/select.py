"""Which runs, in which order: the --filter and --sort of `fp4lab compare`."""

import re
from typing import TYPE_CHECKING, Any

from fp4lab.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

_FILTER = re.compile(r"\s*(.+?)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*")


def column(runs: "pd.DataFrame", name: str) -> str:
    """The column of `runs` that `name` means: its own name, or the end of an option's. Raises UserError."""
    if name in runs.columns:
        return name
    found = [c for c in runs.columns if c.rpartition(".")[2].removeprefix("option ") == name]
    if len(found) == 1:
        return found[0]
    problem = f"is more than one column ({', '.join(found)})" if found else "no such column"
    raise UserError(f"{name}: {problem}; expected one of {', '.join(runs.columns)}")


def filtered(runs: "pd.DataFrame", filters: list[str]) -> "pd.DataFrame":
    """The runs that pass all of `filters`, e.g. "status=completed", "peak_mib<300", "seq_len!=8".

    Numbers are compared as numbers, "1e-4" and "0.0001" are equal. A run without a value passes "!=" alone.
    Raises UserError for a filter that is none, names no column, or orders what is no number.
    """
    for given in filters:
        parsed = _FILTER.fullmatch(given)
        if parsed is None:
            raise UserError(f"--filter {given}: expected COLUMN, one of = != < <= > >=, and a value, e.g. peak_mib<300")
        name, operator, value = parsed.groups()
        wanted = number(value)
        if wanted is None and operator not in ("=", "!="):
            raise UserError(f"--filter {given}: {operator} compares numbers, and {value!r} is none")
        values = runs[column(runs, name)]
        runs = runs[[_passes(x, operator, value, wanted) for x in values]]
    return runs.reset_index(drop=True)


def ordered(runs: "pd.DataFrame", by: list[str]) -> "pd.DataFrame":
    """Sorted by columns, the first named first; "-NAME" from the largest. Numbers before text, runs without a value last."""
    for name in reversed(by):
        values = list(runs[column(runs, name.removeprefix("-"))])
        known = [i for i, x in enumerate(values) if not missing(x)]
        known.sort(key=lambda i: _rank(values[i]), reverse=name.startswith("-"))
        runs = runs.iloc[known + [i for i, x in enumerate(values) if missing(x)]].reset_index(drop=True)
    return runs


def number(x: Any) -> float | None:
    """The number that `x` is or says; None if it is none."""
    if isinstance(x, bool):
        return None
    try:
        return float(x)
    except (TypeError, ValueError):
        return None


def missing(x: Any) -> bool:
    """Unknown, in a frame: None or not a number."""
    return x is None or (isinstance(x, float) and x != x)


def _rank(x: Any) -> tuple[bool, float, str]:
    value = number(x)
    return (value is None, value or 0.0, str(x) if value is None else "")


def _passes(x: Any, operator: str, value: str, wanted: float | None) -> bool:
    if missing(x):
        return operator == "!="
    have = number(x)
    if wanted is None or have is None:
        return {"=": str(x) == value, "!=": str(x) != value}.get(operator, False)
    return {
        "=": have == wanted,
        "!=": have != wanted,
        "<": have < wanted,
        "<=": have <= wanted,
        ">": have > wanted,
        ">=": have >= wanted,
    }[operator]
