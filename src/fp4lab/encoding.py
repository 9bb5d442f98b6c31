"""Records as JSON lines and back.

JSON has no NaN: a non-finite float is written as "nan", "inf" or "-inf" and read back as the float.
"""

import dataclasses
import functools
import json
import math
from typing import Any

from fp4lab.events import KINDS

EVENTS = "events.jsonl"  # in a run's folder
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def encode(record: dict[str, Any]) -> str:
    """One JSON line, without the newline."""
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False)


def decode(line: str) -> dict[str, Any]:
    """The record of one line; "nan", "inf" and "-inf" of fields typed as float become floats again.

    Raises ValueError for a line that is not a JSON object with a `kind`.
    """
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError(f"expected a JSON object with a 'kind', got: {line[:80]!r}")
    return revive(record) if any(f'"{word}"' in line for word in _SPECIAL) else record


@functools.cache
def declared_types(kind: str) -> dict[str, str]:
    """Field: its type as written in this file. Empty for a kind that this version does not know."""
    cls = KINDS.get(kind)
    return {f.name: str(f.type) for f in dataclasses.fields(cls)} if cls else {}  # type: ignore[arg-type]


@functools.cache
def defaults(kind: str) -> dict[str, Any]:
    """Field: what it means for a record of an older version to lack it. Not to be changed."""
    cls = KINDS.get(kind)
    return dataclasses.asdict(cls()) if cls else {}  # type: ignore[call-overload]


def revive(record: dict[str, Any]) -> dict[str, Any]:
    """The record with "nan", "inf" and "-inf" as floats again where its kind says float."""
    fields = declared_types(record["kind"])
    for name, value in record.items():
        declared = fields.get(name, "")
        if isinstance(value, str) and value in _SPECIAL and "float" in declared and "str" not in declared:
            record[name] = _SPECIAL[value]
        elif isinstance(value, dict) and "float" in declared:
            record[name] = {k: _SPECIAL.get(v, v) if isinstance(v, str) else v for k, v in value.items()}
        elif declared.startswith("list[float]") and isinstance(value, list):
            record[name] = [_SPECIAL.get(x, x) if isinstance(x, str) else x for x in value]
        elif name == "top10" and isinstance(value, list):
            record[name] = [[i, _SPECIAL.get(x, x) if isinstance(x, str) else x, s] for i, x, s in value]
    return record
