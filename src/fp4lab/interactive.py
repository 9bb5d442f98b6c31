"""`fp4lab chat`: a terminal or a pipe against a model, in one process; recorded like a run, guarded only by `fp4lab guard`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fp4lab.choices import check
from fp4lab.config import register, to_dict
from fp4lab.encoding import EVENTS
from fp4lab.errors import Collapsed, UserError
from fp4lab.events import STATUSES
from fp4lab.supervise.ledger import Ledger
from fp4lab.tracking.chatlog import ChatLog
from fp4lab.tracking.jsonl import JsonlTracker


def compose(overrides: list[str], conf: Path) -> dict[str, Any]:
    """The plain config of `conf` (a folder) with `overrides`, as a run would get it. Raises UserError."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if not (conf / "config.yaml").is_file():
        raise UserError(f"{conf.resolve()}: no config.yaml there; start this in the repository's top folder")
    register()
    try:
        with hydra.initialize_config_dir(str(conf.resolve()), version_base="1.3"):
            config = to_dict(hydra.compose("config", overrides=overrides))
    except (HydraException, OmegaConfBaseException) as e:
        raise UserError(f"{' '.join(overrides)}: {e}") from e
    check(config)
    return config


def talk(config: dict[str, Any], out_dir: Path) -> int:
    """Standard input against a model, in this process. Returns the exit code; everything is recorded in `out_dir`."""
    ledger = Ledger(config, out_dir, [], [JsonlTracker(out_dir / EVENTS), ChatLog(out_dir)])
    prompt = "> " if sys.stdin.isatty() else ""
    status, reason = "completed", ""
    try:
        from fp4lab.tasks import converse

        def write(text: str) -> None:
            print(text, end="", flush=True)

        converse.converse({**config, "out_dir": str(out_dir)}, _lines(prompt), write, ledger.emit)
    except Collapsed as e:
        status, reason = "collapsed", str(e)
    except KeyboardInterrupt:
        status, reason = "interrupted", "Ctrl-C"
    except UserError as e:
        status, reason = "failed", str(e)
    ledger.close(status, reason)
    print(f"{f'{status}: {reason}; ' if reason else ''}records in {out_dir}", file=sys.stderr)
    return STATUSES[status]


def _lines(prompt: str) -> Iterator[str]:
    """Of standard input, until it ends."""
    while True:
        if prompt:
            print(prompt, end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line
