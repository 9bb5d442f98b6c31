"""Between Hydra and the supervisor: one composed config in, one supervised run out. No torch."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fp4lab.choices import check
from fp4lab.config import CHECKPOINTS, fingerprint, to_dict
from fp4lab.encoding import EVENTS
from fp4lab.errors import UserError
from fp4lab.events import STATUSES
from fp4lab.supervise.client import server
from fp4lab.supervise.resume import RESULT, attempt, finished, set_aside
from fp4lab.supervise.run import LOG, refused, supervise
from fp4lab.tracking.base import Tracker
from fp4lab.tracking.chatlog import LINES, TEXT, ChatLog
from fp4lab.tracking.console import ConsoleTracker
from fp4lab.tracking.jsonl import JsonlTracker

_codes: list[int] = []
_CLOCKS_S = 2.0  # by which another machine's clock may be behind


def job(cfg: Any) -> float | None:
    """Runs one composed configuration and returns its loss, for sweepers that minimise something.

    A run that fails becomes a row of the sweep: nothing but an interruption of ourselves is raised.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    config = to_dict(cfg)
    overrides = list(hydra.overrides.task)
    multirun = hydra.mode is not None and hydra.mode.name == "MULTIRUN"
    out_dir = Path(hydra.runtime.output_dir)
    sweep_dir = Path(hydra.sweep.dir) if multirun else None
    choices = {k: str(v) for k, v in hydra.runtime.choices.items() if not k.startswith("hydra/")}
    title = f"{out_dir.parent.name}/{out_dir.name}" if multirun else out_dir.name
    title += f"  {' '.join(overrides)}" if overrides else ""
    try:
        check(config)
        if config["dry_run"]:
            print(f"would run {title}")
            _remove_empty(out_dir)
            return None
        done = finished(out_dir, fingerprint(config)) if config["sweep"]["resume"] else None
        if done is not None:
            print(f"{title}\n  skipped: already {done['status']} with this configuration")
            _codes.append(STATUSES[done["status"]])
            return done["loss"]
        left = attempt(out_dir)
        if left is not None and not config["sweep"]["resume"]:  # nothing here is touched, not even by a result
            print(f"{title}\n  refused: {_occupied(out_dir, left)}", file=sys.stderr)
            _codes.append(STATUSES["failed"])
            return None
        if left is not None and config["task"]["name"] == "tune":
            left = set_aside(out_dir, (EVENTS, RESULT, LOG, TEXT, LINES)) if left == out_dir else left
            config["task"]["resume"] = str(left)
        server()  # its imports overlap with what follows
        trackers = _trackers(config, out_dir, sweep_dir, choices, title)
        result = supervise(config, out_dir, overrides=overrides, choices=choices, trackers=trackers)
    except UserError as e:
        print(f"{title}\n  refused: {e}", file=sys.stderr)
        result = refused(config, out_dir, overrides, choices, str(e))
    _codes.append(STATUSES[result["status"]])
    return result["loss"]


def exit_code() -> int:
    """0 if every run completed or stopped as planned, else the code of the first that did not."""
    return next((c for c in _codes if c), 0)


class CodesFromElsewhere(Callback):
    """Named in conf/config.yaml. A launcher of other processes (joblib, submitit) leaves us the results, and no codes."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.began = time.time()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if not _codes:
            _codes.extend(codes_in(Path(config.hydra.sweep.dir), self.began))


def codes_in(folder: Path, since: float) -> list[int]:
    """The codes of the runs below `folder` that ended after `since` (seconds of the epoch), by name."""
    paths = [p for p in sorted(folder.rglob(RESULT)) if p.stat().st_mtime >= since - _CLOCKS_S]
    return [STATUSES[json.loads(p.read_text(encoding="utf-8"))["status"]] for p in paths]


def _occupied(out_dir: Path, left: Path) -> str:
    return (
        f"{left / CHECKPOINTS} has what an earlier run goes on from; sweep.resume=true does, or give another hydra.run.dir "
        f"(and task.resume={left}), or remove {out_dir}"
    )


def _trackers(
    config: dict[str, Any], out_dir: Path, sweep_dir: Path | None, choices: dict[str, str], title: str
) -> list[Tracker]:
    trackers: list[Tracker] = [JsonlTracker(out_dir / EVENTS), ChatLog(out_dir), ConsoleTracker(title)]
    if config["tracker"]["name"] != "off":
        from fp4lab.analysis.rows import RunRow
        from fp4lab.tracking.wandb import WandbTracker
        from fp4lab.tracking.wandb_view import options

        told = options(config, choices, out_dir.name, sweep_dir.name if sweep_dir else None)
        trackers.append(WandbTracker(sweep_dir or out_dir, config["tracker"]["name"], told, RunRow()))
    return trackers


def _remove_empty(out_dir: Path) -> None:
    """A dry run leaves nothing: Hydra has made the folder and its .hydra before we are called."""
    for path in sorted((out_dir / ".hydra").glob("*")):
        path.unlink()
    for folder in (out_dir / ".hydra", out_dir):
        if folder.is_dir() and not os.listdir(folder):
            folder.rmdir()
