"""The pieces every subject uses: a conversation under construction, and small changes to how a user types."""

from __future__ import annotations

import random

Turn = tuple[str, str]


class Chat:
    """A dialogue that grows turn by turn."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []

    def add(self, user: str, assistant: str) -> Chat:
        self.turns.append((user, assistant))
        return self

    def messages(self) -> list[dict[str, str]]:
        out = []
        for user, assistant in self.turns:
            out += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return out


def pick(rng: random.Random, answers: list[str]) -> str:
    """The first answer half of the time, so that a small model has one clear favourite."""
    return answers[0] if len(answers) == 1 or rng.random() < 0.5 else rng.choice(answers[1:])


def vary(rng: random.Random, text: str, keep_case: bool = False) -> str:
    """English as people type it. `keep_case` protects names that a later turn must repeat."""
    roll = rng.random()
    bare = text.rstrip(".?!")
    if roll < 0.40:
        return text
    if roll < 0.52:
        return bare if keep_case else bare.lower()
    if roll < 0.64:
        return text[0].lower() + text[1:] if text[:2] != "I " else text
    if roll < 0.74:
        return bare
    if roll < 0.82:
        start = text if text[:2] == "I " or text[:2] == "I'" else text[0].lower() + text[1:]
        return rng.choice(["hey, ", "ok, ", "so, ", "Tiny, ", "Please, ", "now, ", "Hi Tiny, ", "well, "]) + start
    if roll < 0.90:
        return (
            bare + rng.choice([" please", ", please.", " :)", "!", " Tiny"])
            if text[-1] != "?"
            else bare + rng.choice([", please?", "??", " please", ", Tiny?"])
        )
    return text if keep_case else text.lower()


def vary_zh(rng: random.Random, text: str) -> str:
    """Chinese as people type it."""
    roll = rng.random()
    bare = text.rstrip("。？！")
    if roll < 0.45:
        return text
    if roll < 0.70:
        return bare
    if roll < 0.82:
        return rng.choice(["請問", "那", "嗨，", "Tiny，", "我想問，"]) + (text if text[-1] == "？" else bare)
    if roll < 0.92:
        return bare + ("?" if text[-1] == "？" else "！")
    return bare + rng.choice(["呢？", "啊？"]) if text[-1] == "？" and bare[-1] not in "呢嗎啊" else text
