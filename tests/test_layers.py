"""The floors of the package: no room imports from above itself, and what is light stays free of torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fp4lab

SRC = Path(fp4lab.__file__).parent
FLOORS = {
    **dict.fromkeys(("config", "choices", "events", "encoding", "errors"), 0),
    **dict.fromkeys(("telemetry", "nvfp4"), 1),
    "model": 2,
    "checkpoint": 3,
    **dict.fromkeys(("chat", "train"), 4),
    "tasks": 5,
    "tracking": 6,
    **dict.fromkeys(("supervise", "analysis"), 7),
    **dict.fromkeys(("launch", "interactive", "cli"), 8),
}
APART = {("telemetry", "nvfp4"), ("nvfp4", "telemetry"), ("launch", "cli"), ("cli", "launch")}
FILES = sorted(p for p in SRC.rglob("*.py") if p != SRC / "__init__.py")
LIGHT = [
    *("config", "choices", "events", "encoding", "errors", "launch", "interactive", "cli"),
    *("telemetry.host", "telemetry.nvml", "telemetry.cgroup", "telemetry.reader", "telemetry.cuda"),
    *("telemetry.device", "telemetry.tensor_bytes"),
    *("tracking.jsonl", "tracking.console", "tracking.chatlog", "tracking.wandb", "tracking.wandb_view"),
    *("supervise.run", "supervise.client", "supervise.server"),
    *("analysis.frames", "analysis.table", "analysis.callback", "analysis.report", "analysis.sync", "analysis.against"),
]


def room_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def rooms_imported(source: str) -> set[str]:
    """Rooms of fp4lab that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what this test looks for"
            names = [f"fp4lab.{a.name}" for a in node.names] if node.module == "fp4lab" else [node.module or ""]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("fp4lab.")}
    return found


def violations(room: str, source: str) -> set[str]:
    return {r for r in rooms_imported(source) - {room} if FLOORS[r] > FLOORS[room] or (room, r) in APART}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_a_room_imports_only_from_its_floor_or_below(path):
    assert violations(room_of(path), path.read_text(encoding="utf-8")) == set()


def test_every_room_has_a_floor_and_every_floor_a_room():
    assert {room_of(p) for p in FILES} == set(FLOORS)


@pytest.mark.parametrize(
    ("room", "source", "expected"),
    [
        ("model", "import fp4lab.checkpoint.dat", {"checkpoint"}),
        ("model", "def f():\n    from fp4lab.train import loss", {"train"}),
        ("nvfp4", "from fp4lab.telemetry.host import MIB", {"telemetry"}),
        ("events", "from fp4lab import launch, errors", {"launch"}),
        ("tasks", "import torch\nfrom fp4lab.model import paths\nfrom fp4lab.tasks import step", set()),
    ],
)
def test_the_rule_itself(room, source, expected):
    assert violations(room, source) == expected


def test_light_modules_do_not_import_torch():
    """Together in one fresh process; a module that needs torch to be imported would show."""
    code = "import importlib, sys\n" + "".join(
        f"importlib.import_module('fp4lab.{m}')\nif 'torch' in sys.modules: sys.exit('{m} imports torch')\n" for m in LIGHT
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
