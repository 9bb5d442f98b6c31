"""What a run was made of: versions, source, host, and the id it goes by."""

import functools
import os
import platform
import re
import secrets
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("fp4lab", "torch", "hydra-core", "omegaconf", "tokenizers", "safetensors", "wandb", "triton")
DIFF_BYTES = 32 << 10  # of uncommitted changes; it is in the records of every run of a sweep


def run_id() -> str:
    """Of the run that starts now. A wandb agent has chosen it for the first run of this process; another run gets its own."""
    return os.environ.pop("WANDB_RUN_ID", "") or secrets.token_hex(4)


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
    found = {"machine": platform.machine(), "system": platform.platform(), "cores": os.cpu_count()}
    try:
        with open("/proc/cpuinfo") as f:
            model = re.search(r"^model name\s*:\s*(.+)$", f.read(), re.M)
    except OSError:
        return found
    return {**found, "cpu": model.group(1)} if model else found


def _git() -> dict[str, Any]:
    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], capture_output=True, timeout=5, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if commit is None:
        return {"git_commit": None, "git_dirty": None, "git_diff": None}
    diff = ask("diff", "HEAD", "--no-color", "--no-ext-diff")
    if not diff:
        return {"git_commit": commit, "git_dirty": None if diff is None else False, "git_diff": diff}
    return {"git_commit": commit, "git_dirty": True, "git_diff": _cut(diff + "\n")}


def _cut(diff: str) -> str:
    data = diff.encode()
    if len(data) <= DIFF_BYTES:
        return diff
    return data[:DIFF_BYTES].decode(errors="ignore") + f"\n[cut: {len(data)} bytes in all]"
