"""chat.txt to read and chat.jsonl to process: the conversations of a run, written turn by turn."""

import json
from pathlib import Path

from fp4lab.tracking.base import Record

TEXT, LINES = "chat.txt", "chat.jsonl"


class ChatLog:
    """Two files in `folder`, made when the first turn comes.

    A line of chat.jsonl is one turn with all that was said before it: {"wall", "path", "kvc", "turn", "messages":
    [{"role", "content"}], "output", "finish"}.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._messages: list[dict[str, str]] = []

    def record(self, record: Record) -> None:
        if record["kind"] != "turn":
            return
        first = record["n"] == 0
        if first:
            self._messages = [{"role": "system", "content": record["system"]}] if record["system"] is not None else []
        self._messages.append({"role": "user", "content": record["prompt"]})
        line = {k: record[k] for k in ("wall", "path", "kvc")} | {"turn": record["n"], "messages": self._messages}
        line |= {"output": record["text"], "finish": record["finish"]}
        with (self._folder / LINES).open("a", encoding="utf-8") as f:
            f.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._messages.append({"role": "assistant", "content": record["text"]})
        with (self._folder / TEXT).open("a", encoding="utf-8") as f:
            if first:
                f.write(f"--- {record['wall']}  {record['path']}  {record['kvc']}\n")
            said = self._messages if first else self._messages[-2:]
            f.write("".join(f"{m['role']:>9}: {m['content'].replace(chr(10), chr(10) + ' ' * 11)}\n" for m in said))

    def close(self, end: Record) -> None:
        pass
