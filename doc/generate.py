"""Writes doc/config.md and doc/events.md from src/fp4lab/config.py and events.py, comments and all.

python doc/generate.py            after a change there; a test fails where these pages are older than the schema
"""

import ast
import enum
import io
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from fp4lab import config, events  # noqa: E402
from fp4lab.choices import TASK_PHASES  # noqa: E402

SOURCE = ROOT / "src/fp4lab"


@dataclass(frozen=True)
class Field:
    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Schema:
    """A dataclass as written: `text` is its docstring, `bases` the names it inherits from."""

    name: str
    text: str
    bases: tuple[str, ...]
    kind: str | None
    fields: tuple[Field, ...]


def read(path: Path) -> dict[str, Schema]:
    """The dataclasses of a file in its order, each field with the comments of its lines."""
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef) or not node.decorator_list:
            continue
        fields, kind = [], None
        for item in node.body:
            if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
                continue
            if "ClassVar" in ast.unparse(item.annotation):
                kind = ast.literal_eval(item.value) if item.value else None
                continue
            lines = range(item.lineno, (item.end_lineno or item.lineno) + 1)
            meaning = " ".join(comments[n] for n in lines if n in comments)
            fields.append(Field(item.target.id, ast.unparse(item.annotation), _default(item.value), meaning))
        bases = tuple(ast.unparse(b) for b in node.bases)
        found[node.name] = Schema(node.name, ast.get_docstring(node) or "", bases, kind, tuple(fields))
    return found


def _default(value: ast.expr | None) -> str:
    if value is None:
        return ""
    text = ast.unparse(value)
    if text.startswith("field("):
        return {"list": "[]", "dict": "{}"}.get(text.removeprefix("field(default_factory=").removesuffix(")"), "")
    if text == "math.nan":
        return "nan"
    if text.partition(".")[0] in vars(config):
        return text.partition(".")[2]  # of an enum
    return {"None": "null", "True": "true", "False": "false"}.get(text, text).strip("'")


def config_page() -> str:
    """Every key of a run: group by group, in the order of the schema."""
    schemas = read(SOURCE / "config.py")
    root = schemas["RunConfig"]
    groups = {f.name: schemas[f.type] for f in root.fields if f.type in schemas}
    parts = [
        "# Every key of a run",
        "",
        "Written by `python doc/generate.py` from `src/fp4lab/config.py`: change that, not this. A key is given as `key=value`",
        "to `python run.py`, several values with commas to `python run.py -m`. An unknown key or value is refused, with what",
        "was expected.",
        "",
        "## Of the run itself",
        "",
        *_table([f for f in root.fields if f.type not in schemas], ""),
    ]
    for name, schema in groups.items():
        parts += ["", f"## {name}", ""]
        parts += [schema.text.split("\n\n")[0].replace("\n", " "), ""] if schema.text else []
        choices = sorted(p.stem for p in (ROOT / "conf" / name).glob("*.yaml"))
        parts += [f"Choices (`{name}=...`): {', '.join(f'`{c}`' for c in choices)}.", ""] if choices else []
        parts += _table(schema.fields, f"{name}.")
    parts += ["", "## Phases", "", "What `stop_after` may name, by task:", "", "| task | phases, in order |", "|---|---|"]
    parts += [f"| {task} | {', '.join(f'`{p}`' for p in phases)} |" for task, phases in TASK_PHASES.items()]
    return "\n".join(parts) + "\n"


def events_page() -> str:
    """Every kind of record, with the memory fields once."""
    schemas = read(SOURCE / "events.py")
    memory = schemas["Memory"]
    parts = [
        "# Every record of a run",
        "",
        "Written by `python doc/generate.py` from `src/fp4lab/events.py`: change that, not this. `events.jsonl` has one JSON",
        "object a line: `t` (monotonic seconds since the supervisor started the run), `wall` (UTC, ISO 8601), `kind`, then the",
        "fields below. MiB are 2^20 bytes. What could not be read is null, never 0. A float that is not finite is written as",
        "`nan`, `inf` or `-inf` in quotes. A run that was killed has every record up to then; its last line may be cut off.",
        "",
        "## Memory, in `phase` and `sample`",
        "",
        *_table(memory.fields, ""),
    ]
    for schema in schemas.values():
        if schema.kind is None:
            continue
        parts += ["", f"## `{schema.kind}`", ""]
        parts += [schema.text.split("\n\n")[0].replace("\n", " "), ""] if schema.text else []
        parts += ["With the fields of memory above.", ""] if memory.name in schema.bases else []
        parts += _table(schema.fields, "") if schema.fields else []
    codes = (f"| {status} | {code} |" for status, code in events.STATUSES.items())
    parts += [
        "",
        "## Statuses",
        "",
        "Of `end`, with the exit code of a single run:",
        "",
        "| status | code |",
        "|---|---|",
        *codes,
    ]
    return "\n".join(line.rstrip() for line in parts) + "\n"


def _table(fields, prefix: str) -> list[str]:
    head = ["| name | type | default | meaning |", "|---|---|---|---|"]
    rows = ((f"`{prefix}{f.name}`", _type(f.type), _code(f.default), _cell(f.meaning)) for f in fields)
    return [*head, *(f"| {' | '.join(row)} |" for row in rows)]


def _type(text: str) -> str:
    """A choice's values instead of its enum's name, null instead of None."""
    values = getattr(config, text, None)
    if isinstance(values, enum.EnumMeta):
        return ", ".join(f"`{v.name}`" for v in values) if text != "StopAfter" else "a phase, or `none`"
    return _cell(text.replace("None", "null"))


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES = {"config.md": config_page, "events.md": events_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (ROOT / "doc" / name).write_text(make(), encoding="utf-8")
