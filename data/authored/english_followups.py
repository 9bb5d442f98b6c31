"""English dialogues in which a later answer needs an earlier turn."""

from __future__ import annotations

import random

from authored import en_core as core
from authored import en_facts as facts
from authored import en_talk as talk
from authored import english as en
from authored.surface import Chat, vary


def filler(rng: random.Random, chat: Chat) -> None:
    """Sometimes something unrelated stands between the fact and its recall."""
    if rng.random() < 0.4:
        chat.add(*rng.choice([en.question, en.question, en.technical, en.who])(rng))


def name(rng: random.Random) -> Chat:
    who = rng.choice(talk.NAMES)
    chat = Chat().add(rng.choice(talk.MY_NAME_IS).format(who), f"Nice to meet you, {who}!")
    filler(rng, chat)
    if rng.random() < 0.3:
        return chat.add(rng.choice(core.WHO_AM_I), f"You are {who}, the person talking with me.")
    return chat.add(rng.choice(core.MY_NAME_Q), f"Your name is {who}.")


def told(rng: random.Random) -> Chat:
    """The user says something about themselves and asks for it."""
    things, sayings, reply, asks, recall = rng.choice(talk.TOLD)
    x = rng.choice(things)
    said = rng.choice(sayings).format(x)
    reply = reply.format(x)
    chat = Chat().add(said, reply[0].upper() + reply[1:])
    filler(rng, chat)
    return chat.add(rng.choice(asks), recall.format(x))


def another(rng: random.Random) -> Chat:
    topic = rng.choice(list(facts.FACTS_ABOUT))
    known = facts.FACTS_ABOUT[topic]
    chat = Chat().add(rng.choice(facts.FACT_Q).format(topic), known[0])
    for at in range(1, rng.choice([2, 3, 4])):
        chat.add(rng.choice(facts.ANOTHER), known[at] if at < len(known) else facts.NO_MORE.format(topic))
        if at >= len(known):
            break
    return chat


def why(rng: random.Random) -> Chat:
    direct, ask, answer, reason = rng.choice(facts.REASONS)
    if rng.random() < 0.25:
        return Chat().add(vary(rng, direct), reason)
    chat = Chat().add(vary(rng, ask), answer).add(rng.choice(facts.WHY), reason)
    if rng.random() < 0.3:
        chat.add(*en.thanks(rng))
    return chat


def translate(rng: random.Random) -> Chat:
    ask, english, chinese = rng.choice(facts.BOTH_TONGUES)
    return Chat().add(vary(rng, ask), english).add(rng.choice(facts.IN_CHINESE), chinese)


def previous(rng: random.Random) -> Chat:
    chat = Chat()
    for _ in range(rng.choice([1, 2])):
        chat.add(*rng.choice([en.question, en.small, en.about_self, en.technical, en.hello, en.ufo_talk, en.question])(rng))
    en.previous(rng, chat)
    if rng.random() < 0.25:
        en.previous(rng, chat)
    return chat


def and_this(rng: random.Random) -> Chat:
    """The second question names only what is new."""
    if rng.random() < 0.5:
        a, b = rng.sample(list(facts.CAPITALS), 2)
        chat = Chat().add(*en.capital(rng, a))
        return chat.add(rng.choice(["and {}?", "And {}?", "and of {}?", "what about {}?"]).format(b), en.capital(rng, b)[1])
    if rng.random() < 0.5:
        a, b = rng.sample([pair[0] for pair in facts.OPPOSITES], 2)
        chat = Chat().add(*en.opposite(rng, a))
        return chat.add(rng.choice(["and of {}?", "and {}?", "what about {}?"]).format(b), en.opposite(rng, b)[1])
    a, b, c = rng.randint(1, 8), rng.randint(1, 6), rng.randint(1, 6)
    chat = Chat().add(rng.choice(facts.SUM_Q).format(a, b), f"{a} plus {b} is {a + b}.")
    return chat.add(
        rng.choice(["plus {}?", "and plus {}?", "add {} to that", "now add {}"]).format(c),
        f"{a + b} plus {c} is {a + b + c}.",
    )


def topic(rng: random.Random) -> Chat:
    subject = rng.choice(list(facts.FACTS_ABOUT))
    chat = Chat().add(rng.choice(facts.FACT_Q).format(subject), facts.FACTS_ABOUT[subject][0])
    return chat.add(rng.choice(talk.TOPIC_Q), f"We are talking about {subject}.")


KINDS = [name, name, told, told, told, another, another, why, translate, previous, previous, and_this, topic]


def followup(rng: random.Random) -> Chat:
    return rng.choice(KINDS)(rng)
