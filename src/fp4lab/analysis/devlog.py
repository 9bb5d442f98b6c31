"""The reference log's rows beside what runs of this machine say: reproduced, better, worse, or not to be had here.

experiments/devlog.csv has the rows, experiments/devlog/*.yaml one comparison each: which runs answer which row, what the log
saw (`saw`: a measure and its value), what is better (`right`), which figure is better when smaller (`less`: a measure and the
log's figure; null takes the row's column of that name), why it is judged on Qwen3-4B alone (`only`), and why a row cannot be
had (`else`, `absent`) or where it is (`see`).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4lab.analysis.frames import read_events, run_folders
from fp4lab.analysis.measures import MEASURES, Run, Value
from fp4lab.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

EXPERIMENTS = Path("experiments")
LOGS_MODEL = "qwen3_4b"  # figures of other models are shown and not judged
ELSEWHERE = "not reproducible here"
NEAR = 1.1  # a figure within this factor of the log's is reproduced
VERDICTS = ("reproduced", "better", "worse", "different", ELSEWHERE, "answered elsewhere", "not run")
_WORSE = VERDICTS[:4]  # the worst of several findings is the row's
_ROW_KEYS = {"run", "saw", "right", "less", "only", "else", "absent", "see"}


@dataclass(frozen=True)
class Comparison:
    """One file of experiments/devlog. `gpu`: overrides for Qwen3-4B; `scale`: option: its factor on the shipped model."""

    name: str
    question: str
    rows: dict[str, dict[str, Any]]
    command: str = ""
    gpu: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    scale: dict[str, float] = field(default_factory=dict)
    calibrate: dict[str, Any] = field(default_factory=dict)

    @property
    def experiment(self) -> str:
        return f"devlog_{self.name}"


@dataclass(frozen=True)
class Finding:
    """One row of the log beside this machine."""

    id: str
    verdict: str
    here: str  # what was seen
    why: str = ""
    comparison: str = ""
    runs: str = ""  # folders


def log_rows(path: Path = EXPERIMENTS / "devlog.csv") -> "pd.DataFrame":
    """The log, a row an entry, index `id`; numeric columns are floats (MiB of 2**20 bytes), empty where it has no figure."""
    import pandas as pd

    if not path.is_file():
        raise UserError(f"{path}: no such file; it comes with the repository, so run this in the repository's folder")
    return pd.read_csv(path).set_index("id")


def catalogue(folder: Path = EXPERIMENTS / "devlog") -> list[Comparison]:
    """The comparisons by name. Raises UserError for a key or a measure that does not exist."""
    import yaml

    found = []
    allowed = {f.name for f in fields(Comparison)} - {"name"}
    for path in sorted(folder.glob("*.yaml")):
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        _known(path, "key", set(data), allowed)
        for id, row in data["rows"].items():
            _known(path, f"{id}: key", set(row), _ROW_KEYS)
            used = {name for key in ("saw", "right", "less") for name in row.get(key, {})}
            _known(path, f"{id}: measure", used, set(MEASURES))
        found.append(Comparison(name=path.stem, **data))
    if not found:
        raise UserError(f"{folder}: no comparisons; run this in the repository's folder")
    return found


def _known(path: Path, what: str, names: set[str], allowed: set[str]) -> None:
    if names - allowed:
        raise UserError(f"{path}: {what} {sorted(names - allowed)[0]}: expected one of {', '.join(sorted(allowed))}")


def load(folders: Iterable[Path]) -> list[Run]:
    """Runs of devlog experiments below the folders, at any depth of one or two. Raises UserError if there are none."""
    found = []
    folders = list(folders)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; expected results of experiments/run_devlog.py, or a sweep's")
        for sweep in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
            try:
                found += [run for path in run_folders(sweep) if (run := _run(path)) is not None]
            except UserError:  # a folder without runs, e.g. the one that holds sweeps
                continue
    runs = list({run.folder: run for run in found}.values())
    if not runs:
        shown = ", ".join(map(str, folders))
        raise UserError(f"{shown}: no runs of +experiment=devlog_*; make some with python experiments/run_devlog.py --out DIR")
    return runs


def _run(folder: Path) -> Run | None:
    records = read_events(folder)
    start = next((r for r in records if r["kind"] == "start"), None)
    if start is None:
        return None
    options = dict(o.lstrip("+").split("=", 1) for o in start["overrides"] if "=" in o)
    name = options.get("experiment", "")
    if not name.startswith("devlog_"):
        return None
    return Run(str(folder), name, {k: v.lower() for k, v in options.items()}, records)


def findings(runs: Sequence[Run], comparisons: Sequence[Comparison], rows: "pd.DataFrame") -> list[Finding]:
    """One for each row of the log, in its order; of several comparisons the first that ran counts."""
    found: dict[str, Finding] = {}
    for c in comparisons:
        mine = [r for r in runs if r.experiment == c.experiment]
        for id, row in c.rows.items():
            if id not in rows.index:
                raise UserError(f"experiments/devlog/{c.name}.yaml: {id} is no row of devlog.csv")
            new = judge(id, row, [r for r in mine if answers(r, row, c.scale)], rows.loc[id], c)
            if id not in found or found[id].verdict == "not run":
                found[id] = new
    return [found.get(id, Finding(id, "not run", "")) for id in rows.index]


def answers(run: Run, row: dict[str, Any], scale: dict[str, float]) -> bool:
    """Whether a run is one of those that a row names; `scale` holds for models other than the log's."""
    if run.model == LOGS_MODEL:
        scale = {}
    return all(_same(run.options.get(k), v, scale.get(k, 1)) for k, v in row.get("run", {}).items())


def _same(given: str | None, wanted: Any, factor: float) -> bool:
    if given is None:
        return False
    try:
        return float(given) == float(wanted) * factor
    except ValueError:
        return given == str(wanted).lower()


def judge(id: str, row: dict[str, Any], runs: Sequence[Run], log: Any, c: Comparison) -> Finding:
    """The verdict on one row. `log`: its line of the table."""
    for key, verdict in (("absent", ELSEWHERE), ("see", "answered elsewhere")):
        if key in row:
            return Finding(id, verdict, "", row[key], c.name)
    if not runs:
        return Finding(id, "not run", "", f"no run of {c.experiment} with {_shown_options(row['run'])}", c.name)
    verdicts, said = _compare(row, runs, log)
    verdict, why = max(verdicts, key=_WORSE.index, default=ELSEWHERE), ""
    other_model = any(r.model != LOGS_MODEL for r in runs)
    if other_model and "only" in row:
        verdict, why = ELSEWHERE, f"judged on Qwen3-4B alone: {row['only']}"
    elif not verdicts:
        ended = ", ".join(sorted({r.status for r in runs}))
        why = "a figure of Qwen3-4B" if other_model else f"the runs ended before ({ended})"
    elif verdict == "different" and "else" in row:
        verdict, why = ELSEWHERE, row["else"]
    return Finding(id, verdict, "; ".join(said), why, c.name, ", ".join(r.folder for r in runs))


def _compare(row: dict[str, Any], runs: Sequence[Run], log: Any) -> tuple[list[str], list[str]]:
    """A verdict for each claim and figure that can be judged, and words for each that can be shown."""
    verdicts, said = [], []
    for name, saw in row.get("saw", {}).items():
        here, right = _over(runs, name), row.get("right", {}).get(name)
        if here is None:
            said.append(f"{name} not known ({', '.join(sorted({r.status for r in runs}))})")
            continue
        verdicts.append("reproduced" if here == saw else "better" if here == right else "different")
        said.append(_words(name, here) + (f" (log: {_words(name, saw)})" if here != saw else ""))
    for name, figure in row.get("less", {}).items():
        here, there = _over(runs, name), float(log[name] if figure is None else figure)
        if here is None:
            continue
        if any(r.model != LOGS_MODEL for r in runs):
            said.append(f"{_figure(name, here)} on the {runs[0].model} model")
            continue
        verdict, relation = _held_against(float(here), there)
        verdicts.append(verdict)
        said.append(f"{_figure(name, here)} (log: {_figure(name, there)}; {relation})")
    return verdicts, said


def _held_against(here: float, there: float) -> tuple[str, str]:
    """The verdict on a figure that is better when smaller, and by how much."""
    if here * NEAR < there:
        return "better", f"{there / here:.1f} times less" if here else "none"
    if here > there * NEAR:
        return "worse", f"{here / there:.1f} times more"
    return "reproduced", "as there"


def _over(runs: Sequence[Run], name: str) -> Value:
    """A measure over all runs that answer: true if it is of any, the largest of numbers; None if none knows."""
    known = [v for run in runs if (v := MEASURES[name](run)) is not None]
    if not known:
        return None
    return any(known) if isinstance(known[0], bool) else max(known)


_WORDS = {
    "died": ("killed or out of memory", "ran to its end"),
    "stopped": ("stopped as planned, records kept", "did not stop as planned"),
    "diverged": ("loss not a number", "loss finite"),
    "a_finite": ("A finite", "A not a number"),
    "b_finite": ("B finite", "B not a number"),
    "c_finite": ("C finite", "C not a number"),
    "a_equals_b": ("A = B", "A differs from B"),
    "a_equals_c": ("A = C", "A differs from C"),
    "cache_is_context": ("cache length = context after each turn", "cache and context differ"),
    "later_turns_slower": ("later turns slower than the first", "later turns no slower than the first"),
    "stalled": ("a turn of 3 times the median", "no turn of 3 times the median"),
    "compaction_returns": ("compaction holds or returns memory", "compaction takes memory"),
    "codes_moved": ("stored codes moved", "not one stored code moved"),
    "guard_blind": ("the guard had no reading", "the guard had readings"),
    "passed_limit": ("above its limit", "never above its limit"),
}


def _words(name: str, value: Value) -> str:
    if name in _WORDS:
        return _WORDS[name][0 if value else 1]
    return f"B parts from C at layer {value}"


_FIGURES = {
    "peak_mib": "peak",
    "model_loaded_mib": "loaded",
    "compacted_mib": "compacted",
    "backward_mib": "after backward",
    "step_mib": "after the step",
    "packed_state_mib": "packed w, m, v",
    "step_ms": "step",
    "slowest_turn_s": "slowest turn",
}


def _figure(name: str, value: Value) -> str:
    number = float(value or 0.0)
    if name.endswith("_mib"):
        return f"{_FIGURES[name]} {number:,.0f} MiB"
    return f"{_FIGURES[name]} {number / 1e3 if name.endswith('_ms') else number:.3g} s"


def _shown_options(options: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in options.items())


def machine(runs: Sequence[Run]) -> str:
    """One line: models, torch, device and date of the runs."""
    models = sorted({r.model for r in runs})
    start = runs[0].of("start")[0]
    total = next((r["cuda_total_mib"] for run in runs for r in run.of("phase") if r.get("cuda_total_mib")), None)
    device = f"a GPU of {total:,.0f} MiB" if total else f"{start['host'].get('cores', '?')} CPU cores"
    days = sorted({r.of("start")[0]["wall"][:10] for r in runs})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{', '.join(models)} on {device}, torch {start['versions'].get('torch', '?')}, {len(runs)} runs, {span}"


def as_json(found: Sequence[Finding]) -> str:
    """The findings as JSON, a list of objects."""
    return json.dumps([vars(f) for f in found], ensure_ascii=False, indent=1)
