"""Runs as tidy data frames, killed and unfinished ones included. Reads their event files, nothing else.

Records of a kind become rows of a frame, with a `run` column (the folder's name) and the record's `t` (seconds since the
run's start) and `wall` (UTC); columns and units are those of events.py. Numbers are float64 where a value may be unknown (NaN).
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4lab.analysis.records import read_events, read_result, run_folders
from fp4lab.analysis.rows import RESULTS, RunRow, row
from fp4lab.encoding import declared_types

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

_CHUNK = 20_000  # rows turned into a frame at once: bounds what Python's objects take
_FRAMES = {  # frame: (kind of record, fields; None: all of the kind's)
    "starts": ("start", None),
    "phases": ("phase", None),
    "samples": ("sample", None),
    "losses": ("loss", None),
    "diffs": ("first_token_diff", None),
    "layers": ("layer_diff", None),
    "turns": ("turn", None),
    "guards": ("guard", None),
    "files": ("file", None),
}
_OF_TOKEN = ("when", "prompt", "path", "activations", "hidden_nan", "hidden_inf", "logits_nan", "logits_inf")
_OF_HEALTH = ("step", "code_changed", "update_lost", "update_kept", "max_update_over_lr")
_STATES = ("w", "m", "v")


@dataclass(frozen=True)
class Frames:
    """All that `load_runs` found. Every frame has its columns even if it is empty."""

    runs: "pd.DataFrame"  # a row a run: the options it was given (text), then RESULTS
    starts: "pd.DataFrame"  # the manifests
    phases: "pd.DataFrame"
    samples: "pd.DataFrame"
    losses: "pd.DataFrame"
    first_tokens: (
        "pd.DataFrame"  # a row for each of the ten likeliest: rank (0 first), id, logit, text; rank -1: there are none
    )
    diffs: "pd.DataFrame"  # pairs of paths
    layers: "pd.DataFrame"  # hidden states of pairs of paths
    turns: "pd.DataFrame"
    health: "pd.DataFrame"  # of weights and optimizer state; zero_scale_w, saturated_v, ...
    guards: "pd.DataFrame"
    files: "pd.DataFrame"


def load_runs(folder: str | Path) -> Frames:
    """The runs directly below `folder`, or `folder` itself, as frames.

    In `runs`: `loss` is the held-out loss where there was one, else the last training loss; `peak_mib` (2**20 bytes) the
    device's peak where known, else the resident set's (`peak_of` says which); `limit_mib` the guard's limit; `worst_kl` is in
    nats, `faults` counts pairs that are further apart than expected. An option that shares its name with a result is called
    "option NAME". Latencies and `context_tokens` are those of the last turn of a conversation.
    A run that was refused before it had records is a row made of its result.json.
    Raises UserError if there are no runs.
    """
    import pandas as pd

    tables = {name: _Table(kind, fields) for name, (kind, fields) in _FRAMES.items()}
    tables["first_tokens"] = _Table(
        "first_token", _OF_TOKEN, {"rank": "int", "id": "int", "logit": "float", "text": "str"}, _tops
    )
    extra = {f"{what}_{state}": "float" for what in ("zero_scale", "saturated") for state in _STATES}
    tables["health"] = _Table("state_health", _OF_HEALTH, extra, _states)
    by_kind = {table.kind: table for table in tables.values()}
    rows = []
    for run in run_folders(Path(folder)):
        records = read_events(run)
        summed = RunRow()
        ended = any(r["kind"] == "end" and r["peaks"] for r in records[-1:])
        for record in records:
            kind = record["kind"]
            if kind != "sample" or not ended:  # of samples only the peaks count, and the end has them
                summed.add(record)
            if kind in by_kind:
                by_kind[kind].add(run.name, record)
        refused = {} if records else read_result(run)
        rows.append({"run": run.name, **(row(refused) if refused else summed.row())})
    options = dict.fromkeys(name for r in rows for name in r if name not in RESULTS)
    runs = pd.DataFrame(rows, columns=["run", *options, *RESULTS[1:]])
    return Frames(runs=runs, **{name: table.frame() for name, table in tables.items()})


def load_events(folder: str | Path, kind: str | None = None) -> "pd.DataFrame":
    """All records of all runs (of one kind, also of one that has no frame), with a `run` column. Raises UserError."""
    import pandas as pd

    every = ({"run": run.name, **r} for run in run_folders(Path(folder)) for r in read_events(run))
    rows = [r for r in every if kind is None or r["kind"] == kind]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["run", "t", "wall", "kind", *declared_types(kind or "")])


class _Table:
    """Records of one kind on their way to a frame.

    `extra` are further columns with their types; `unfold(record)` gives their values, a tuple for each row of the record.
    """

    def __init__(
        self,
        kind: str,
        fields: Iterable[str] | None,
        extra: dict[str, str] | None = None,
        unfold: Callable[[dict[str, Any]], Iterable[tuple]] | None = None,
    ):
        declared = {k: v for k, v in declared_types(kind).items() if k != "kind"}
        self.kind, self._unfold = kind, unfold
        self._types = {"run": "str", "t": "float", "wall": "str"}
        self._types |= declared if fields is None else {name: declared[name] for name in fields}
        self._get = operator.itemgetter(*list(self._types)[3:])
        self._types |= extra or {}
        self._rows: list[tuple] = []
        self._frames: list[pd.DataFrame] = []

    def add(self, run: str, record: dict[str, Any]) -> None:
        values = (run, record.get("t"), record.get("wall"), *self._get(record))
        if self._unfold is None:
            self._rows.append(values)
        else:
            self._rows += [values + more for more in self._unfold(record)]
        if len(self._rows) >= _CHUNK:
            self._flush()

    def frame(self) -> "pd.DataFrame":
        import pandas as pd

        if self._rows or not self._frames:
            self._flush()
        return self._frames[0] if len(self._frames) == 1 else pd.concat(self._frames, ignore_index=True)

    def _flush(self) -> None:
        import pandas as pd

        columns = list(zip(*self._rows, strict=True)) or [()] * len(self._types)
        named = zip(self._types.items(), columns, strict=True)
        self._frames.append(pd.DataFrame({name: _column(declared, values) for (name, declared), values in named}))
        self._rows = []


def _column(declared: str, values: tuple) -> "np.ndarray | pd.Series":
    """Values as the type they are declared with; as they are where one of them is of another."""
    import numpy as np
    import pandas as pd

    unknown = None in values
    dtype = {"float": "float64", "int": "float64" if unknown else "int64", "bool": "object" if unknown else "bool"}.get(
        declared.split(" ")[0]
    )
    try:
        if dtype is not None:
            return np.array(values, dtype=dtype)
        return pd.Series(values, dtype="object" if "[" in declared or not values else None)
    except (TypeError, ValueError, OverflowError):
        return pd.Series(values, dtype="object")


def _tops(record: dict[str, Any]) -> list[tuple]:
    return [(rank, *top) for rank, top in enumerate(record["top10"])] or [(-1, -1, None, "")]


def _states(record: dict[str, Any]) -> list[tuple]:
    return [tuple(record[what].get(state) for what in ("zero_scale", "saturated") for state in _STATES)]
