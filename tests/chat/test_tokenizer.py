import json
from pathlib import Path

import pytest

from fp4lab.chat.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from fp4lab.errors import UserError

TINY = Path(__file__).parents[2] / "models" / "tiny"


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.load(TINY)


def test_shipped_vocabulary_is_dense_with_specials_at_the_end(tiny):
    vocab = tiny.raw.get_vocab()
    assert tiny.vocab_size == 4096
    assert sorted(vocab.values()) == list(range(4096))
    assert [vocab[t] for t in SPECIAL_TOKENS] == list(range(4096 - len(SPECIAL_TOKENS), 4096))
    assert (tiny.endoftext, tiny.im_start, tiny.im_end) == (4070, 4071, 4072)
    assert tiny.decode([0]) == "!"


def test_shipped_config_agrees_with_the_tokenizer(tiny):
    config = json.loads((TINY / "config.json").read_text())
    assert config["vocab_size"] == tiny.vocab_size
    assert (config["eos_token_id"], config["pad_token_id"]) == (tiny.im_end, tiny.endoftext)
    generation = json.loads((TINY / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tiny.im_end, tiny.endoftext]


@pytest.mark.parametrize(
    "text",
    [
        "hi",
        "write one short sentence about UFO and you",
        "你是誰",
        " a  b\n\n\tc ",
        "12345",
        "龜 😀 naïve \x00",
        "!!!!",
    ],
)
def test_text_comes_back(tiny, text):
    assert tiny.decode(tiny.encode(text)) == text


def test_qwen_rules(tiny):
    assert tiny.encode("") == []
    assert tiny.encode("cafe\u0301") == tiny.encode("caf\u00e9")  # NFC
    assert len(tiny.encode("2026")) == 4  # one piece a digit
    assert tiny.encode("<|im_start|>user\n")[0] == tiny.im_start
    assert len(tiny.encode("<|im_start|>assistant\n")) == 3


def test_skip_special_hides_control_tokens_only(tiny):
    ids = tiny.encode("<think>hi</think><|im_end|>")
    assert tiny.decode(ids) == "<think>hi</think><|im_end|>"
    assert tiny.decode(ids, skip_special=True) == "<think>hi</think>"


def test_the_word_pattern_is_that_of_transformers_qwen2(tiny):
    from transformers.models.qwen2 import tokenization_qwen2

    from fp4lab.chat.tokenizer import WORD_PATTERN

    assert tokenization_qwen2.PRETOKENIZE_REGEX == WORD_PATTERN


def test_too_little_text_gives_fewer_but_dense_ids():
    raw = train_tokenizer(["aaaa"], 4096)
    assert 256 + len(SPECIAL_TOKENS) <= raw.get_vocab_size() < 300
    assert sorted(raw.get_vocab().values()) == list(range(raw.get_vocab_size()))
    assert Tokenizer(raw).decode(Tokenizer(raw).encode("天 b")) == "天 b"


def test_vocabulary_must_hold_all_bytes():
    with pytest.raises(UserError, match="at least 282"):
        train_tokenizer(["a"], 281)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: no such file"):
        Tokenizer.load(tmp_path / "absent.json")
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(UserError, match=r"bad.json: not a tokenizer"):
        Tokenizer.load(bad)
    import tokenizers

    plain = tmp_path / "plain.json"
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(plain))
    with pytest.raises(UserError, match=r"plain.json: no token <\|im_start\|>"):
        Tokenizer.load(plain)
