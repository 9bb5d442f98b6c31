"""What a run was made of: versions, source, host."""

import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("fp4lab", "torch", "hydra-core", "omegaconf", "tokenizers", "safetensors", "wandb", "triton")


@functools.cache
def manifest() -> dict[str, Any]:
    """Fields of the Start event. Read once a process; nothing is imported for it."""
    return {"versions": _versions(), "host": _host(), **_git()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _host() -> dict[str, Any]:
    return {"machine": platform.machine(), "system": platform.platform(), "cores": os.cpu_count()}


def _git() -> dict[str, Any]:
    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=5, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if commit is None:
        return {"git_commit": None, "git_dirty": None}
    changes = ask("status", "--porcelain", "--untracked-files=no")
    return {"git_commit": commit, "git_dirty": None if changes is None else bool(changes)}
