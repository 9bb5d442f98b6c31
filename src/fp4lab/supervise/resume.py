"""What earlier attempts left in a run's folder: a result that succeeded, or checkpoints to go on from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp4lab.config import BEFORE, CHECKPOINTS

RESULT = "result.json"


def finished(out_dir: Path, fingerprint: str) -> dict[str, Any] | None:
    """The result of an earlier run in `out_dir` if it ran to its end (or stopped as planned) with this configuration."""
    try:
        result = json.loads((out_dir / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    done = isinstance(result, dict) and result.get("status") in ("completed", "stopped", "goals_missed")
    return result if done and result.get("fingerprint") == fingerprint else None


def attempt(out_dir: Path) -> Path | None:
    """The folder of the last attempt that left a checkpoint: `out_dir`, or one that was set aside in it."""
    return next((f for f in (out_dir, *reversed(_attempts(out_dir))) if any(_checkpoints(f))), None)


def set_aside(out_dir: Path, names: Sequence[str]) -> Path:
    """Moves what the last attempt left in `out_dir` into a folder of its own there, which is returned.

    The checkpoints move last: as long as they are in `out_dir`, a move that was itself cut off is taken up again.
    """
    earlier = _attempts(out_dir)
    cut_off = bool(earlier) and not (earlier[-1] / CHECKPOINTS).is_dir()
    folder = earlier[-1] if cut_off else out_dir / f"{BEFORE}{len(earlier) + 1}"
    folder.mkdir(exist_ok=True)
    for name in (*names, CHECKPOINTS):
        if (out_dir / name).exists():
            (out_dir / name).rename(folder / name)
    return folder


def _attempts(out_dir: Path) -> list[Path]:
    found = [p for p in out_dir.glob(f"{BEFORE}*") if p.name.removeprefix(BEFORE).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(BEFORE)))


def _checkpoints(folder: Path) -> list[Path]:
    return list((folder / CHECKPOINTS).glob("step-*.safetensors"))
