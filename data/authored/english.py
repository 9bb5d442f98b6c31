"""One English dialogue per call, by subject."""

from __future__ import annotations

import random

from authored import en_core as core
from authored import en_facts as facts
from authored import en_talk as talk
from authored.surface import Chat, Turn, pick, vary

Bits = list[tuple[list[str], list[str]]]


def bit(rng: random.Random, bits: Bits) -> Turn:
    prompts, answers = rng.choice(bits)
    return rng.choice(prompts), pick(rng, answers)


def varied(rng: random.Random, bits: Bits) -> Turn:
    user, answer = bit(rng, bits)
    return (vary(rng, user) if rng.random() < 0.6 else user), answer


def hello(rng: random.Random) -> Turn:
    """Mostly the plainest greetings."""
    return bit(rng, core.GREETINGS[:3] if rng.random() < 0.7 else core.GREETINGS)


def who(rng: random.Random) -> Turn:
    return rng.choice(core.WHO_ARE_YOU), pick(rng, core.WHO_ANSWERS)


def me(rng: random.Random) -> Turn:
    return rng.choice(core.WHO_AM_I), core.WHO_AM_I_ANSWER


def previous(rng: random.Random, chat: Chat) -> Chat:
    return chat.add(rng.choice(talk.PREVIOUS_Q), f'You said: "{chat.turns[-1][0]}"')


def tell(rng: random.Random, chat: Chat, steps: int) -> Chat:
    """A UFO sentence and `steps` continuations, each decided by the sentence before it."""
    asks, names = core.UFO_ASKS[rng.choice(["you", "you", "one", "one", "story"])]
    sentences, clauses = core.UFO_STORIES[rng.choice(names)]
    chat.add(rng.choice(asks), sentences[0])
    at, in_clause = 0, False
    for _ in range(steps):
        if at < 2 and not in_clause and rng.random() < 0.25:
            chat.add(rng.choice(core.CLAUSE), clauses[at])
            in_clause = True
            continue
        at, in_clause = at + 1, False
        chat.add(rng.choice(core.CONTINUE), sentences[at] if at < len(sentences) else core.STORY_END)
        if at == len(sentences):
            break
    return chat


def greeting(rng: random.Random) -> Chat:
    chat = Chat()
    chat.add(*hello(rng))
    kind = rng.random()
    if kind < 0.25:
        return chat
    if kind < 0.45:
        chat.add(*bit(rng, core.GREETINGS[6:9]))
    elif kind < 0.70:
        chat.add(*rng.choice([who, me, question, small])(rng))
    else:
        chat.add(*rng.choice([who, question, small])(rng))
        chat.add(*bit(rng, core.THANKS))
    if rng.random() < 0.5:
        chat.add(*bit(rng, core.GOODBYES))
    return chat


def ufo(rng: random.Random) -> Chat:
    chat = Chat()
    kind = rng.random()
    if kind < 0.03:
        return chat.add(rng.choice(core.CONTINUE + core.CLAUSE), core.NOTHING_TO_CONTINUE).add(
            *rng.choice([who, hello, question])(rng)
        )
    if kind < 0.20:
        chat.add(*rng.choice([hello, who, me])(rng))
        return tell(rng, chat, rng.choice([0, 1, 1, 2]))
    if kind < 0.62:
        tell(rng, chat, rng.choice([0, 1, 1, 2, 2, 3]))
        if len(chat.turns) < 4 and rng.random() < 0.4:
            chat.add(*rng.choice([who, me, thanks, ufo_talk])(rng))
        return chat
    chat.add(*ufo_talk(rng))
    if rng.random() < 0.6:
        chat.add(*ufo_talk(rng))
    roll = rng.random()
    if roll < 0.2:
        chat.add(rng.choice(talk.TOPIC_Q), "We are talking about UFOs.")
    elif roll < 0.4:
        tell(rng, chat, rng.choice([0, 1]))
    elif roll < 0.5:
        previous(rng, chat)
    elif roll < 0.6:
        chat.add(*rng.choice([who, thanks])(rng))
    return chat


def ufo_talk(rng: random.Random) -> Turn:
    return bit(rng, core.UFO_TALK[:1]) if rng.random() < 0.3 else varied(rng, core.UFO_TALK)


def thanks(rng: random.Random) -> Turn:
    return bit(rng, core.THANKS)


def about_self(rng: random.Random) -> Turn:
    return varied(rng, core.IDENTITY)


def identity(rng: random.Random) -> Chat:
    chat = Chat()
    if rng.random() < 0.25:
        chat.add(*hello(rng))
    kind = rng.random()
    if kind < 0.25:
        name = rng.choice(talk.NAMES)
        chat.add(rng.choice(talk.MY_NAME_IS).format(name), f"Nice to meet you, {name}!")
        if rng.random() < 0.5:
            chat.add(*rng.choice([who, about_self, question])(rng))
        if rng.random() < 0.5:
            chat.add(rng.choice(core.WHO_AM_I), f"You are {name}, the person talking with me.")
        else:
            chat.add(rng.choice(core.MY_NAME_Q), f"Your name is {name}.")
    elif kind < 0.5:
        pair = [who(rng), me(rng)]
        rng.shuffle(pair)
        for turn in pair[: rng.choice([1, 2, 2])]:
            chat.add(*turn)
        if rng.random() < 0.4:
            chat.add(*about_self(rng))
    elif kind < 0.58:
        chat.add(rng.choice(core.MY_NAME_Q), core.NO_NAME)
        if rng.random() < 0.7:
            name = rng.choice(talk.NAMES)
            chat.add(rng.choice(talk.MY_NAME_IS).format(name), f"Nice to meet you, {name}!")
            chat.add(rng.choice(core.MY_NAME_Q), f"Your name is {name}.")
    else:
        chat.add(*about_self(rng))
        if rng.random() < 0.6:
            chat.add(*rng.choice([about_self, who, me, thanks])(rng))
    return chat


def capital(rng: random.Random, country: str | None = None) -> Turn:
    country = country or rng.choice(list(facts.CAPITALS))
    return rng.choice(facts.CAPITAL_Q).format(country), f"The capital of {country} is {facts.CAPITALS[country]}."


def colour(rng: random.Random) -> Turn:
    thing = rng.choice(list(facts.COLOURS))
    return rng.choice(facts.COLOUR_Q).format(thing), f"{thing[0].upper() + thing[1:]} is {facts.COLOURS[thing]}."


def opposite(rng: random.Random, word: str | None = None) -> Turn:
    table = {b: a for a, b in facts.OPPOSITES} | dict(facts.OPPOSITES)
    word = word or rng.choice(list(table))
    return rng.choice(facts.OPPOSITE_Q).format(word), f"The opposite of {word} is {table[word]}."


def arithmetic(rng: random.Random) -> Turn:
    if rng.random() < 0.7:
        a = rng.randint(0, 12)
        b = rng.randint(0, min(12, 20 - a))
        return rng.choice(facts.SUM_Q).format(a, b), f"{a} plus {b} is {a + b}."
    a = rng.randint(1, 15)
    b = rng.randint(0, a)
    return rng.choice(facts.MINUS_Q).format(a, b), f"{a} minus {b} is {a - b}."


def calendar(rng: random.Random) -> Turn:
    names, kind = rng.choice([(facts.DAYS, "day"), (facts.MONTHS, "month")])
    at = rng.randrange(len(names))
    if rng.random() < 0.6:
        return rng.choice(facts.AFTER_Q).format(
            names[at], kind=kind
        ), f"{names[(at + 1) % len(names)]} comes after {names[at]}."
    return rng.choice(facts.BEFORE_Q).format(names[at], kind=kind), f"{names[at - 1]} comes before {names[at]}."


def animal(rng: random.Random) -> Turn:
    kind = rng.randrange(3)
    if kind == 0:
        name = rng.choice(list(facts.SOUNDS))
        return rng.choice(facts.SOUND_Q).format(name), f"A {name} says {facts.SOUNDS[name]}."
    if kind == 1:
        name = rng.choice(list(facts.LEGS))
        legs = {0: "no", 2: "two", 4: "four", 6: "six", 8: "eight", 10: "ten"}[facts.LEGS[name]]
        return rng.choice(facts.LEGS_Q).format(name), f"A {name} has {legs} legs."
    name = rng.choice(list(facts.YOUNG))
    return rng.choice(facts.YOUNG_Q).format(name), f"A young {name} is called a {facts.YOUNG[name]}."


def count(rng: random.Random) -> Turn:
    upto = rng.randint(2, 10)
    shown = rng.choice([str(upto), facts.NUMBER_WORDS[upto - 1]])
    return rng.choice(facts.COUNT_Q).format(shown), ", ".join(facts.NUMBER_WORDS[:upto]) + "."


def plain(rng: random.Random) -> Turn:
    return bit(rng, facts.QUESTIONS)


def question(rng: random.Random) -> Turn:
    makers = [capital, colour, opposite, arithmetic, arithmetic, calendar, animal, plain, plain, plain]
    user, answer = rng.choice(makers)(rng)
    return (vary(rng, user) if rng.random() < 0.5 and "+" not in user and "-" not in user else user), answer


def small(rng: random.Random) -> Turn:
    return varied(rng, talk.SMALLTALK)


def technical(rng: random.Random) -> Turn:
    thing = rng.choice(list(talk.TECH))
    return vary(rng, rng.choice(talk.TECH_Q).format(thing), keep_case=True), talk.TECH[thing]


def fact(rng: random.Random) -> Chat:
    chat = Chat()
    for _ in range(rng.choice([1, 1, 2, 2, 3])):
        chat.add(*(count(rng) if rng.random() < 0.05 else question(rng)))
    if rng.random() < 0.1:
        chat.add(*thanks(rng))
    return chat


def smalltalk(rng: random.Random) -> Chat:
    chat = Chat()
    if rng.random() < 0.2:
        chat.add(*hello(rng))
    for _ in range(rng.choice([1, 1, 2, 2])):
        chat.add(*small(rng))
    if rng.random() < 0.25:
        chat.add(*rng.choice([thanks, who, lambda r: bit(r, core.GOODBYES)])(rng))
    return chat


def tech(rng: random.Random) -> Chat:
    chat = Chat()
    for _ in range(rng.choice([1, 1, 2])):
        chat.add(*technical(rng))
    if rng.random() < 0.2:
        chat.add(*rng.choice([thanks, who])(rng))
    return chat


def control(rng: random.Random) -> Chat:
    chat = Chat()
    for _ in range(rng.choice([1, 2, 2])):
        kind = rng.random()
        if kind < 0.5:
            text = rng.choice(talk.WORDS)
            chat.add(rng.choice(talk.REPEAT_Q).format(text), text)
        elif kind < 0.65:
            word = rng.choice(talk.SPELL_WORDS)
            chat.add(rng.choice(talk.SPELL_Q).format(word), "-".join(word))
        elif kind < 0.75:
            chat.add(*count(rng))
        else:
            chat.add(*rng.choice(talk.ONE_WORD))
    if rng.random() < 0.3:
        previous(rng, chat)
    return chat
