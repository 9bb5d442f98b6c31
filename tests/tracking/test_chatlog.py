"""chat.txt and chat.jsonl, written turn by turn."""

import json

from fp4lab.events import Note, Turn, to_record
from fp4lab.tracking.chatlog import LINES, TEXT, ChatLog

WALL = "2026-01-01T00:00:00.000+00:00"


def said(log, *turns):
    for turn in turns:
        log.record({"t": 0.0, "wall": WALL, **to_record(turn)})


def turn(n, prompt, text, system=None):
    return Turn(n=n, path="C", kvc="persistent", prompt=prompt, text=text, system=system, finish="stop")


def test_nothing_is_made_before_the_first_turn(tmp_path):
    said(ChatLog(tmp_path), Note(text="loading"))
    assert not list(tmp_path.iterdir())


def test_a_turn_has_all_that_was_said_before_it(tmp_path):
    log = ChatLog(tmp_path)
    said(log, turn(0, "hi", "hello", "be brief"), turn(1, "and you?", "two\nlines", "be brief"))
    lines = [json.loads(line) for line in (tmp_path / LINES).read_text(encoding="utf-8").splitlines()]
    assert [m["role"] for m in lines[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert lines[1]["output"] == "two\nlines" and lines[1]["turn"] == 1
    text = (tmp_path / TEXT).read_text(encoding="utf-8")
    assert text.count("--- ") == 1 and "assistant: two\n           lines\n" in text and text.count("be brief") == 1


def test_another_conversation_starts_anew(tmp_path):
    log = ChatLog(tmp_path)
    said(log, turn(0, "one", "1"), turn(1, "two", "2"), turn(0, "one", "1"))
    lines = [json.loads(line) for line in (tmp_path / LINES).read_text(encoding="utf-8").splitlines()]
    assert [len(line["messages"]) for line in lines] == [1, 3, 1]
