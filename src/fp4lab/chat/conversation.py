"""A conversation as text and as tokens: what each turn adds to the context, and that both stay the same thing."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from fp4lab.chat.template import ASSISTANT_START, CLOSE, Message, close_turn, open_turn, render
from fp4lab.chat.tokenizer import Tokenizer
from fp4lab.errors import UserError

_EXPECTED = 'expected .txt (one user turn a line) or .jsonl (one {"role": "user", "content": "..."} a line, "system" first)'


@dataclass
class Script:
    """What will be said to the model."""

    turns: list[str]
    system: str | None = None


def load_script(path: Path) -> Script:
    """The user's turns of a file. Raises UserError naming the file and line."""
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"task.conversation={path}: {_EXPECTED}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"task.conversation={path}: cannot be read ({e}); {_EXPECTED}") from e
    script = Script([])
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        role, content = ("user", line) if path.suffix == ".txt" else _message(line, f"{path}, line {number}")
        if role == "system" and not script.turns and script.system is None:
            script.system = content
        elif role == "user":
            script.turns.append(content)
        else:
            raise UserError(f"{path}, line {number}: role {role!r} here; {_EXPECTED}. Answers are the model's to give.")
    if not script.turns:
        raise UserError(f"{path}: no user turn in it; {_EXPECTED}")
    return script


def _message(line: str, where: str) -> tuple[str, str]:
    try:
        value = json.loads(line)
    except ValueError as e:
        raise UserError(f"{where}: not JSON ({e}); {_EXPECTED}") from e
    if not isinstance(value, dict) or not all(isinstance(value.get(k), str) for k in ("role", "content")):
        raise UserError(f"{where}: {_EXPECTED}")
    return value["role"], value["content"]


@dataclass
class Conversation:
    """`messages` is the text; `answers` the ids that were generated, one list a turn."""

    tokenizer: Tokenizer
    style: str = "official"
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)

    @property
    def close(self) -> list[int]:
        """Tokens that end an answer."""
        return self.tokenizer.encode(CLOSE)

    def ask(self, text: str) -> list[int]:
        """Adds a user's turn; returns the tokens that it adds to the context, the opening of the answer included."""
        new: list[Message] = []
        if not self.messages and self.system is not None:
            new.append({"role": "system", "content": self.system})
        new.append({"role": "user", "content": text})
        self.messages += new
        rendered = "".join(open_turn(m) + close_turn(m, self.style) for m in new)
        return self.tokenizer.encode(rendered + ASSISTANT_START)

    def answered(self, text: str, ids: list[int]) -> None:
        self.messages.append({"role": "assistant", "content": text})
        self.answers.append(ids)

    def check(self, context: list[int]) -> tuple[int, bool]:
        """Tokens of the template's rendering of `messages`, and whether they are exactly `context`.

        They differ where an answer's ids are not those that the tokenizer gives its text: a model may spell a word in
        other pieces, or be cut within a character. The lengths must differ by just that; AssertionError otherwise.
        """
        official = self.tokenizer.encode(render(self.messages, self.style, add_generation_prompt=False))
        texts = [m["content"] for m in self.messages if m["role"] == "assistant"]
        longer = sum(len(ids) - len(self.tokenizer.encode(text)) for ids, text in zip(self.answers, texts, strict=True))
        assert len(context) == len(official) + longer, (
            f"the context has {len(context)} tokens, the {self.style} template {len(official)}, answers account for {longer}"
        )
        return len(official), context == official
