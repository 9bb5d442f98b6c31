"""Each notebook is its .py, executed to the end, with pictures; that they still run is `make notebooks`."""

import json
import re
from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SOURCES = sorted(p for p in NOTEBOOKS.glob("*.py") if p.name != "common.py")


def test_there_are_notebooks_and_each_is_listed():
    listed = re.findall(r"\]\((\w+)\.ipynb\)", (NOTEBOOKS / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == [p.stem for p in SOURCES] == sorted(p.stem for p in NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_a_notebook_is_its_source_executed(source):
    written = jupytext.read(source)
    made = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert [(c["cell_type"], "".join(c["source"])) for c in made["cells"]] == [(c.cell_type, c.source) for c in written.cells]
    code = [c for c in made["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c["outputs"]]
    assert not any(o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs)
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not re.search(r"/(home|root|work|tmp)/", json.dumps([o.get("text", "") for o in outputs]))
    assert source.with_suffix(".ipynb").stat().st_size < 1_000_000
