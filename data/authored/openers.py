"""The prompts that the examples and tests use, exactly as written there, at the start of many dialogues.

Dialogues are never repeated, so what follows the opener makes each one different.
"""

from __future__ import annotations

import random

from authored import en_core as core
from authored import english as en
from authored import mandarin, zh
from authored.surface import Chat

ENGLISH = {
    "hi": core.HELLO,
    "hello": core.HELLO,
    "who are you": core.SELF,
    "who am I": core.WHO_AM_I_ANSWER,
    "talk about UFO": core.UFO_TALK[0][1][0],
    "write one short sentence about UFO and you": core.UFO_STORIES["lab"][0][0],
}
CHINESE = {"你好": zh.HELLO, "你是誰": zh.SELF, "我是誰": zh.WHO_AM_I_ANSWER, "談談UFO": zh.UFO_TALK[0][1][0]}
EXACT = list(ENGLISH.items()) + list(CHINESE.items())


def opener(rng: random.Random) -> Chat:
    first = rng.choice(EXACT)
    chat = Chat().add(*first)
    if first[1] == core.UFO_STORIES["lab"][0][0] and rng.random() < 0.7:
        for sentence in core.UFO_STORIES["lab"][0][1 : rng.choice([2, 3])]:
            chat.add(rng.choice(["continue.", "continue.", "continue", "Continue."]), sentence)
    table, turns = (ENGLISH, en) if first[0] in ENGLISH else (CHINESE, mandarin)
    for _ in range(rng.choice([0, 1, 1, 2])):
        if rng.random() < 0.35:
            chat.add(*rng.choice([pair for pair in table.items() if pair not in chat.turns] or [first]))
        else:
            chat.add(*rng.choice([turns.question, turns.question, turns.small, turns.about_self, turns.ufo_talk])(rng))
    return chat
