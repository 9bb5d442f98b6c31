"""The README's tree is the repository's, rooms import only lower floors, and the supervisor's side imports no torch."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = {
    "config": 0, "errors": 0, "events": 0, "nvfp4": 1, "telemetry": 1, "model": 2, "checkpoint": 3, "chat": 4, "train": 4,
    "tasks": 5, "tracking": 6, "supervise": 7, "analysis": 7, "launch": 8, "cli": 8,
}  # fmt: skip
PACKAGE = ROOT / "src/fp4lab"


def listed() -> set[str]:
    """Names in the README's tree."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree", 1)[1].split("```")[1]
    return {line.split()[0].rstrip("/") for line in text.strip().splitlines()}


def existing() -> set[str]:
    """Top-level entries and the package's rooms, without what .gitignore leaves out."""
    ignored = {line.strip().rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()} | {".git"}
    top = {p.name for p in ROOT.iterdir() if not any(p.match(pattern) for pattern in ignored)}
    rooms = {str(p.relative_to(ROOT)) for p in PACKAGE.iterdir() if p.name not in ("__pycache__", "__init__.py")}
    return top | rooms


def test_the_readme_shows_the_tree():
    assert listed() == existing()


def test_rooms_import_only_lower_floors():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module is None or not module.startswith("fp4lab"):
                continue
            names = [module.split(".")[1]] if "." in module else [a.name for a in node.names]
            for name in names:
                seen += 1
                assert FLOORS[name] <= FLOORS[room], f"{path}: imports fp4lab.{name}"
    assert seen > 100


@pytest.mark.parametrize(
    "module", ["launch", "supervise.run", "supervise.server", "tracking.wandb", "analysis.callback", "cli"]
)
def test_the_supervisors_side_imports_no_torch(module):
    code = f"import sys, fp4lab.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_are_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_no_dead_links_in_the_readme():
    for name in re.findall(r"`((?:src|doc|conf|data|models)/[\w./-]+)`", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name
