"""A conversation's tokens are those of the official template, turn by turn."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp4lab.chat.conversation import Conversation, load_script
from fp4lab.chat.template import STYLES
from fp4lab.chat.tokenizer import Tokenizer
from fp4lab.errors import UserError

TOKENIZER = Tokenizer.load(Path(__file__).parents[2] / "models/tiny/tokenizer.json")
texts = st.text(max_size=12)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.none() | texts, st.sampled_from(STYLES))
def test_pieces_are_the_template(turns, system, style):
    talk, context = Conversation(TOKENIZER, style, system), []
    for user, answer in turns:
        ids = TOKENIZER.encode(answer)
        context += talk.ask(user) + ids + talk.close
        talk.answered(answer, ids)
        assert talk.check(context) == (len(context), True)


def test_the_references_counts():
    """Reference 4.1: 17 + 8 + 2 = 27, with Qwen's own tokenizer; here: the turn, the answer, two to close."""
    talk = Conversation(TOKENIZER)
    assert len(talk.close) == 2
    assert TOKENIZER.decode(talk.ask("hi")) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_an_answer_spelt_in_other_pieces_is_told_and_a_lost_token_is_a_fault():
    talk = Conversation(TOKENIZER)
    single = [TOKENIZER.encode(c)[0] for c in "hello"]
    context = talk.ask("hi") + single + talk.close
    talk.answered("hello", single)
    tokens, canonical = talk.check(context)
    assert not canonical and tokens == len(context) - 5 + len(TOKENIZER.encode("hello"))
    with pytest.raises(AssertionError, match="answers account for"):
        talk.check(context[:-1])


def test_scripts(tmp_path):
    plain = tmp_path / "a.txt"
    plain.write_text("hi\n\nwho are you\n")
    assert load_script(plain).turns == ["hi", "who are you"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"role": "system", "content": "s"}\n{"role": "user", "content": "hi"}\n')
    script = load_script(lines)
    assert (script.system, script.turns) == ("s", ["hi"])


@pytest.mark.parametrize(
    "name, text, word",
    [
        ("a.csv", "x", "expected .txt"),
        ("a.txt", "\n", "no user turn"),
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.jsonl", '{"role": "user", "content": 1}', "line 1"),
        ("a.jsonl", '{"role": "user", "content": "a"}\n{"role": "assistant", "content": "b"}', "line 2: role 'assistant'"),
        ("none.txt", None, "cannot be read"),
    ],
)
def test_wrong_scripts_are_named(tmp_path, name, text, word):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=word) as e:
        load_script(path)
    assert name in str(e.value)
