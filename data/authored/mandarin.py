"""One Traditional Chinese dialogue per call, by subject."""

from __future__ import annotations

import random

from authored import en_facts as both
from authored import zh
from authored.english import bit
from authored.surface import Chat, Turn, vary_zh


def hello(rng: random.Random) -> Turn:
    return bit(rng, zh.GREETINGS[:2] if rng.random() < 0.7 else zh.GREETINGS)


def who(rng: random.Random) -> Turn:
    return rng.choice(zh.WHO_ARE_YOU), zh.SELF


def me(rng: random.Random) -> Turn:
    return rng.choice(zh.WHO_AM_I), zh.WHO_AM_I_ANSWER


def closing(rng: random.Random) -> Turn:
    return bit(rng, zh.CLOSINGS)


def small(rng: random.Random) -> Turn:
    return bit(rng, zh.SMALLTALK)


def about_self(rng: random.Random) -> Turn:
    user, answer = bit(rng, zh.IDENTITY)
    return vary_zh(rng, user), answer


def ufo_talk(rng: random.Random) -> Turn:
    return bit(rng, zh.UFO_TALK[:1] if rng.random() < 0.4 else zh.UFO_TALK)


def question(rng: random.Random) -> Turn:
    kind = rng.randrange(7)
    if kind == 0:
        country = rng.choice(list(zh.CAPITALS))
        turn = rng.choice(zh.CAPITAL_Q).format(country), f"{country}的首都是{zh.CAPITALS[country]}。"
    elif kind == 1:
        thing = rng.choice(list(zh.COLOURS))
        turn = rng.choice(zh.COLOUR_Q).format(thing), f"{thing}是{zh.COLOURS[thing]}的。"
    elif kind == 2:
        a, b = rng.sample(rng.choice(zh.OPPOSITES), 2)
        turn = rng.choice(zh.OPPOSITE_Q).format(a), f"{a}的相反是{b}。"
    elif kind == 3:
        a = rng.randint(0, 10)
        b = rng.randint(0, 10)
        return rng.choice(zh.SUM_Q).format(a, b), f"{a} 加 {b} 等於 {a + b}。"
    elif kind == 4:
        at = rng.randrange(7)
        turn = rng.choice(zh.DAY_Q).format(zh.DAYS[at]), f"{zh.DAYS[at]}的後一天是{zh.DAYS[(at + 1) % 7]}。"
    else:
        turn = bit(rng, zh.QUESTIONS)
    return (vary_zh(rng, turn[0]) if rng.random() < 0.5 else turn[0]), turn[1]


def greeting(rng: random.Random) -> Chat:
    chat = Chat().add(*hello(rng))
    if rng.random() < 0.75:
        chat.add(*rng.choice([who, me, question, small])(rng))
    if rng.random() < 0.4:
        chat.add(*closing(rng))
    return chat


def tell(rng: random.Random, chat: Chat, steps: int) -> Chat:
    name = rng.choice(["you", "you", "one", "one", "story"])
    sentences = zh.UFO_STORIES[name]
    chat.add(rng.choice(zh.UFO_ASKS[name]), sentences[0])
    for at in range(1, steps + 1):
        chat.add(rng.choice(zh.CONTINUE), sentences[at] if at < len(sentences) else zh.STORY_END)
        if at == len(sentences):
            break
    return chat


def ufo(rng: random.Random) -> Chat:
    chat = Chat()
    if rng.random() < 0.04:
        return chat.add(rng.choice(zh.CONTINUE), zh.NOTHING_TO_CONTINUE).add(*rng.choice([who, ufo_talk])(rng))
    if rng.random() < 0.2:
        chat.add(*rng.choice([hello, who])(rng))
    if rng.random() < 0.5:
        tell(rng, chat, rng.choice([0, 1, 1, 2, 3]))
    else:
        chat.add(*ufo_talk(rng))
        if rng.random() < 0.6:
            chat.add(*ufo_talk(rng))
    if len(chat.turns) < 4 and rng.random() < 0.3:
        chat.add(*rng.choice([who, me, closing])(rng))
    return chat


def named(rng: random.Random) -> Chat:
    name = rng.choice(zh.NAMES)
    chat = Chat().add(rng.choice(zh.MY_NAME_IS).format(name), f"很高興認識你，{name}！")
    if rng.random() < 0.4:
        chat.add(*rng.choice([question, who])(rng))
    if rng.random() < 0.4:
        return chat.add(rng.choice(zh.WHO_AM_I), f"你是{name}，正在跟我說話的人。")
    return chat.add(rng.choice(zh.MY_NAME_Q), f"你的名字是{name}。")


def identity(rng: random.Random) -> Chat:
    kind = rng.random()
    if kind < 0.25:
        return named(rng)
    chat = Chat()
    if rng.random() < 0.2:
        chat.add(*hello(rng))
    if kind < 0.6:
        pair = [who(rng), me(rng)]
        rng.shuffle(pair)
        for turn in pair[: rng.choice([1, 2, 2])]:
            chat.add(*turn)
    elif kind < 0.67:
        chat.add(rng.choice(zh.MY_NAME_Q), zh.NO_NAME)
    else:
        chat.add(*about_self(rng))
    if rng.random() < 0.5:
        chat.add(*rng.choice([about_self, closing])(rng))
    return chat


def fact(rng: random.Random) -> Chat:
    chat = Chat()
    for _ in range(rng.choice([1, 1, 2, 2])):
        chat.add(*question(rng))
    if rng.random() < 0.1:
        chat.add(*closing(rng))
    return chat


def smalltalk(rng: random.Random) -> Chat:
    chat = Chat()
    for _ in range(rng.choice([1, 1, 2])):
        chat.add(*small(rng))
    if rng.random() < 0.3:
        chat.add(*rng.choice([closing, who])(rng))
    return chat


def followup(rng: random.Random) -> Chat:
    kind = rng.randrange(6)
    if kind == 0:
        return named(rng)
    if kind == 1:
        x = rng.choice(zh.LIKES)
        chat = Chat().add(rng.choice(["我喜歡{}。", "我喜歡{}", "我很喜歡{}。"]).format(x), f"我知道了，你喜歡{x}。")
        if rng.random() < 0.4:
            chat.add(*question(rng))
        return chat.add(rng.choice(["我喜歡什麼？", "你記得我喜歡什麼嗎？", "我喜歡什麼"]), f"你喜歡{x}。")
    if kind == 2:
        topic = rng.choice(list(zh.FACTS_ABOUT))
        known = zh.FACTS_ABOUT[topic]
        chat = Chat().add(rng.choice(zh.FACT_Q).format(topic), known[0])
        for at in range(1, rng.choice([2, 3])):
            chat.add(rng.choice(zh.ANOTHER), known[at])
        return chat
    if kind == 3:
        ask, english, chinese = rng.choice(both.BOTH_TONGUES[:18])
        zh_ask = next((prompts for prompts, answers in zh.QUESTIONS if answers[0] == chinese), None)
        first = vary_zh(rng, rng.choice(zh_ask)) if zh_ask else f"用中文回答：{ask}"
        return Chat().add(first, chinese).add(rng.choice(both.IN_ENGLISH), english)
    if kind == 4:
        a, b = rng.sample(list(zh.CAPITALS), 2)
        chat = Chat().add(rng.choice(zh.CAPITAL_Q).format(a), f"{a}的首都是{zh.CAPITALS[a]}。")
        return chat.add(rng.choice(["那{}呢？", "{}呢？"]).format(b), f"{b}的首都是{zh.CAPITALS[b]}。")
    chat = Chat().add(*rng.choice([question, small, about_self, ufo_talk])(rng))
    return chat.add(rng.choice(zh.PREVIOUS_Q), f"你剛才說：「{chat.turns[-1][0]}」")
