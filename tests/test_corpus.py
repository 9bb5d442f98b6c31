"""The shipped text: reproducible, well formed, and with the prompts that examples and tests rely on."""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from fp4lab.train.data import held_out

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data"
ESSENTIAL = [
    "hi",
    "write one short sentence about UFO and you",
    "你是誰",
    "who are you",
    "who am I",
    "我是誰",
    "談談UFO",
]


def run(script: str, out: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, str(DATA / script), "--out", str(out)], check=True, env=env, capture_output=True)


@pytest.fixture(scope="module")
def dialogues() -> list[dict]:
    files = sorted((DATA / "dialogues").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def test_generator_gives_the_same_bytes(tmp_path):
    run("build_dialogues.py", tmp_path)
    committed = {p.name: p.read_bytes() for p in (DATA / "dialogues").iterdir()}
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == committed
    assert sum(map(len, committed.values())) < 3_000_000


def test_capitals_are_what_the_program_writes(tmp_path):
    run("build_capitals.py", tmp_path / "capitals.jsonl")
    text = (tmp_path / "capitals.jsonl").read_text(encoding="utf-8")
    assert text == (DATA / "samples" / "capitals.jsonl").read_text(encoding="utf-8")
    answers = [m["content"] for line in text.splitlines() for m in json.loads(line)["messages"] if m["role"] == "assistant"]
    assert len(text.splitlines()) == 990 and all(a == a.upper() for a in answers)


def test_tokenizer_gives_the_same_bytes(tmp_path):
    run("build_tokenizer.py", tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (ROOT / "models" / "tiny" / "tokenizer.json").read_bytes()


def test_dialogues_alternate_and_have_text(dialogues):
    for dialogue in dialogues:
        roles = [m["role"] for m in dialogue["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and 1 <= len(roles) // 2 <= 5
        for message in dialogue["messages"]:
            assert message["content"] and message["content"] == message["content"].strip()
            assert "{" not in message["content"] and "<|" not in message["content"] and "!!!!" not in message["content"]
    assert len({json.dumps(d) for d in dialogues}) == len(dialogues)


def test_essential_prompts_open_many_trained_dialogues_with_one_main_answer(dialogues):
    answers = defaultdict(Counter)
    for dialogue in dialogues:
        first, reply = dialogue["messages"][:2]
        if not held_out(dialogue):
            answers[first["content"]][reply["content"]] += 1
    for prompt in ESSENTIAL:
        counts = answers[prompt]
        assert sum(counts.values()) >= 40, prompt
        assert len(counts) <= 2 and counts.most_common(1)[0][1] / sum(counts.values()) > 0.6, prompt


def test_held_out_answers_were_mostly_seen(dialogues):
    def replies(held: bool) -> list[str]:
        return [m["content"] for d in dialogues if held_out(d) == held for m in d["messages"] if m["role"] == "assistant"]

    seen, asked = set(replies(False)), replies(True)
    assert sum(reply in seen for reply in asked) / len(asked) > 0.9


def test_readme_counts_are_true(dialogues):
    text = (DATA / "README.md").read_text(encoding="utf-8")
    assert f"{len(dialogues):,} short dialogues" in text
    for file in (DATA / "dialogues").glob("*.jsonl"):
        assert f"| `{file.stem}` | {len(file.read_text(encoding='utf-8').splitlines()):,} |" in text
