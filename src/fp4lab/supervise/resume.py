"""Which runs are done: a result that succeeded, for the same configuration."""

import json
from pathlib import Path
from typing import Any

RESULT = "result.json"


def finished(out_dir: Path, fingerprint: str) -> dict[str, Any] | None:
    """The result of an earlier run in `out_dir` if it completed (or stopped as planned) with this configuration."""
    try:
        result = json.loads((out_dir / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    done = isinstance(result, dict) and result.get("status") in ("completed", "stopped")
    return result if done and result.get("fingerprint") == fingerprint else None
