"""doc/config.md and doc/events.md are what doc/generate.py makes of the schema, and hold all of it."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from fp4lab import config, events

DOC = Path(__file__).parent.parent / "doc"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", DOC / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["config.md", "events.md"])
def test_pages_are_fresh(generate, name):
    fresh = (DOC / name).read_text(encoding="utf-8") == generate.PAGES[name]()
    assert fresh, f"doc/{name} is older than the schema: run python doc/generate.py"


def test_every_key_and_field_is_there(generate):
    page = generate.config_page()
    for f in dataclasses.fields(config.RunConfig):
        group = getattr(config.RunConfig(), f.name)
        keys = [f"{f.name}.{g.name}" for g in dataclasses.fields(group)] if dataclasses.is_dataclass(group) else [f.name]
        assert all(f"| `{key}` |" in page for key in keys)
    page = generate.events_page()
    for kind, cls in events.KINDS.items():
        section = page.split(f"## `{kind}`\n", 1)[1].split("\n## ", 1)[0]
        own = {f.name for f in dataclasses.fields(cls)} - {f.name for f in dataclasses.fields(events.Memory)}
        assert all(f"| `{name}` |" in section for name in own), kind


def test_a_comment_is_a_meaning(generate, tmp_path):
    source = tmp_path / "schema.py"
    source.write_text('@dataclass\nclass A:\n    """Text."""\n\n    x: int | None = None  # why # so\n    y: str = "a"\n')
    (schema,) = generate.read(source).values()
    assert [dataclasses.astuple(f) for f in schema.fields] == [("x", "int | None", "null", "why # so"), ("y", "str", "a", "")]
