"""The README's tree is the repository's, and what it points to exists. (Who may import whom: test_layers.py.)"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent

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


def test_files_are_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


def test_no_dead_links_in_the_readme():
    for name in re.findall(r"`((?:src|doc|conf|data|models)/[\w./-]+)`", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name
