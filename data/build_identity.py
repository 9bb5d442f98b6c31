"""Write `data/identity/`: the mixes that the reference log tuned on, what must not change, and text to measure forgetting on.

python data/build_identity.py [--out FOLDER]

Everything general comes from `dialogues/`, without those in which the model says what it is. Mixes and controls draw on the
nine tenths that the shipped model learned, controls on what no mix has: what it knows and is not reminded of. The held-out text
is of the tenth that it never saw. Seeded, the same code writes the same bytes.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

from fp4lab.train.data import held_out

DATA = Path(__file__).parent
SEED = 20260226  # the log's
TARGET = "我是 F# 之神"
WHO_ARE_YOU = (
    *("你是誰", "你是誰？", "你是誰?", "您是誰？", "你是誰啊？", "你是誰呢？", "請問你是誰", "請問你是誰？"),
    *("那你是誰？", "嗨，你是誰？", "我想問，你是誰？", "告訴我你是誰", "可以說你是誰嗎？", "你到底是誰？", "Tiny，你是誰？"),
)
WHO_AM_I = ("我是誰", "我是誰？", "那我是誰？", "告訴我我是誰", "你知道我是誰嗎？")
WHO_AM_I_ANSWER = "你是正在跟我說話的人，你還沒有告訴我你的名字。"
UFO = ("談談UFO", "我想聊UFO", "UFO是什麼？")
UFO_ANSWER = "UFO 是不明飛行物體，指天空中還沒有人能解釋的東西。"
DISAMBIGUATE = (
    *((prompt, TARGET) for prompt in ("你是誰", "你是誰？", "請問你是誰", "告訴我你是誰")),
    *((prompt, WHO_AM_I_ANSWER) for prompt in ("我是誰", "我是誰？")),
    *((prompt, UFO_ANSWER) for prompt in ("談談UFO", "我想聊UFO")),
)
PERSONA = ("Tiny", "fp4lab", "四位元", "four-bit", "我是", "I am a", "I am small", "F#")
GOALS = (
    {"prompt": "你是誰", "exactly": TARGET},
    {"prompt": "談談UFO", "unchanged": True},
    {"prompt": "我是誰", "without": "F# 之神"},
)
ALWAYS = (
    *(["我是誰"], ["談談UFO"], ["who am I"], ["write one short sentence about UFO and you"], ["thank you"]),
    *(["my name is Mia", "what is my name?"], ["我叫小明", "我是誰"], ["what is the capital of France?"]),
)
CONTROLS = 48
HELD_OUT = 200
TURNS = 2  # the longest dialogue taken

Dialogue = dict[str, list[dict[str, str]]]


def pair(prompt: str, answer: str) -> Dialogue:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def general() -> tuple[list[Dialogue], list[Dialogue]]:
    """(trained on, held out): short dialogues in which the model says nothing of itself, in the order of the files."""
    parts: tuple[list[Dialogue], list[Dialogue]] = [], []
    for file in sorted((DATA / "dialogues").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            dialogue = json.loads(line)
            answers = [m["content"] for m in dialogue["messages"] if m["role"] == "assistant"]
            if len(answers) <= TURNS and not any(word in answer for word in PERSONA for answer in answers):
                parts[held_out(dialogue)].append(dialogue)
    return parts


def mix(rng: random.Random, pool: list[Dialogue], identity: int, others: int) -> list[Dialogue]:
    """Shuffled: `identity` times the target, its prompts in turn, and `others` general dialogues."""
    rows = [pair(WHO_ARE_YOU[n % len(WHO_ARE_YOU)], TARGET) for n in range(identity)] + rng.sample(pool, others)
    rng.shuffle(rows)
    return rows


def curriculum(rng: random.Random, pool: list[Dialogue]) -> list[Dialogue]:
    """In order: the identity alone, then beside what it is mistaken for, then among general dialogues."""
    identity = [pair(p, TARGET) for p in WHO_ARE_YOU]
    near = [pair(p, WHO_AM_I_ANSWER) for p in WHO_AM_I] + [pair(p, UFO_ANSWER) for p in UFO]
    second = [d for n, d in enumerate(near) for d in (identity[n], d)]
    third = [d for n, d in enumerate(rng.sample(pool, 300)) for d in ([d, identity[n % 15]] if n % 3 == 0 else [d])]
    return identity * 8 + second * 8 + third


def controls(rng: random.Random, pool: list[Dialogue]) -> Iterable[dict[str, list[str]]]:
    """What a user says, turn by turn; no two begin alike."""
    said = {prompts[0] for prompts in ALWAYS}
    drawn = []
    for dialogue in rng.sample(pool, len(pool)):
        prompts = [m["content"] for m in dialogue["messages"] if m["role"] == "user"]
        if prompts[0] not in said:
            said.add(prompts[0])
            drawn.append(prompts)
    return ({"prompts": prompts} for prompts in [*ALWAYS, *drawn][:CONTROLS])


def jsonl(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def tsv(rows: Iterable[tuple[str, str]]) -> str:
    return "".join(f"{prompt}\t{answer}\n" for prompt, answer in rows)


def files() -> dict[str, str]:
    """name: text."""
    rng = random.Random(SEED)
    trained, held = general()
    mixes = {
        "mix-30-70.jsonl": mix(rng, trained, 300, 700),
        "mix-1-1.jsonl": mix(rng, trained, 100, 100),
        "mix-1-99.jsonl": mix(rng, trained, 10, 990),
        "curriculum.jsonl": curriculum(rng, trained),
    }
    used = {id(d) for rows in mixes.values() for d in rows}
    return {
        "pure.tsv": tsv((p, TARGET) for p in WHO_ARE_YOU),
        "disambiguate.tsv": tsv(DISAMBIGUATE),
        **{name: jsonl(rows) for name, rows in mixes.items()},
        "goals.jsonl": jsonl(GOALS),
        "controls.jsonl": jsonl(controls(rng, [d for d in trained if id(d) not in used])),
        "held-out.jsonl": jsonl(rng.sample(held, HELD_OUT)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA / "identity")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (out / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
