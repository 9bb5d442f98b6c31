from pathlib import Path

import pytest

from fp4lab.chat.template import CLOSE, render, turn_prompt
from fp4lab.chat.tokenizer import Tokenizer
from fp4lab.errors import UserError

TINY = Path(__file__).parents[2] / "models" / "tiny"
HI = [{"role": "user", "content": "hi"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    *HI,
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "你是誰"},
]


def test_reference_renderings_bit_exact():
    assert render(HI, "training") == "<|im_start|>user\nhi\n<|im_end|>\n<|im_start|>assistant\n"
    assert render(HI) == turn_prompt("hi") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(TALK[1:]) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\n你是誰<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(HI, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"
    assert render(TALK, "training", add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.\n<|im_end|>\n<|im_start|>user\nhi\n<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n你是誰\n<|im_end|>\n"
    )


def test_reference_token_counts():
    """`hi` is ten tokens in the training style, one less in the official one; closing a turn takes two."""
    tokenizer = Tokenizer.load(TINY)
    assert len(tokenizer.encode(render(HI, "training"))) == 10
    assert len(tokenizer.encode(render(HI))) == 9
    assert len(tokenizer.encode(CLOSE)) == 2


def test_turns_appended_one_by_one_make_the_official_conversation():
    cached = turn_prompt("hi") + "Hello!" + CLOSE + turn_prompt("你是誰")
    assert cached == render(TALK[1:])
    tokenizer = Tokenizer.load(TINY)
    parts = [turn_prompt("hi"), "Hello!", CLOSE, turn_prompt("你是誰")]
    assert [token for part in parts for token in tokenizer.encode(part)] == tokenizer.encode(render(TALK[1:]))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", [HI, TALK, TALK[:3]])
def test_equals_transformers(messages, add_generation_prompt):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(TINY)
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert render(messages, add_generation_prompt=add_generation_prompt) == text
    assert theirs(text)["input_ids"] == Tokenizer.load(TINY).encode(text)


def test_errors():
    with pytest.raises(UserError, match="'chatml': expected one of official, training"):
        render(HI, "chatml")
    with pytest.raises(UserError, match="role 'tool'"):
        render([{"role": "tool", "content": "x"}])
    with pytest.raises(UserError, match="content None"):
        render([{"role": "user"}])
