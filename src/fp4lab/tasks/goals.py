"""What tuning must reach and what it must leave alone, as data: goals (task.goals) and control prompts (task.controls).

goals     {"prompt": P, "exactly": T}         the whole answer is T, and the untuned model must not give it
          {"prompt": P, "unchanged": true}    the answer is the untuned model's
          {"prompt": P, "without": T}         T does not occur in the answer
controls  {"prompts": [P1, P2, ...]}          turns of one user; every answer is held against the untuned model's

One JSON object a line. No rule is an alternative of another: a reply that only resembles the target is a miss (failure 26).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4lab.errors import UserError

RULES = ("exactly", "unchanged", "without")


@dataclass(frozen=True)
class Goal:
    """`wanted` is the text of "exactly" and "without"; of "unchanged" it is empty until the untuned model was asked."""

    prompt: str
    rule: str
    wanted: str
    where: str  # file:line

    def met(self, text: str, stopped: bool) -> bool:
        """Of an answer; `stopped`: it was ended by the model, not by task.max_tokens."""
        if self.rule == "without":
            return self.wanted not in text
        return stopped and text == self.wanted


def load_goals(path: str | Path) -> list[Goal]:
    """Raises UserError naming the file and line of what is no goal."""
    goals = []
    for where, record in _records(path, "task.goals"):
        rules = [rule for rule in RULES if rule in record]
        if not _text(record.get("prompt")) or len(rules) != 1 or set(record) != {"prompt", *rules}:
            raise UserError(
                f'{where}: expected {{"prompt": TEXT, and one of {", ".join(RULES)}}}, got {json.dumps(record)[:80]}'
            )
        (rule,), wanted = rules, record[rules[0]]
        if wanted is not True if rule == "unchanged" else not _text(wanted):
            raise UserError(f"{where}: {rule} is {wanted!r}; expected {'true' if rule == 'unchanged' else 'a text'}")
        goals.append(Goal(record["prompt"], rule, "" if rule == "unchanged" else wanted, where))
    return goals


def load_controls(path: str | Path) -> list[list[str]]:
    """Conversations as the user's turns. Raises UserError naming the file and line."""
    found = []
    for where, record in _records(path, "task.controls"):
        prompts = record.get("prompts")
        if set(record) != {"prompts"} or not isinstance(prompts, list) or not prompts or not all(map(_text, prompts)):
            raise UserError(f'{where}: expected {{"prompts": [TEXT, ...]}}, got {json.dumps(record)[:80]}')
        found.append(prompts)
    return found


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _records(path: str | Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of every line that is not blank."""
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}={path}: {error}; expected a file with a JSON object on each line") from error
    records = [(f"{file}:{n}", line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise UserError(f"{key}={path}: the file is empty; expected a JSON object on each line")
    for where, line in records:
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg}); expected one object on each line") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, got {line[:60]}")
        yield where, record
