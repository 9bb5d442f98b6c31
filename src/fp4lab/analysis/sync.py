"""`fp4lab sync`: event files into wandb, for runs that were tracked off or killed before wandb had their data.

Makes offline runs; sending them anywhere is `wandb sync`. Doing it again changes nothing: a run goes by the id of its start.
"""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fp4lab.analysis.records import read_events, run_folders
from fp4lab.analysis.report import write_report
from fp4lab.analysis.rows import RunRow
from fp4lab.encoding import EVENTS
from fp4lab.errors import UserError
from fp4lab.events import STATUSES
from fp4lab.supervise import registry
from fp4lab.tracking.wandb_file import finished
from fp4lab.tracking.wandb_view import View, options, start

WAIT_S = 20.0  # wandb's own process writes on for a moment after it has said that it is done
_REPLACED = "replaced-"
_PROJECT = "fp4lab"  # of records that do not say it


def sync(folder: Path) -> Iterator[tuple[str, str]]:
    """(run, what was done) for every run below `folder`, and at last for the report as an artifact. Raises UserError."""
    runs = run_folders(folder)
    sweep = runs != [folder]
    # A run of a sweep has its wandb files where the sweep has them, as when it was tracked.
    inside = not sweep and (folder.resolve().parent / "multirun.yaml").is_file()
    home = folder.resolve().parent if inside else folder
    name = home.resolve().name if sweep or inside else None
    working = {e.out_dir for e in registry.entries() if not e.abandoned}
    projects = []
    for run in runs:
        records = read_events(run)
        if not records:
            yield run.name, "has no records: it was refused before it began"
        elif str(run.resolve()) in working:
            yield run.name, "is still running"
        else:
            first = records[0] if records[0]["kind"] == "start" else {}
            projects.append(_config(first)["tracker"]["project"])
            yield run.name, _replay(home, run, first, records, name)
    if projects and not inside:
        yield "report", _report(folder, home, projects[0], folder.resolve().name)


def _replay(home: Path, run: Path, first: dict[str, Any], records: list[dict[str, Any]], sweep: str | None) -> str:
    run_id = first.get("run_id") or _digest((run / EVENTS).read_bytes().split(b"\n", 1)[0])[:8]
    there = _files(home, run_id)
    if any(finished(path) for path in there):
        return "is there already"
    for path in there:  # broken off; all that it has is in the events too
        path.parent.rename(path.parent.with_name(_REPLACED + path.parent.name))
    sums = RunRow()
    told = options(_config(first), first.get("choices") or {}, run.name, sweep)
    with start(home, "offline", run_id, told) as wandb_run:
        view = View(wandb_run)
        for record in records:
            view.record(record)
            sums.add(record)
        row = sums.row()
        wandb_run.summary.update({"status": row["status"], "reason": row["reason"]})
        view.close(sums.results())
        wandb_run.finish(exit_code=STATUSES.get(row["status"], STATUSES["failed"]))
    return _written(home, run_id)


def _report(folder: Path, home: Path, project: str, name: str) -> str:
    """report.html as an artifact of a run of its own, in the sweep's group."""
    import wandb

    path = write_report(folder)
    run_id = "report-" + _digest(path.read_bytes())[:12]
    if any(finished(p) for p in _files(home, run_id)):
        return "is there already"
    told = {"project": project, "name": f"{name}/report", "group": name, "job_type": "report"}
    with start(home, "offline", run_id, told) as run:
        artifact = wandb.Artifact(f"report-{name}", type="report")
        artifact.add_file(str(path))
        run.log_artifact(artifact)
        run.log({"report": wandb.Html(path.read_text(encoding="utf-8"), inject=False)})
    return _written(home, run_id)


def _config(first: dict[str, Any]) -> dict[str, Any]:
    """The configuration in the records, with what records of an older version or of another command lack."""
    config = first.get("config") or {}
    return {
        **config,
        "tracker": {"project": _PROJECT, **config.get("tracker", {})},
        "task": {"name": "", **config.get("task", {})},
    }


def _files(home: Path, run_id: str) -> list[Path]:
    """Of the run `run_id`, offline or online; not those that were replaced."""
    found = (home / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb")
    return sorted(p for p in found if not p.parent.name.startswith(_REPLACED))


def _written(home: Path, run_id: str) -> str:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        for path in filter(finished, _files(home, run_id)):
            return f"written to {path.parent}"
        time.sleep(0.05)
    raise UserError(f"{home / 'wandb'}: wandb did not finish writing run {run_id} within {WAIT_S:g} s; run fp4lab sync again")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
